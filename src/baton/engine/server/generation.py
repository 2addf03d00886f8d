"""One sequence while it is generated, and the job (one HTTP request) that its sequences belong to.

A `Generation` takes the rank's rows, makes text of them and ends exactly once. A `Job` wakes the one task that writes the
response, as seldom as the route allows. Neither knows HTTP; `client` feeds them.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from baton.engine.detokenizer import OutputText, Vocabulary
from baton.protocol.errors import ErrorInfo
from baton.protocol.openai import CachedTokensDetails
from baton.protocol.rank import Abort, Finish, RequestOutput, Submit, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Delta:
    """What a stream event carries: everything since the last one."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]


@dataclass(slots=True)
class Timings:
    """Seconds on the monotonic clock."""

    created: float
    first_token: float | None = None
    last_token: float | None = None
    finished: float | None = None


class Generation:
    """State of one sequence. Invariant: `finish` is set once, and nothing changes afterwards.

    `token_ids` are all output tokens, those of a resumed stream included; a client of a resumed stream has seen the first
    `num_resumed` of them and their text.
    """

    def __init__(
        self,
        submit: Submit,
        index: int,
        vocabulary: Vocabulary | None,
        *,
        rank_rid: str | None = None,
        is_measured: bool = True,
        dp_rank: int = 0,
    ) -> None:
        self.dp_rank = dp_rank
        """Of the engine that has it."""
        self.is_measured = is_measured
        self.rank_rid = rank_rid or submit.rid
        """What the rank calls this sequence."""
        self.submit = submit
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.input_logprobs: list[TokenLogprobs] = []
        self.finish: Finish | None = None
        self.cached_tokens = 0
        self.cached_host = self.cached_store = 0
        """Of `cached_tokens`: from the host tier, from the store."""
        self.num_retractions = 0
        self.queue_time_s = 0.0
        self.timings = Timings(time.monotonic())
        self.was_aborted_by_user = False
        self._text = _output_text(submit, vocabulary)
        self._taken_chars = self._taken_tokens = self._taken_logprobs = 0
        self.num_resumed = len(submit.output_ids)
        if submit.output_ids:
            self._replay(submit.output_ids)

    @property
    def rid(self) -> str:
        return self.submit.rid

    @property
    def prompt_tokens(self) -> int:
        return len(self.submit.input_ids)

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def text(self) -> str:
        """All text a client may see so far."""
        return self._text.released_text if self._text else ""

    @property
    def has_text(self) -> bool:
        """Whether `take` would give text."""
        return len(self.text) > self._taken_chars

    @property
    def error(self) -> ErrorInfo | None:
        """Set when the sequence failed; an abort that its own user asked for is an ordinary end."""
        return None if self.finish is None or self.was_aborted_by_user else self.finish.error

    def take(self) -> Delta:
        """What came since the last call."""
        delta = Delta(
            self.text[self._taken_chars :], self.token_ids[self._taken_tokens :], self.logprobs[self._taken_logprobs :]
        )
        self._taken_chars += len(delta.text)
        self._taken_tokens += len(delta.token_ids)
        self._taken_logprobs += len(delta.logprobs)
        return delta

    def feed(self, row: RequestOutput) -> Abort | None:
        """Add one step's output. The returned message, if any, tells the rank that a stop string ended the sequence."""
        if self.finish is not None:
            return None
        if row.token_ids:
            self.timings.last_token = time.monotonic()
            if self.timings.first_token is None:
                self.timings.first_token = self.timings.last_token
            self.cached_tokens = row.cached_tokens
            self.cached_host, self.cached_store = row.cached_host, row.cached_store
        self.num_retractions = max(self.num_retractions, row.num_retractions)
        self.queue_time_s = max(self.queue_time_s, row.queue_time_s)
        self.input_logprobs += row.input_logprobs
        finish = row.finish
        # The text of a stop token is no part of the answer, unless asked for.
        is_trimmed = (
            finish is not None
            and finish.type == "stop"
            and isinstance(finish.matched, int)
            and not self.submit.sampling.no_stop_trim
        )
        last = len(row.token_ids) - 1
        for position, token_id in enumerate(row.token_ids):
            self.token_ids.append(token_id)
            if position < len(row.logprobs):
                self.logprobs.append(row.logprobs[position])
            if is_trimmed and position == last:
                break
            if self._text is not None and self._text.push(token_id):
                matched = self._text.matched_stop
                self._end(Finish("stop", matched))
                return None if finish is not None else Abort(self.rank_rid, "stop string", matched_stop=matched)
        if finish is not None:
            if self._text is not None:
                self._text.flush()
            self._end(finish)
        return None

    def end(self, finish: Finish) -> None:
        """End from this side: the rank is gone, or the deadline has passed."""
        if self.finish is None:
            if self._text is not None:
                self._text.flush()
            self._end(finish)

    def _end(self, finish: Finish) -> None:
        self.finish = finish
        self.timings.finished = time.monotonic()

    def _replay(self, token_ids: Sequence[int]) -> None:
        """Go through the tokens of a broken stream; what its client has seen counts as taken.

        The stream may have broken after its last token but before it said so: then the sequence ends here at once. (An
        end-of-sequence token is the rank's to see.)
        """
        sampling = self.submit.sampling
        for position, token_id in enumerate(token_ids):
            self.token_ids.append(token_id)
            is_last = position + 1 == len(token_ids)
            if is_last and token_id in (sampling.stop_token_ids or ()) and position >= sampling.min_new_tokens:
                self.end(Finish("stop", token_id))
            elif self._text is not None and self._text.push(token_id):
                self._end(Finish("stop", self._text.matched_stop))
                break
        if sampling.max_new_tokens is not None and len(token_ids) >= sampling.max_new_tokens:
            self.end(Finish("length"))
        self.take()


