"""How a line of an engine's log begins: time, which process of the worker, logger, level."""

import logging

from baton.engine.args import EngineArgs


def start_logging(name: str, level: str) -> None:
    """`name`: what this process is called in its log lines."""
    logging.basicConfig(level=level.upper(), format=f"%(asctime)s {name} %(name)s %(levelname)s %(message)s")


def name_of_worker(args: EngineArgs) -> str:
    """The process that users see: "worker", "prefill", "decode"; "node1" where rank 0 is elsewhere."""
    if args.node_rank:
        return f"node{args.node_rank}"
    return "worker" if args.disaggregation_mode in ("null", "both") else args.disaggregation_mode


def name_of_rank(args: EngineArgs, rank: int) -> str:
    """ "rank0", or "dp1-rank0" of one engine among several."""
    return f"rank{rank}" if args.dp_size == 1 else f"dp{args.dp_rank}-rank{rank}"
