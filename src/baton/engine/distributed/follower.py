"""The process of a rank that follows: it loads its part of the model and computes what the leader says, until the group ends.

`python -m baton.engine.distributed.follower PARENT_PID LOCAL_RANK CHANNEL_DIRECTORY [worker flags...]`; the directory is "-" for ranks whose
parent is another rank. It never samples and never answers anyone.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from baton.engine.args import EngineArgs, parse_engine_args, split_address
from baton.engine.distributed.control import GroupError
from baton.engine.distributed.group import FollowerGroup
from baton.engine.distributed.messages import (
    AbortRoom,
    EndStep,
    ExpectRoom,
    ReceiveRoom,
    SendRoom,
    Step,
    decode_step,
)
from baton.engine.distributed.pipeline import stage_part
from baton.engine.distributed.processes import die_with_parent, end_process, leave, start_siblings
from baton.engine.distributed.tiers import FollowingTiers, agree_host_pages
from baton.engine.distributed.topology import Topology, plan_topology
from baton.engine.handover import follow_transfer
from baton.engine.load import LoadedModel, choose_device, load_model
from baton.engine.log import name_of_rank, start_logging
from baton.engine.models.shard import local_sizes
from baton.engine.server.channel import ChannelAddress, RankChannel
from baton.engine.tiers import choose_host_pages, open_tiers, page_shape
from baton.protocol.errors import BatonError
from baton.protocol.rank import Fatal, Ready

logger = logging.getLogger("baton.engine.distributed.follower")  # not __name__: the process runs it as __main__


def follow(args: EngineArgs, topology: Topology, channel: RankChannel | None) -> int:
    """Run until the group fails. Returns the exit status, which is never 0: when rank 0 stops on purpose the process ends in here."""
    assert args.dist_init_addr is not None, "args has checked it"
    name = topology.name_of(topology.rank)
    group = FollowerGroup(topology, split_address(args.dist_init_addr), args.dist_timeout_s, end_process, leave)
    reason = "it ended"
    try:
        device = choose_device(args, topology.local_rank)
        model = load_model(args, device, group)
        layers = local_sizes(model.config, model.shard).layers
        logger.info(
            "%s follows device=%s layers=%d-%d load_s=%.2f",
            name, device, layers.start, layers.stop - 1, model.load_weights_s,
        )  # fmt: skip
        if channel is not None:
            channel.send(
                Ready(
                    max_total_num_tokens=model.num_pages * model.page_size, max_req_input_len=0,
                    context_len=model.context_len, vocab_size=model.config.vocab_size, page_size=model.page_size,
                    bootstrap_port=None, load_weights_s=model.load_weights_s, device=str(device),
                    attention_backend=model.runner.attention_backend,
                )
            )  # fmt: skip
            channel.start_beats()
        transfers = follow_transfer(args, model, group)
        tiers = follow_tiers(args, model, group)
        part = stage_part(model)
        while True:
            match group.receive():
                case Step() as step:
                    (model.runner.follow if part is None else part.begin)(*decode_step(step))
                case EndStep():
                    assert part is not None, "the ranks agreed on stages"
                    part.follow_end()
                case ExpectRoom() | SendRoom() | ReceiveRoom() | AbortRoom() as order:
                    assert transfers is not None, "the ranks agreed on a mode"
                    transfers.obey(order)
                case order:
                    assert tiers is not None, "the ranks agreed on tiers"
                    tiers.obey(order)
    except (BatonError, OSError, MemoryError, RuntimeError) as error:
        reason = str(error)
        if isinstance(error, GroupError):
            group.await_last_words()
        return 1
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"  # the leader must hear of it before the traceback ends this process
        raise
    finally:
        logger.error("%s ends: %s", name, reason)
        if channel is not None:
            channel.send(Fatal(reason))
            channel.close()
        group.close(f"{name} failed: {reason}")


def follow_tiers(args: EngineArgs, model: LoadedModel, group: FollowerGroup) -> FollowingTiers | None:
    """What this rank has of the tiers, if it has any: where ranks share their pool, they are rank 0's. Raises `BatonError`."""
    if model.has_whole_pages or not args.has_tiers:
        return None
    shape = page_shape(model)
    host_pages = agree_host_pages(group, choose_host_pages(args, model.num_pages, shape.page_bytes))
    tiers = FollowingTiers(group)
    own, _ = open_tiers(args, model, shape, host_pages, tiers.wake)
    tiers.start(own)
    return tiers


def main(argv: Sequence[str]) -> int:
    parent_pid, local_rank, directory, *flags = argv
    die_with_parent(int(parent_pid))
    # A terminal's Ctrl-C reaches every process; the parent decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    args = parse_engine_args(flags)
    device = choose_device(args, int(local_rank))
    topology = plan_topology(args, device.type, os.environ, int(local_rank))
    start_logging(name_of_rank(args, topology.rank), args.log_level)
    if topology.local_rank == 0:
        start_siblings(topology, flags)
    return follow(args, topology, None if directory == "-" else RankChannel(ChannelAddress(directory)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
