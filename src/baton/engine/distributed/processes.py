"""Rank processes: starting the others of this host, ending the first when its worker is told to, and this one with its group."""

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from baton.engine.distributed.topology import Topology

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
STOP_SIGNAL = signal.SIGUSR1
"""From a worker to its first rank. Not SIGTERM: service managers send that to all processes at once, and the worker drains first."""
FAREWELL_S = 2.0
STOP_TIMEOUT_S = 10.0


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


def stop_ranks(ranks: Sequence[subprocess.Popen[Any]], *, on_purpose: bool) -> None:
    """End first ranks and with them the others. On purpose: they have a moment to tell ranks of other nodes that it is no failure."""
    if on_purpose:
        for rank in ranks:
            rank.send_signal(STOP_SIGNAL)
        for rank in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(FAREWELL_S)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait(STOP_TIMEOUT_S)


def end_when_told(farewell: Callable[[], None]) -> None:
    """At STOP_SIGNAL run `farewell` in a thread and end this process with 0, whatever the main thread is in."""
    told, tell = socket.socketpair()
    tell.setblocking(False)
    signal.signal(STOP_SIGNAL, lambda number, frame: None)
    signal.set_wakeup_fd(tell.detach())  # written to by the handler in C, which does not wait for the main thread

    def wait() -> None:
        told.recv(1)
        farewell()
        os._exit(0)

    threading.Thread(target=wait, name="stop", daemon=True).start()


def end_process(reason: str) -> None:
    """End at once, from any thread: the main one may be in a collective that never ends."""
    logger.error("the group of ranks is broken: %s", reason)
    logging.shutdown()
    os._exit(1)


def leave(words: str) -> None:
    """End at once, without a failure."""
    logger.info("the group ends: %s", words)
    logging.shutdown()
    os._exit(0)
