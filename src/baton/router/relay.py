"""One client stream, fed by one worker stream after another: whole SSE events out, what is needed to go on kept. Pure.

`feed` takes bytes as they come from a worker and returns the events to forward. Comment lines with token ids
(protocol/hops.py) are taken out and kept; `resume` turns them into what the next worker needs. Nothing is parsed per
event beyond finding its end: ids and chunk heads are looked at only when a worker has died.

A first event of a choice that carries no token (the role chunk) is held back until the choice's next event, so that
"no ids kept" always means "nothing sent" for that choice, and the next worker starts it afresh.
"""

from typing import Any

import msgspec

from baton.protocol.hops import TOKENS_COMMENT, Resume, parse_tokens_comment

_decode = msgspec.json.decode
_encode = msgspec.json.encode
MAX_EVENT_BYTES = 64 * 2**20
DONE_EVENT = b"data: [DONE]\n\n"
_ERROR_PREFIX = b'data: {"error"'
_CANNOT_RESUME = (
    b'data: {"error":{"type":"stream_lost","code":502,"message":"The worker died, and the next one cannot continue a'
    b' stream.","stage":"decode","retryable":false}}\n\n'
)
_UNFINISHED = b'"finish_reason":null'
_UNFINISHED_SPACED = b'"finish_reason": null'


class StreamError(Exception):
    """The worker's stream holds an error event instead of going on."""

    def __init__(self, event: bytes) -> None:
        super().__init__("error event in the worker's stream")
        self.event = event
        """The event, whole, as the worker sent it."""

    @property
    def info(self) -> dict[str, Any]:
        """The error object; empty when it cannot be read."""
        decoded = event_json(self.event)
        error = decoded.get("error") if decoded else None
        return error if isinstance(error, dict) else {}


def event_json(event: bytes) -> dict[str, Any] | None:
    """The JSON object of a `data:` event."""
    _, _, data = event.partition(b"data:")
    try:
        decoded = _decode(data.strip())
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return decoded if isinstance(decoded, dict) else None