def cached_details(generations: Sequence[Generation], *, is_wanted: bool) -> CachedTokensDetails | None:
    """Cached prompt tokens of `generations` by tier. None on a worker without tiers, unless a peer's tiers were used."""
    host = sum(one.cached_host for one in generations)
    store = sum(one.cached_store for one in generations)
    if not is_wanted and not host and not store:
        return None
    return CachedTokensDetails(sum(one.cached_tokens for one in generations) - host - store, host, store)


def _output_text(submit: Submit, vocabulary: Vocabulary | None) -> OutputText | None:
    if vocabulary is None:
        return None
    sampling = submit.sampling
    return OutputText(
        vocabulary.decoder(submit.input_ids, skip_special_tokens=sampling.skip_special_tokens),
        sampling.stop_strings,
        min_new_tokens=sampling.min_new_tokens,
        no_stop_trim=sampling.no_stop_trim,
    )


@dataclass
class Job:
    """All sequences of one HTTP request, and the event its writer waits for.

    `stream_interval` is in tokens; None: wake only when a sequence ends (a response that is not streamed).
    """

    generations: list[Generation]
    stream_interval: int | None
    abort: Callable[["Generation", str], None]
    """How the client tells the rank to end one sequence."""
    deadline: float | None = None
    """On the monotonic clock."""
    _changed: dict[int, Generation] = field(default_factory=dict)
    _last_wake_tokens: dict[int, int] = field(default_factory=dict)
    _event: asyncio.Event = field(default_factory=asyncio.Event)
    is_disconnected: bool = False

    @property
    def is_done(self) -> bool:
        return all(one.finish is not None for one in self.generations)

    @property
    def error(self) -> ErrorInfo | None:
        """The first failure among the sequences."""
        return next((one.error for one in self.generations if one.error is not None), None)

    def note(self, generation: Generation) -> None:
        """The client fed `generation`; wake the writer if it wants to know."""
        self._changed[generation.index] = generation
        if generation.finish is None:
            if self.stream_interval is None:
                return
            seen = self._last_wake_tokens.get(generation.index)
            if seen is not None and generation.completion_tokens - seen < self.stream_interval:
                return
        self._last_wake_tokens[generation.index] = generation.completion_tokens
        self._event.set()

    async def changed(self) -> list[Generation]:
        """Wait for news; the sequences that have some. Returns [] after a disconnect. Raises TimeoutError at the deadline."""
        async with asyncio.timeout_at(self._loop_deadline()):
            await self._event.wait()
        self._event.clear()
        if self.is_disconnected:
            return []
        changed = list(self._changed.values())
        self._changed.clear()
        return changed

    def disconnect(self) -> None:
        """The HTTP client has gone: end what still runs, and let the writer return."""
        self.is_disconnected = True
        self.close("client disconnected")
        self._event.set()

    def close(self, reason: str) -> None:
        """Tell the rank to end every sequence that has not ended."""
        for one in self.generations:
            if one.finish is None:
                self.abort(one, reason)

    def _loop_deadline(self) -> float | None:
        if self.deadline is None:
            return None
        return asyncio.get_running_loop().time() + self.deadline - time.monotonic()
