"""Rank processes: starting the others of this host, and ending this one when the group is broken."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from baton.engine.distributed.topology import Topology

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """The kernel kills this process when its parent is gone, however that ended."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the parent process ended while the rank was starting")


def start_siblings(topology: Topology, flags: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """Start the other ranks of this host, as children of its first."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", "baton.engine.distributed.follower", str(os.getpid()), str(local), "-", *flags],
            stdin=subprocess.DEVNULL,
        )
        for local in range(1, topology.ranks_per_node)
    ]


def end_process(reason: str) -> None:
    """End at once, from any thread: the main one may be in a collective that never ends."""
    logger.error("the group of ranks is broken: %s", reason)
    logging.shutdown()
    os._exit(1)
