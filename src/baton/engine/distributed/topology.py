"""How many ranks a worker has and which of them this process is. Plain arithmetic on flags; no torch, no sockets.

A rank is one device: a GPU, or the whole CPU of a host. So `--tp-size 4 --nnodes 2` is four ranks on GPUs and two on CPUs; what
several ranks would have computed on one CPU, one rank computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from baton.engine.args import EngineArgs
from baton.engine.errors import ModelError

RANKS_PER_HOST = "BATON_RANKS_PER_HOST"
"""Environment variable: this many ranks on each CPU host, for tests of what normally takes several hosts."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks are numbered node after node; rank 0 leads."""

    nnodes: int = 1
    node_rank: int = 0
    ranks_per_node: int = 1
    local_rank: int = 0
    tp_size: int = 1
    """What was asked for; `num_ranks` where a rank is one GPU."""

    @property
    def rank(self) -> int:
        return self.node_rank * self.ranks_per_node + self.local_rank

    @property
    def num_ranks(self) -> int:
        return self.nnodes * self.ranks_per_node

    def name_of(self, rank: int) -> str:
        """How messages call a rank: "rank 3 (node 1)"."""
        return f"rank {rank} (node {rank // self.ranks_per_node})"

    @property
    def note(self) -> str | None:
        """What has to be said where fewer ranks run than were asked for."""
        if self.num_ranks == self.tp_size:
            return None
        ranks = "1 rank runs" if self.num_ranks == 1 else f"{self.num_ranks} ranks run"
        return (
            f"--tp-size {self.tp_size}: {ranks}, since a rank is a whole CPU and more of them on one host only cost "
            f"time ({RANKS_PER_HOST} forces them)"
        )


def plan_topology(args: EngineArgs, device: str, environ: Mapping[str, str], local_rank: int = 0) -> Topology:
    """`device`: "cpu" or "cuda". Raises `ModelError` for a variable that is no number."""
    per_node = args.tp_size // args.nnodes
    if device == "cpu":
        per_node = min(per_node, _forced(environ))
    return Topology(args.nnodes, args.node_rank, per_node, local_rank, args.tp_size)


def _forced(environ: Mapping[str, str]) -> int:
    text = environ.get(RANKS_PER_HOST, "1")
    if not text.isdigit() or int(text) < 1:
        raise ModelError(f"{RANKS_PER_HOST} must be a whole number of at least 1, got {text!r}.")
    return int(text)
