"""A rank without a model, behind the real channel: it answers each `Submit` with tokens a test chose.

Runs in a thread, one row per sequence and step, like the real loop. With `paused` set it takes messages but generates
nothing, so that a test can act in the middle of a request; `received` holds every message, in order.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from baton.engine.server.channel import ChannelAddress, RankChannel
from baton.protocol.errors import ErrorInfo
from baton.protocol.rank import (
    Abort,
    CheckIntegrity,
    ClearStore,
    DrainStore,
    Finish,
    FlushCache,
    GetState,
    Ready,
    Reply,
    RequestOutput,
    SchedulerState,
    StepOutput,
    Submit,
    TokenLogprobs,
    ToRank,
)

VOCAB_SIZE = 49152
EOS_ID = 2
READY = Ready(
    max_total_num_tokens=100_000, max_req_input_len=8000, context_len=8192, vocab_size=VOCAB_SIZE, page_size=16,
    bootstrap_port=None, load_weights_s=0.5, device="cpu", attention_backend="torch",
)  # fmt: skip

Reply_ = Callable[[Submit], list[int]]


def logprobs_of(token_id: int, submit: Submit) -> TokenLogprobs:
    """Numbers a test can predict: the token has -0.5, the runners-up -1, -2, ..."""
    top = [(token_id, -0.5), *((VOCAB_SIZE - rank, -float(rank)) for rank in range(1, 200))][: submit.top_logprobs_num]
    requested = [(wanted, -3.0) for wanted in submit.token_ids_logprob or ()]
    return TokenLogprobs(token_id, -0.5, top, requested)


@dataclass
class _Running:
    submit: Submit
    tokens: Iterator[int]
    num_output: int
    is_first: bool = True


@dataclass
class FakeRank:
    """`reply` gives the tokens of a sequence from its first output token on (those of a resume included)."""

    address: ChannelAddress
    reply: Reply_
    tokens_per_step: int = 1
    cached_tokens: int = 0
    cached_host: int = 0
    cached_store: int = 0
    refuse: ErrorInfo | None = None
    """Set: every `Submit` ends with this error."""
    is_hung: bool = False
    """Set: nothing is answered any more."""
    flush_ok: bool = True
    holds_ends: bool = False
    """Set: a sequence that is aborted ends, with one token more, only when the next `Submit` comes: as after a step that
    was on its way."""
    is_prefill: bool = False
    credits: int | None = None
    """Steps that may still run; None: no limit. `give` adds some."""
    received: list[ToRank] = field(default_factory=list)
    paused: threading.Event = field(default_factory=threading.Event)
    _running: dict[str, _Running] = field(default_factory=dict)
    _held: list[RequestOutput] = field(default_factory=list)
    _is_stopping: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        self._channel = RankChannel(self.address)
        self._channel.send(READY)
        self._thread = threading.Thread(target=self._loop, name="fake-rank", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping = True
        self._channel.wake()
        self._thread.join(10)
        self._channel.close()

    def resume(self) -> None:
        self.paused.clear()
        self._channel.wake()

    def give(self, steps: int) -> None:
        with self._lock:
            self.credits = (self.credits or 0) + steps
        self._channel.wake()

    def received_of(self, kind: type) -> list[ToRank]:
        return [message for message in self.received if isinstance(message, kind)]

    def _loop(self) -> None:
        while not self._is_stopping:
            is_idle = not self._running or self._is_blocked()
            for message in self._channel.receive(None if is_idle else 0.0):
                self.received.append(message)
                if not self.is_hung:
                    self._handle(message)
            if self._running and not self._is_blocked():
                with self._lock:
                    if self.credits is not None:
                        self.credits -= 1
                self._step()

    def _is_blocked(self) -> bool:
        return self.paused.is_set() or self.is_hung or self.credits == 0

    def _handle(self, message: ToRank) -> None:
        match message:
            case Submit():
                self._send_held()
                assert message.rid not in self._running, f"request id {message.rid!r} is in use"
                if self.refuse is not None:
                    self._send([RequestOutput(message.rid, finish=Finish("abort", error=self.refuse))])
                    return
                tokens = iter(self.reply(message)[len(message.output_ids) :])
                self._running[message.rid] = _Running(message, tokens, len(message.output_ids))
            case Abort(rid, reason, matched_stop):
                if self._running.pop(rid, None) is not None:
                    error = ErrorInfo("AbortError", 499, reason)
                    finish = Finish("stop", matched_stop) if matched_stop else Finish("abort", error=error)
                    self._held.append(RequestOutput(rid, [EOS_ID] if self.holds_ends else [], finish))
                    if not self.holds_ends:
                        self._send_held()
            case FlushCache(call_id) | ClearStore(call_id) | DrainStore(call_id) | CheckIntegrity(call_id):
                self._channel.send(Reply(call_id, self.flush_ok))
            case GetState(call_id):
                state = SchedulerState(call_id=call_id, num_running=len(self._running), max_total_num_tokens=100_000)
                self._channel.send(state)

    def _send_held(self) -> None:
        rows, self._held = self._held, []
        if rows:
            self._send(rows)

    def _send(self, rows: list[RequestOutput]) -> None:
        self._channel.send(StepOutput(rows))

    def _step(self) -> None:
        rows = [self._row(one) for one in list(self._running.values())]
        if rows:
            self._send(rows)

    def _row(self, one: _Running) -> RequestOutput:
        submit, sampling = one.submit, one.submit.sampling
        limit = 1 if self.is_prefill else sampling.max_new_tokens
        token_ids: list[int] = []
        finish: Finish | None = None
        while finish is None and len(token_ids) < self.tokens_per_step:
            token_id = next(one.tokens, EOS_ID)
            token_ids.append(token_id)
            one.num_output += 1
            if token_id in (sampling.stop_token_ids or ()) or (token_id == EOS_ID and not sampling.ignore_eos):
                finish = Finish("stop", token_id)
            elif limit is not None and one.num_output >= limit:
                finish = Finish("length")
        input_logprobs: list[TokenLogprobs] = []
        if one.is_first and submit.return_logprob and submit.logprob_start_len >= 0:
            prompt = submit.input_ids[submit.logprob_start_len :]
            input_logprobs = [logprobs_of(token_id, submit) for token_id in prompt]
            if submit.logprob_start_len == 0:
                input_logprobs[0] = TokenLogprobs(prompt[0], None)
        row = RequestOutput(
            submit.rid, token_ids, finish, self.cached_tokens,
            [logprobs_of(token_id, submit) for token_id in token_ids] if submit.return_logprob else [],
            input_logprobs, cached_host=self.cached_host, cached_store=self.cached_store,
        )  # fmt: skip
        one.is_first = False
        if finish is not None:
            del self._running[submit.rid]
        return row
