"""A group of ranks over real processes: the leader in this one, followers forked from a server that has torch loaded already."""

import multiprocessing
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from tests.fakes.batches import PagedSequences, Query
from tests.fakes.rank_follower import run_follower

from baton.engine.args import EngineArgs, engine_args
from baton.engine.batch import SampleRow
from baton.engine.distributed.group import LeaderGroup
from baton.engine.distributed.runner import open_runner
from baton.engine.distributed.topology import Topology
from baton.engine.load import load_model
from baton.engine.runner import Runner, run_step
from baton.protocol.rank import TokenLogprobs
from baton.protocol.sampling import SamplingParams

CPU = torch.device("cpu")
PAGE_SIZE = 16
WAIT_S = 30.0


def flags(model: Path, *more: str) -> list[str]:
    return ["--model-path", str(model), "--max-total-tokens", "1024", "--device", "cpu", *more]


def single(model: Path, *more: str) -> Runner:
    return load_model(engine_args(flags(model, *more)), CPU).runner


class RankGroup:
    """`with RankGroup(...) as group:` gives `group.runner`, which computes on all ranks."""

    def __init__(
        self, model: Path, size: int, *more: str, follower_flags: Sequence[str] = (), pp_size: int = 1
    ) -> None:
        """`size` ranks in each of `pp_size` stages. `follower_flags`: come behind the others' on followers."""
        self._follower_flags = follower_flags
        num_ranks = size * pp_size
        sizes = ("--tp-size", str(size), "--pp-size", str(pp_size), "--nnodes", str(num_ranks))
        self._flags = flags(model, *more, *sizes)
        self._topology = Topology(num_ranks, 0, 1, 0, size, pp_size)
        self.lost = threading.Event()
        self.reason = ""
        self.followers: list[multiprocessing.process.BaseProcess] = []

    def __enter__(self) -> "RankGroup":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["baton.engine.distributed.follower"])
        self.group = LeaderGroup(self._topology, ("127.0.0.1", 0), WAIT_S, self._on_lost)
        address = "{}:{}".format(*self.group.address)
        args = engine_args([*self._flags, "--dist-init-addr", address])
        for rank in range(1, self._topology.num_ranks):
            one = context.Process(target=run_follower, args=([*self._flags, *self._follower_flags], address, rank))
            one.start()
            self.followers.append(one)
        try:
            self._load(args)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.group.close("the test is over")
        for one in self.followers:
            one.join(WAIT_S)
            assert one.exitcode is not None, "a follower did not end with its group"

    def _load(self, args: EngineArgs) -> None:
        self.runner = open_runner(load_model(args, CPU, self.group), self.group)

    def _on_lost(self, reason: str) -> None:
        self.reason = reason
        self.lost.set()


def generate(runner: Runner, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[TokenLogprobs]]:
    """Greedy tokens of every prompt with their log-probabilities: one prefill of all prompts, then decode steps of all."""
    sequences = PagedSequences([[*prompt, *([0] * num_tokens)] for prompt in prompts], PAGE_SIZE)
    sampling = SamplingParams(temperature=0.0, max_new_tokens=num_tokens)
    found: list[list[TokenLogprobs]] = [[] for _ in prompts]
    for step in range(num_tokens):
        lens = [len(prompt) + step for prompt in prompts]
        queries = [Query(seq, 0 if step == 0 else length - 1, length) for seq, length in enumerate(lens)]
        samples = [
            SampleRow(seq, sampling, length, 0, list(prompts[seq]), [], return_logprob=True)
            for seq, length in enumerate(lens)
        ]
        output = run_step(runner, sequences.batch(queries, samples=samples))
        for seq, (token_id, logprobs) in enumerate(zip(output.next_token_ids, output.logprobs, strict=True)):
            assert logprobs is not None
            found[seq].append(logprobs)
            sequences.tokens[seq][lens[seq]] = token_id
    return found


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(3, 250, length).tolist() for length in lengths]
