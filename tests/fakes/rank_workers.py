"""A worker's loop in a thread, over one rank or a group of processes, with a queue where its HTTP process would be."""

import contextlib
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.fakes.rank_group import WAIT_S, RankGroup, flags

from baton.engine.args import EngineArgs, engine_args
from baton.engine.assemble import assemble
from baton.engine.distributed.group import LeaderGroup
from baton.engine.rank import RankLoop
from baton.protocol.rank import Bootstrap, DrainStore, FromRank, RequestOutput, StepOutput, Submit, ToRank
from baton.protocol.sampling import SamplingParams


class _OverError(Exception):
    pass


class _Channel:
    """The rank's end: sleeps without a deadline where the rank does, so that a missing wake-up is a test that ends by its limit."""

    def __init__(self) -> None:
        self.to_rank: queue.Queue[ToRank | None] = queue.Queue()
        self.from_rank: queue.Queue[FromRank] = queue.Queue()
        self.is_over = False

    def receive(self, timeout_s: float | None = 0.0) -> list[ToRank]:
        messages = []
        try:
            messages.append(self.to_rank.get(timeout_s != 0.0, timeout_s))
            while True:
                messages.append(self.to_rank.get_nowait())
        except queue.Empty:
            pass
        if self.is_over:
            raise _OverError
        return [one for one in messages if one is not None]

    def wake(self) -> None:
        self.to_rank.put(None)

    def send(self, message: FromRank) -> None:
        self.from_rank.put(message)


class Worker:
    """A single rank. `with Worker(...) as worker:`"""

    def __init__(self, model: Path, *more: str) -> None:
        self._args = engine_args(flags(model, *more))
        self._channel = _Channel()

    def __enter__(self) -> "Worker":
        self.start(self._args, None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, args: EngineArgs, group: LeaderGroup | None) -> None:
        engine = assemble(args, self._channel.wake, group)
        self.tiers, self.prefill, self.decode = engine.tiers, engine.prefill, engine.decode
        self._loop = RankLoop(engine, self._channel)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._channel.is_over = True
        self._channel.wake()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        for one in (self.tiers, self.prefill, self.decode):
            if one is not None:
                one.close()

    def generate(self, prompt: Sequence[int], num_tokens: int = 6) -> tuple[list[float], RequestOutput]:
        """Greedy tokens, each followed by its log-probability, and the output that began them: it says what was cached."""
        self.submit(prompt, num_tokens)
        outputs = self.outputs()
        assert outputs[-1].finish is not None and outputs[-1].finish.error is None, outputs[-1].finish
        return numbers(outputs), outputs[0]

    def submit(self, prompt: Sequence[int], num_tokens: int = 6, bootstrap: Bootstrap | None = None) -> None:
        sampling = SamplingParams(temperature=0.0, max_new_tokens=num_tokens, ignore_eos=True)
        self._channel.to_rank.put(
            Submit(rid="r", input_ids=list(prompt), sampling=sampling, return_logprob=True, bootstrap=bootstrap)
        )

    def outputs(self) -> list[RequestOutput]:
        """Those of the only request that runs, up to its end."""
        outputs: list[RequestOutput] = []
        while not outputs or outputs[-1].finish is None:
            message = self._channel.from_rank.get(timeout=WAIT_S)
            assert isinstance(message, StepOutput)
            outputs += message.outputs
        return outputs

    def tell(self, message: ToRank) -> None:
        self._channel.to_rank.put(message)

    def ask(self, message: ToRank) -> Any:
        self.tell(message)
        return self._channel.from_rank.get(timeout=WAIT_S)

    def drain(self) -> None:
        assert self.ask(DrainStore(1)).ok

    def _run(self) -> None:
        with contextlib.suppress(_OverError):
            self._loop.run()


def numbers(outputs: Sequence[RequestOutput]) -> list[float]:
    """Tokens, each followed by its log-probability."""
    found = [one for output in outputs for one in output.logprobs]
    return [number for one in found for number in (one.token_id, one.logprob or 0.0)]


class GroupWorker(RankGroup):
    """A worker of several ranks, the others as processes."""

    def __init__(
        self, model: Path, size: int, *more: str, follower_flags: Sequence[str] = (), pp_size: int = 1
    ) -> None:
        super().__init__(model, size, *more, follower_flags=follower_flags, pp_size=pp_size)
        self.worker = Worker(model, *more)

    def __exit__(self, *error: Any) -> None:
        if hasattr(self.worker, "_thread"):
            self.worker.stop()
        super().__exit__(*error)

    def _load(self, args: EngineArgs) -> None:
        self.worker.start(args, self.group)