class StreamRelay:
    """State of one client stream. Invariants: `_buffer` never holds a whole event; a choice in `_held` has no ids kept."""

    def __init__(self) -> None:
        self._out: list[bytes] = []
        self.done = False
        """[DONE] has been forwarded."""
        self.events_out = 0
        self._buffer = b""
        self._comments: list[bytes] = []
        self._without_tokens = False
        """An event came without token ids: this stream cannot migrate."""
        self._special: list[bytes] = []
        """Events that end a choice or carry none (usage)."""
        self._sample: bytes = b""
        self._held: dict[bytes, bytes] = {}
        self._rename: tuple[bytes, bytes] | None = None
        self._must_prove = False
        """The next event is the first of a worker that was asked to resume; only ours can, and they send token ids."""
        self._usage_extra = 0

    def feed(self, data: bytes) -> bytes:
        """Events to forward, possibly none. Raises `StreamError` on an error event (events before it are returned by
        `take`)."""
        if (event := self._one_plain_event(data)) is not None:
            return event
        if self._buffer:
            data = self._buffer + data
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            self._buffer = data
            return b""
        self._buffer = data[end:]
        out: list[bytes] = []
        self._out = out
        start = 0
        while start < end:
            stop = data.index(b"\n\n", start) + 2
            self._event(data[start:stop], out)
            start = stop
        return out[0] if len(out) == 1 else b"".join(out)

    def _one_plain_event(self, data: bytes) -> bytes | None:
        """What nearly every read brings, at a third of the cost: one whole event in mid-stream, with its token ids."""
        if self._buffer or self._held or self._rename is not None or not self.events_out:
            return None
        if not data.startswith(TOKENS_COMMENT):
            return None
        end = data.find(b"\n")
        event = data[end + 1 :]
        if (
            event.find(b"\n\n") != len(event) - 2
            or _UNFINISHED not in event
            or not event.startswith(b"data: {")
            or event.startswith(_ERROR_PREFIX)
            or data[end - 1] == ord(" ")
        ):
            return None
        self._comments.append(data[:end])
        self.events_out += 1
        return event

    def take(self) -> bytes:
        """Events that a `feed` had ready when it met an error event."""
        return b"".join(self._out)

    @property
    def pending_bytes(self) -> int:
        return len(self._buffer)

    def _event(self, event: bytes, out: list[bytes]) -> None:
        comment = b""
        if event.startswith(TOKENS_COMMENT):
            comment, event = self._take_comments(event)
        if event.startswith(_ERROR_PREFIX):
            raise StreamError(event)
        if self._must_prove:
            if not comment and event != DONE_EVENT and b'"choices":[]' not in event:
                raise StreamError(_CANNOT_RESUME)
            self._must_prove = False
        if event == DONE_EVENT:
            self.done = True
            out.extend(self._held.values())
            self._held.clear()
        elif _UNFINISHED not in event and _UNFINISHED_SPACED not in event and event.startswith(b"data:"):
            event = self._special_event(event, comment, out)
        elif comment:
            if comment.endswith(b" ") and not any(kept.startswith(comment) for kept in self._comments):
                self._held[comment] = self._held.get(comment, b"") + self._renamed(event)
                return
            if self._held:
                held = self._held.pop(comment[: comment.index(b" ", len(TOKENS_COMMENT)) + 1], None)
                if held is not None:
                    out.append(held)
            self._comments.append(comment)
        elif event.startswith(b"data:"):
            self._without_tokens = True
        if self._rename is not None:
            event = self._renamed(event)
        if not self._sample:
            self._sample = event
        self.events_out += 1
        out.append(event)

    def _take_comments(self, event: bytes) -> tuple[bytes, bytes]:
        """The last comment line (usually the only one) without its newline, and the event without comments."""
        comment = b""
        while event.startswith(TOKENS_COMMENT):
            line, _, event = event.partition(b"\n")
            if comment and not comment.endswith(b" "):
                self._comments.append(comment)
            comment = line
        return comment, event

    def _special_event(self, event: bytes, comment: bytes, out: list[bytes]) -> bytes:
        """An event that ends a choice, or belongs to none."""
        if comment:
            held = self._held.pop(comment[: comment.index(b" ", len(TOKENS_COMMENT)) + 1], None)
            if held is not None:
                out.append(held)
            if not comment.endswith(b" "):
                self._comments.append(comment)
        if self._usage_extra:
            event = self._with_usage_of_finished(event)
        self._special.append(event)
        return event

    def _renamed(self, event: bytes) -> bytes:
        return event.replace(*self._rename) if self._rename is not None else event

    def can_resume(self) -> bool:
        """Whether another worker can go on: nothing was sent yet, or token ids came with all that was sent."""
        return self.events_out == 0 or not self._without_tokens

    def resume(self, num_choices: int) -> Resume | None:
        """What the next worker needs to go on; None: nothing was sent, it starts afresh."""
        if self.events_out == 0:
            return None
        ids: list[list[int] | None] = [[] for _ in range(num_choices)]
        for comment in self._comments:
            index, token_ids = parse_tokens_comment(comment)
            choice = ids[index] if 0 <= index < num_choices else None
            if choice is None:
                raise ValueError(f"token ids for choice {index} of {num_choices}")
            choice += token_ids
        finished_tokens = 0
        for index in self._finished():
            if index < num_choices and (choice := ids[index]) is not None:
                finished_tokens += len(choice)
                ids[index] = None
        self._usage_extra = finished_tokens
        head = event_json(self._sample) or {}
        created = head.get("created")
        return Resume(created if isinstance(created, int) else None, ids)

    def all_finished(self, num_choices: int) -> bool:
        return len(self._finished()) >= num_choices

    def _finished(self) -> set[int]:
        finished: set[int] = set()
        for event in self._special:
            chunk = event_json(event) or {}
            for choice in chunk.get("choices") or ():
                if choice.get("finish_reason") is not None:
                    finished.add(choice.get("index", 0))
            if (chunk.get("meta_info") or {}).get("finish_reason") is not None:
                finished.add(chunk.get("index", 0))
        return finished

    def next_worker(self, tag: str) -> None:
        """The stream of another worker is about to be fed; ids in its chunks hold `tag`, which clients never see.

        Half an event of the last worker is dropped; what is held back is not: a resumed worker does not repeat it.
        """
        self._buffer = b""
        self._rename = (tag.encode(), b"")
        self._must_prove = self.events_out > 0

    def forfeit(self) -> None:
        """Events were taken from `feed` and lost: this stream cannot migrate any more."""
        self._without_tokens = True

    def _with_usage_of_finished(self, event: bytes) -> bytes:
        """A usage chunk of a worker that never saw the choices that had finished: add their tokens."""
        chunk = event_json(event)
        if chunk is None or chunk.get("choices") != [] or not isinstance(usage := chunk.get("usage"), dict):
            return event
        chunk["id"] = (event_json(self._sample) or chunk).get("id")
        for key in ("completion_tokens", "total_tokens"):
            if isinstance(usage.get(key), int):
                usage[key] += self._usage_extra
        return b"data: " + _encode(chunk) + b"\n\n"
