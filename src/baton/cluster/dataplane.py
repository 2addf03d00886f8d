"""The listeners of Services, in a process of their own: connections outlive a daemon that is killed or replaced.

`python -m baton.cluster.dataplane --home DIR`, started by the daemon (`ensure`), which also replaces one that dies. It
holds the proxies of cluster addresses and the ports published on 127.0.0.1, and learns what they should be from the API
server like everybody else; while that is away, what it knows stays. It shares no event loop with the API server, so a
busy control plane slows no token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import uvloop

from baton.cluster.home import ClusterHome, DaemonRecord, HomeError
from baton.cluster.logfmt import configure_logging
from baton.cluster.publish import Publisher
from baton.cluster.services.agent import ServiceAgent
from baton.cluster_client import Client

logger = logging.getLogger(__name__)
ROLE = "dataplane"
CHECK_S = 1.0
STOP_TIMEOUT_S = 10.0


async def keep(home: ClusterHome) -> None:
    """In the daemon: have a data plane at all times, the one that runs or a new one. Until cancelled; it runs on then."""
    process: subprocess.Popen[bytes] | None = None
    while True:
        if process is not None and process.poll() is not None:
            logger.warning("the data plane ended; starting another", extra={"code": process.returncode})
            process = None
        if process is None and not home.is_held(ROLE):
            process = _spawn(home)
        await asyncio.sleep(CHECK_S)


def stop(home: ClusterHome) -> int | None:
    """SIGTERM to the data plane that runs; its pid, None when there is none. Does not wait."""
    if not home.is_held(ROLE):
        return None
    try:
        pid = int(_pid_file(home).read_text())
        os.kill(pid, signal.SIGTERM)
    except (OSError, ValueError):
        return None
    return pid


async def wait_stopped(home: ClusterHome) -> None:
    """After `stop`, until it has ended; SIGKILL when it takes too long."""
    for _ in range(int(STOP_TIMEOUT_S / 0.02)):
        if not home.is_held(ROLE):
            return
        await asyncio.sleep(0.02)
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(_pid_file(home).read_text()), signal.SIGKILL)


def _spawn(home: ClusterHome) -> subprocess.Popen[bytes]:
    with (home.directory / "dataplane.log").open("ab") as log:
        command = [sys.executable, "-m", "baton.cluster.dataplane", "--home", str(home.root)]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )


def _pid_file(home: ClusterHome) -> Path:
    return home.directory / "dataplane.pid"


async def run(home: ClusterHome) -> None:
    """Until a signal, or until the cluster has another address (the daemon then starts another data plane)."""
    stop_asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop_asked.set)
    record = DaemonRecord.read(home)
    if record is None:
        return  # the daemon has died since; the next one starts another data plane
    async with (
        Client(record.client_config(home), user_agent="baton-dataplane", field_manager="baton") as client,
        asyncio.TaskGroup() as group,
    ):
        parts = [
            group.create_task(ServiceAgent(client).run(), name="service proxy"),
            group.create_task(Publisher(client).run(), name="publisher"),
            group.create_task(_address_changes(home, record.server), name="address"),
        ]
        asked = group.create_task(stop_asked.wait(), name="stop")
        await asyncio.wait((asked, parts[-1]), return_when=asyncio.FIRST_COMPLETED)
        for part in (*parts, asked):
            part.cancel()
    logger.info("stopped")


async def _address_changes(home: ClusterHome, server: str) -> None:
    """Return when the cluster has another address, or is gone with its directory."""
    while home.settings_file.exists():
        record = DaemonRecord.read(home)
        if record is not None and record.server != server:
            return
        await asyncio.sleep(CHECK_S)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m baton.cluster.dataplane", description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    home = ClusterHome.find(parser.parse_args(argv).home)
    configure_logging()
    try:
        with home.held(ROLE):
            _pid_file(home).write_text(str(os.getpid()))
            uvloop.run(run(home))
    except HomeError as error:
        logger.error("not needed", extra={"error": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
