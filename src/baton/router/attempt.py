"""One try of one request: two concurrent exchanges with a pair, or one with one worker, and one outcome.

`outcome` is set exactly once: an `Answer` of the decode worker, `STREAMED`, or a `Failure`. Whoever holds the attempt
calls `abandon` when it is given up; that closes what is still open and tells both workers to abort. Decisions about
retries are `exchange`'s.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from baton.protocol.hops import RETRYABLE_HEADER, STAGE_HEADER
from baton.router.errors import error_of
from baton.router.httpbytes import header
from baton.router.logprobs import StreamMerger, merge_answers, needs_prefill
from baton.router.relay import MAX_EVENT_BYTES, StreamError, StreamRelay
from baton.router.retry import Answer, Failure, Kind
from baton.router.upstream import Upstream
from baton.router.workers import Worker

STREAMED: Final = "streamed"
Outcome = Answer | Failure | str
_STAGE_HEADER: Final = STAGE_HEADER.encode()
_RETRYABLE_HEADER: Final = RETRYABLE_HEADER.encode()
PREFILL_TAIL_S = 30.0
"""How long a prefill worker may take to end its answer once decode has ended its own."""


class Sink(Protocol):
    """Where the events of a stream go."""

    def begin_stream(self, headers: list[tuple[bytes, bytes]], events: bytes) -> None: ...
    def write_events(self, events: bytes) -> None: ...


class Side:
    """One worker's half: counts the worker's load while open. Subclasses are the `Listener` of its connection."""

    __slots__ = ("attempt", "body", "connection", "headers", "is_open", "num_reads", "status", "worker")

    def __init__(self, attempt: "Attempt", worker: Worker, connection: Upstream) -> None:
        self.attempt = attempt
        self.worker = worker
        self.connection = connection
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.body: list[bytes] = []
        self.is_open = True
        self.num_reads = 0
        worker.active += 1

    def shut(self) -> None:
        if self.is_open:
            self.is_open = False
            self.worker.active -= 1

    def failure(self, kind: Kind, message: str, event: bytes = b"") -> Failure:
        return Failure(
            kind, self.worker.role, self.worker.url, message, peer_url=self.attempt.peer_url(self), event=event
        )

    def status_failure(self) -> Failure:
        body = b"".join(self.body)
        failure = self.failure("status", f"{self.worker.role} worker {self.worker.url} answered {self.status}")
        failure.answer = Answer(self.status, self.headers, body)
        failure.info = error_of(body) or {}
        if stage := header(self.headers, _STAGE_HEADER):
            failure.info["stage"] = stage.decode("latin-1")
        if retryable := header(self.headers, _RETRYABLE_HEADER):
            failure.info["retryable"] = retryable == b"1"
        return failure

    def lost_failure(self, reason: str, stale: bool) -> Failure:
        return self.failure("stale" if stale else "lost", f"{self.worker.role} worker {self.worker.url}: {reason}")


class PrefillSide(Side):
    """Its body matters only when it is an error, or holds the input logprobs."""

    __slots__ = ()

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status, self.headers = status, headers

    def on_data(self, data: bytes) -> None:
        self.num_reads += 1
        attempt = self.attempt
        if self.status >= 400 or attempt.wants_logprobs:
            if attempt.merger is not None and self.status < 400:
                attempt.merger.feed_prefill(data)
                attempt.flush_merge()
            else:
                self.body.append(data)
        elif not attempt.decode_began and (at := data.find(b'data: {"error"')) >= 0 and data[max(at - 1, 0)] in b"d\n":
            error = StreamError(data[at:].partition(b"\n\n")[0] + b"\n\n")
            failure = self.failure("event", f"prefill worker {self.worker.url} failed", error.event)
            failure.info = error.info
            attempt.settle(failure)

    def on_end(self) -> None:
        self.shut()
        attempt = self.attempt
        if attempt.tail_timer is not None:
            attempt.tail_timer.cancel()
        if self.status >= 400:
            if not attempt.decode_began:
                attempt.settle(self.status_failure())
            return
        self.worker.breaker.on_success()
        attempt.prefill_done = True
        if attempt.wants_logprobs:
            attempt.flush_merge()

    def on_lost(self, reason: str, stale: bool) -> None:
        self.shut()
        attempt = self.attempt
        attempt.prefill_done = True
        if attempt.tail_timer is not None:
            attempt.tail_timer.cancel()
        if attempt.decode_began:  # the KV has been handed over: the stream goes on without the prefill
            attempt.flush_merge()
        else:
            attempt.settle(self.lost_failure(reason, stale))


class DecodeSide(Side):
    """Its answer is the attempt's."""

    __slots__ = ("is_sse",)

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status, self.headers = status, headers
        self.is_sse = (
            status == 200
            and self.attempt.relay is not None
            and header(headers, b"content-type").startswith(b"text/event-stream")
        )

    def on_data(self, data: bytes) -> None:
        self.num_reads += 1
        if not self.is_sse:
            self.body.append(data)
            return
        attempt = self.attempt
        relay = attempt.relay
        assert relay is not None
        try:
            events = relay.feed(data)
        except StreamError as error:
            attempt.on_events(relay.take())
            failure = self.failure("event", f"{self.worker.role} worker {self.worker.url} failed", error.event)
            failure.info = error.info
            attempt.settle(failure)
            return
        if events:
            attempt.on_events(events)
        elif relay.pending_bytes > MAX_EVENT_BYTES:
            attempt.settle(self.failure("lost", f"event of more than {MAX_EVENT_BYTES} bytes from {self.worker.url}"))

    def on_end(self) -> None:
        self.shut()
        attempt = self.attempt
        if self.is_sse:
            assert attempt.relay is not None
            if attempt.relay.done:
                self.worker.breaker.on_success()
                attempt.stream_ended = True
                attempt.flush_merge()
            else:
                attempt.settle(self.lost_failure("the stream ended without [DONE]", False))
        elif self.status >= 400:
            attempt.settle(self.status_failure())
        else:
            self.worker.breaker.on_success()
            attempt.answer = Answer(self.status, self.headers, b"".join(self.body))
            attempt.flush_merge()

    def on_lost(self, reason: str, stale: bool) -> None:
        self.shut()
        attempt = self.attempt
        if attempt.relay is not None and attempt.relay.done:
            attempt.stream_ended = True
            attempt.flush_merge()
        else:
            attempt.settle(self.lost_failure(reason, stale))


