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

from baton.cluster.home import HOST, ClusterHome, HomeError, Settings
from baton.cluster.logfmt import configure_logging
from baton.cluster.publish import Publisher
from baton.cluster.services.agent import ServiceAgent
from baton.cluster_client import Client

logger = logging.getLogger(__name__)
ROLE = "dataplane"
CHECK_S = 1.0
START_CHECK_S = 0.05
STOP_TIMEOUT_S = 10.0


async def keep(home: ClusterHome, ready: asyncio.Event) -> None:
    """In the daemon: have a data plane at all times, the one that runs or a new one. Until cancelled; it runs on then.

    `ready` is set once its listeners are as the Services want them.
    """
    process: subprocess.Popen[bytes] | None = None
    while True:
        if process is not None and process.poll() is not None:
            logger.warning("the data plane ended; starting another", extra={"code": process.returncode})
            process = None
        if process is None and not home.is_held(ROLE):
            process = _spawn(home)
        if not ready.is_set() and home.is_held(ROLE) and _text(_ready_file(home)) == _text(_pid_file(home)):
            ready.set()
        await asyncio.sleep(CHECK_S if ready.is_set() else START_CHECK_S)


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


def _ready_file(home: ClusterHome) -> Path:
    """Holds the pid of the data plane that is ready."""
    return home.directory / "dataplane.ready"


def _text(file: Path) -> str | None:
    return file.read_text() if file.exists() else None


async def run(home: ClusterHome) -> None:
    """Until a signal, or until the cluster has another address (the daemon then starts another data plane)."""
    stop_asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop_asked.set)
    settings = Settings.read(home)
    config = settings.client_config(f"http://{HOST}:{settings.api_port}")
    async with (
        Client(config, user_agent="baton-dataplane", field_manager="baton") as client,
        asyncio.TaskGroup() as group,
    ):
        publisher = Publisher(client)
        parts = [
            group.create_task(ServiceAgent(client).run(), name="service proxy"),
            group.create_task(publisher.run(), name="publisher"),
            group.create_task(_tell_ready(home, publisher), name="ready"),
        ]
        ends = [
            group.create_task(stop_asked.wait(), name="stop"),
            group.create_task(_address_changes(home, settings), name="address"),
        ]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for task in (*parts, *ends):
            task.cancel()
    logger.info("stopped")


async def _tell_ready(home: ClusterHome, publisher: Publisher) -> None:
    await publisher.ready.wait()
    _ready_file(home).write_text(str(os.getpid()))


async def _address_changes(home: ClusterHome, settings: Settings) -> None:
    """Return when the cluster has another address, or is gone with its directory."""
    while home.settings_file.exists() and Settings.read(home).api_port == settings.api_port:  # noqa: ASYNC110  (a file has no event)
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
