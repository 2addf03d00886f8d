"""The daemon from outside: start it detached, wait until its API answers, stop it, forget its state.

Used by commands. Owns no state of its own (`home` does) and does not know what the daemon does (`daemon`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

from baton.cluster import dataplane
from baton.cluster.home import ClusterHome, DaemonRecord, HomeError
from baton.cluster.node.slots import SlotStore
from baton.cluster.shutdown import stop_processes

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 45.0
_POLL_S = 0.05
_LOG_LINES = 5


class LaunchError(Exception):
    """The daemon did not start or stop; the message says why and where its log is."""


def ensure_running(home: ClusterHome, arguments: list[str]) -> tuple[DaemonRecord, bool]:
    """The living daemon, started with `arguments` (of `baton.cluster.daemon`) if there is none; whether it was started."""
    with home.starting():
        if home.is_held():
            return _wait_for_record(home, None), False
        home.record_file.unlink(missing_ok=True)
        with home.log.open("ab") as log:
            command = [sys.executable, "-m", "baton.cluster.daemon", "--home", str(home.root), *arguments]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
            )
        return _wait_for_record(home, process), True


def stop(home: ClusterHome) -> bool:
    """Stop the daemon and every pod; False when none ran. Raises `LaunchError` when it does not end."""
    with home.starting():
        record = DaemonRecord.read(home)
        if record is None:
            if not home.is_held():
                return asyncio.run(_stop_orphans(home))
            record = _wait_for_record(home, None)
        with contextlib.suppress(ProcessLookupError):
            os.kill(record.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while home.is_held():
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"the daemon (pid {record.pid}) did not stop in {STOP_TIMEOUT_S:.0f} s; log: {home.log}"
                )
            time.sleep(_POLL_S)
        home.record_file.unlink(missing_ok=True)
    return True


async def _stop_orphans(home: ClusterHome) -> bool:
    """What a daemon that was killed left running: pods and the data plane."""
    had_dataplane = dataplane.stop(home) is not None
    count = await stop_processes(SlotStore(home.root)) if (home.root / "node").exists() else 0
    await dataplane.wait_stopped(home)
    return had_dataplane or count > 0


def purge(home: ClusterHome) -> None:
    """Forget the cluster: state, logs, what its pods wrote. Raises `HomeError` while it runs. User's files stay."""
    if home.is_held():
        raise HomeError(f"{home.root}: the daemon still runs; stop it first")
    slots = SlotStore(home.root)
    for slot in list(slots.existing()):
        slots.remove(slot)
    for directory in (slots.shm_root, slots.root, home.volumes, home.directory):
        shutil.rmtree(directory, ignore_errors=True)


def log_tail(home: ClusterHome) -> str:
    try:
        lines = home.log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_LOG_LINES:])


def _wait_for_record(home: ClusterHome, process: subprocess.Popen[bytes] | None) -> DaemonRecord:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        record = DaemonRecord.read(home)
        if record is not None:
            return record
        if process is not None and process.poll() is not None:
            raise LaunchError(f"the daemon ended with code {process.returncode}; log: {home.log}\n{log_tail(home)}")
        time.sleep(_POLL_S)
    raise LaunchError(f"the daemon did not answer in {START_TIMEOUT_S:.0f} s; log: {home.log}\n{log_tail(home)}")
