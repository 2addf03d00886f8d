"""What a follower's process of `rank_group` runs: nothing heavier than the follower is imported."""

import sys
from collections.abc import Sequence

import torch

from baton.engine.args import engine_args
from baton.engine.distributed.follower import follow
from baton.engine.distributed.topology import Topology


def run_follower(argv: Sequence[str], address: str, rank: int) -> None:
    torch.set_num_threads(1)
    args = engine_args([*argv, "--node-rank", str(rank), "--dist-init-addr", address])
    sys.exit(follow(args, Topology(args.nnodes, rank, 1, 0, args.tp_size, args.pp_size), None))


def run_with_other_pages(argv: Sequence[str], address: str, rank: int) -> None:
    run_follower([*argv, "--page-size", "32"], address, rank)