class Attempt:
    """`relay` is None for a request that does not stream."""

    __slots__ = (
        "_abort",
        "_loop",
        "_sink",
        "_unmerged",
        "answer",
        "decode",
        "decode_began",
        "held",
        "merger",
        "outcome",
        "prefill",
        "prefill_done",
        "relay",
        "rid",
        "stream_ended",
        "tail_timer",
        "wants_logprobs",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sink: Sink,
        rid: str | list[str],
        relay: StreamRelay | None,
        wants_logprobs: bool,
        abort: Callable[[Worker, str | list[str]], None],
        held: Worker | None = None,
    ) -> None:
        self._loop = loop
        self._sink = sink
        self._abort = abort
        self.rid = rid
        self.relay = relay
        self.wants_logprobs = wants_logprobs
        """Prefill's input logprobs are to be joined to decode's answer (PD and `return_logprob`)."""
        self.merger = StreamMerger() if wants_logprobs and relay is not None else None
        self._unmerged: list[bytes] = []
        self.prefill: PrefillSide | None = None
        self.decode: DecodeSide | None = None
        self.decode_began = False
        """An event of this attempt's decode worker has arrived: the KV is there."""
        self.prefill_done = True
        self.stream_ended = False
        self.answer: Answer | None = None
        self.tail_timer: asyncio.TimerHandle | None = None
        self.outcome: asyncio.Future[Outcome] = loop.create_future()
        self.held = held
        """A prefill worker that has answered and keeps the KV until decode begins: load, and a loss if it stops answering."""
        if held is not None:
            held.active += 1

    def start(
        self,
        prefill: tuple[Worker, Upstream] | None,
        decode: tuple[Worker, Upstream],
        path: bytes,
        head: bytes,
        body: bytes,
    ) -> None:
        """Send the same request to all there are. `path` like `POST /generate`; `head`: header lines and the blank line."""
        if prefill is not None:
            self.prefill_done = False
            self.prefill = PrefillSide(self, *prefill)
            self.prefill.connection.send(prefill[0].head(path) + head, body, self.prefill)
        self.decode = DecodeSide(self, *decode)
        self.decode.connection.send(decode[0].head(path) + head, body, self.decode)

    def on_events(self, events: bytes) -> None:
        if not events:
            return
        if self.merger is not None:
            self._unmerged.append(events)
            self.flush_merge()
        else:
            self._emit(events)

    def _emit(self, events: bytes) -> None:
        if self.decode_began:
            self._sink.write_events(events)
        else:
            self.decode_began = True
            self._release_held()
            assert self.decode is not None
            self._sink.begin_stream(self.decode.headers, events)

    def flush_merge(self) -> None:
        """Forward what no longer waits for the prefill's logprobs; settle when all is there."""
        if self.merger is not None and self._unmerged:
            events = b"".join(self._unmerged)
            if not self.prefill_done and not self.merger.can_merge(events):
                return
            self._unmerged = []
            self._emit(self.merger.merge(events))
        if self.stream_ended:
            self.settle(STREAMED)
        elif self.answer is not None:
            answer = self.answer
            if self.wants_logprobs and not self.prefill_done and needs_prefill(answer.body):
                return
            if self.wants_logprobs and self.prefill is not None:
                answer = answer._replace(body=merge_answers(b"".join(self.prefill.body), answer.body))
            self.settle(answer)

    def settle(self, outcome: Outcome) -> None:
        """The first outcome counts."""
        if self.outcome.done():
            return
        self.outcome.set_result(outcome)
        if isinstance(outcome, Failure):
            if self._unmerged and self.relay is not None:
                self.relay.forfeit()
            self.abandon()
            return
        self._release_held()
        if self.prefill is not None and self.prefill.is_open:
            self.tail_timer = self._loop.call_later(PREFILL_TAIL_S, self.abandon)

    def _release_held(self) -> Worker | None:
        held, self.held = self.held, None
        if held is not None:
            held.active -= 1
        return held

    def peer_url(self, side: Side) -> str:
        """The other worker of the pair."""
        if self.held is not None:
            return self.held.url
        peer = self.decode if side is self.prefill else self.prefill
        return peer.worker.url if peer is not None else ""

    def progress_on(self, worker: Worker) -> int | None:
        """A number that grows while `worker` works for this attempt; None: it does not."""
        if worker is self.held and self.relay is not None:  # without a stream nobody sees when decode has it all
            return 0
        for side in (self.decode, self.prefill):
            if side is not None and side.is_open and side.worker is worker:
                return side.num_reads
        return None

    def give_up_on(self, worker: Worker, reason: str) -> None:
        """`worker` is known to be stuck: as if its connection had been lost."""
        if worker is self.held:
            peer_url = self.decode.worker.url if self.decode is not None else ""
            self.settle(
                Failure("lost", worker.role, worker.url, f"prefill worker {worker.url}: {reason}", peer_url=peer_url)
            )
        for side in (self.decode, self.prefill):
            if side is not None and side.is_open and side.worker is worker and not self.outcome.done():
                if side is self.prefill and self.decode_began:
                    continue
                self.settle(side.lost_failure(reason, False))

    def abandon(self) -> None:
        """Close what is open and abort it on its worker. Idempotent."""
        for side in (self.prefill, self.decode):
            if side is not None and side.is_open:
                side.shut()
                side.connection.close()
                self._abort(side.worker, self.rid)
        if (held := self._release_held()) is not None:
            self._abort(held, self.rid)

    @property
    def is_unfinished(self) -> bool:
        """No outcome, or none will come because the waiting task was cancelled."""
        return not self.outcome.done() or self.outcome.cancelled()

    def waiting_for(self) -> str:
        """The stage this attempt is in, for time-out errors."""
        if self.prefill is not None and self.prefill.is_open and not self.decode_began:
            return "prefill"
        return "prefill" if self.decode is not None and self.decode.worker.role == "prefill" else "decode"

    def pause(self) -> None:
        if self.decode is not None and self.decode.is_open:
            self.decode.connection.pause()

    def resume(self) -> None:
        if self.decode is not None and self.decode.is_open:
            self.decode.connection.resume()
