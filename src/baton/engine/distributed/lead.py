"""What the leading rank does about its group when it starts: plan it, open its address, start the other ranks of its own host."""

import logging
import os
from collections.abc import Sequence

from baton.engine.args import EngineArgs, split_address
from baton.engine.distributed.group import LeaderGroup
from baton.engine.distributed.processes import end_process, start_siblings
from baton.engine.distributed.topology import plan_topology
from baton.engine.load import choose_device
from baton.engine.server.channel import ChannelAddress, RankChannel
from baton.protocol.rank import Fatal

logger = logging.getLogger(__name__)


def lead_group(args: EngineArgs, flags: Sequence[str], channel: ChannelAddress) -> LeaderGroup | None:
    """The group that this rank leads; None when it is the only rank. Raises `BatonError`.

    `channel`: where the HTTP process hears why the group broke.
    """
    topology = plan_topology(args, choose_device(args).type, os.environ)
    if topology.note is not None:
        logger.warning("%s", topology.note)
    if topology.num_ranks == 1:
        return None

    def on_lost(reason: str) -> None:
        RankChannel.last_words(channel, Fatal(reason))
        end_process(reason)

    address = ("127.0.0.1", 0) if args.dist_init_addr is None else split_address(args.dist_init_addr)
    group = LeaderGroup(topology, address, args.dist_timeout_s, on_lost)
    host, port = group.address
    start_siblings(topology, [*flags, "--dist-init-addr", f"{host}:{port}"])
    return group
