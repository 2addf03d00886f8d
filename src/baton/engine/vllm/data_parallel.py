"""Which of vLLM's data-parallel engines one server runs: all of them, those of its node, or one. Plain arithmetic on flags.

vLLM's one API server may have engines on other nodes; here a server has the engines of its own host, so what spreads over nodes is served by
vLLM's other two ways: a server on every node (hybrid) or for every engine (external), and a balancer in front.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LocalEngines:
    count: int
    first_rank: int
    """The number of the first one among all engines of the deployment."""


def local_engines(
    *,
    size: int,
    size_local: int | None,
    rank: int | None,
    start_rank: int | None,
    hybrid_lb: bool,
    external_lb: bool,
    headless: bool,
) -> LocalEngines:
    """Named as vLLM's flags, without `--data-parallel-`. Raises ValueError with the flag for what cannot be."""
    if headless and size > 1:
        raise ValueError(
            "--headless with --data-parallel-size: a node without HTTP would serve another node's API server; give "
            "--data-parallel-hybrid-lb on every node, and put a router in front"
        )
    if external_lb and rank is None:
        raise ValueError("--data-parallel-external-lb needs --data-parallel-rank, this engine's number")
    if rank is not None:
        if hybrid_lb:
            raise ValueError("--data-parallel-rank is for one engine, --data-parallel-hybrid-lb for those of a node")
        if rank >= size:
            raise ValueError(f"--data-parallel-rank must be below --data-parallel-size ({size}), got {rank}")
        if size_local not in (None, 1):
            raise ValueError(f"--data-parallel-size-local {size_local} with --data-parallel-rank, which is one engine")
        return LocalEngines(1, rank)
    if not hybrid_lb:
        if start_rank is not None:
            raise ValueError("--data-parallel-start-rank needs --data-parallel-hybrid-lb, a server on every node")
        if size_local not in (None, size):
            raise ValueError(
                f"--data-parallel-size-local {size_local} of --data-parallel-size {size}: engines of other nodes are not served from "
                "here; give --data-parallel-hybrid-lb on every node, and put a router in front"
            )
        return LocalEngines(size, 0)
    if size_local is None:
        raise ValueError("--data-parallel-hybrid-lb needs --data-parallel-size-local, the engines of this node")
    first = start_rank or 0
    if first + size_local > size:
        raise ValueError(
            f"--data-parallel-start-rank {first} and --data-parallel-size-local {size_local} make more engines than "
            f"--data-parallel-size {size}"
        )
    return LocalEngines(size_local, first)
