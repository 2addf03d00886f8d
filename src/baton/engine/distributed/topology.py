"""How many ranks a worker has, which of them this process is, and which pipeline stage it is in. Plain arithmetic on flags; no torch,
no sockets.

A rank is one device: a GPU, or the whole CPU of a host. So `--tp-size 4 --nnodes 2` is four ranks on GPUs and two on CPUs; what
several ranks would have computed on one CPU, one rank computes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from baton.engine.args import EngineArgs
from baton.engine.errors import ModelError

RANKS_PER_HOST = "BATON_RANKS_PER_HOST"
"""Environment variable: this many ranks on each CPU host, for tests of what normally takes several hosts."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks are numbered node after node, and stage after stage: rank = stage * tp_size + tp_rank. Rank 0 leads."""

    nnodes: int = 1
    node_rank: int = 0
    ranks_per_node: int = 1
    local_rank: int = 0
    asked_tp: int = 1
    """--tp-size; `tp_size` where a rank is one GPU."""
    asked_pp: int = 1
    """--pp-size; `pp_size` where a rank is one GPU."""

    @property
    def rank(self) -> int:
        return self.node_rank * self.ranks_per_node + self.local_rank

    @property
    def num_ranks(self) -> int:
        return self.nnodes * self.ranks_per_node

    @property
    def pp_size(self) -> int:
        """Stages: as many of those that were asked for as the ranks can be dealt to evenly."""
        return math.gcd(self.asked_pp, self.num_ranks)

    @property
    def tp_size(self) -> int:
        """Ranks of a stage."""
        return self.num_ranks // self.pp_size

    @property
    def stage(self) -> int:
        return self.rank // self.tp_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def stage_ranks(self) -> range:
        """The ranks of this one's stage."""
        return range(self.stage * self.tp_size, (self.stage + 1) * self.tp_size)

    def rank_at(self, stage: int) -> int:
        """The rank in stage `stage` (counted round) that has this one's place there."""
        return stage % self.pp_size * self.tp_size + self.tp_rank

    def name_of(self, rank: int) -> str:
        """How messages call a rank: "rank 3 (node 1)"."""
        return f"rank {rank} (node {rank // self.ranks_per_node})"

    @property
    def note(self) -> str | None:
        """What has to be said where fewer ranks run than were asked for."""
        if self.num_ranks == self.asked_tp * self.asked_pp:
            return None
        flags = f"--tp-size {self.asked_tp}" + (f" --pp-size {self.asked_pp}" if self.asked_pp > 1 else "")
        ranks = "1 rank runs" if self.num_ranks == 1 else f"{self.num_ranks} ranks run"
        if self.asked_pp > 1 and self.num_ranks > 1:
            ranks += f" as --tp-size {self.tp_size} --pp-size {self.pp_size}"
        return (
            f"{flags}: {ranks}, since a rank is a whole CPU and more of them on one host only cost "
            f"time ({RANKS_PER_HOST} forces them)"
        )


def plan_topology(args: EngineArgs, device: str, environ: Mapping[str, str], local_rank: int = 0) -> Topology:
    """`device`: "cpu" or "cuda". Raises `ModelError` for a variable that is no number."""
    per_node = args.tp_size * args.pp_size // args.nnodes
    if device == "cpu":
        per_node = min(per_node, forced_ranks_per_host(environ))
    return Topology(args.nnodes, args.node_rank, per_node, local_rank, args.tp_size, args.pp_size)


def forced_ranks_per_host(environ: Mapping[str, str]) -> int:
    """How many ranks may run on this CPU host. Raises `ModelError` for a variable that is no number."""
    text = environ.get(RANKS_PER_HOST, "1")
    if not text.isdigit() or int(text) < 1:
        raise ModelError(f"{RANKS_PER_HOST} must be a whole number of at least 1, got {text!r}.")
    return int(text)
