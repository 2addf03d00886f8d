"""One running attempt of a container, as the agent sees it: a directory that its shim writes, and a pidfd.

`Supervised.start` spawns the shim, `Supervised.adopt` takes over one that an earlier agent started. Either way the same
object tells when the attempt has ended and how. Identity of a process is its pid and its start time, never the pid alone.
Restart decisions are `container`'s, what is run is `runtime`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from baton.cluster.node import shim

UNKNOWN_CODE = 137
LOG_MAX_BYTES = 10 * 1024 * 1024
LOG_KEEP = 2


@dataclass(frozen=True, slots=True)
class Launch:
    """What a shim is to run. `cwd` is the directory of the started program (for bwrap: outside the container).

    `bwrap_args` (None in plain mode) are the options that bwrap reads from a descriptor, so that `ps` stays readable.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    bwrap_args: tuple[str, ...] | None = None
    error: str | None = None
    """Why it cannot run, where that is known beforehand; no process is started then."""

    def with_mark(self, mark: str) -> Launch:
        return replace(self, env={**self.env, shim.MARKER: mark})


def not_found(program: str) -> str:
    return f'exec: "{program}": executable file not found in $PATH'


@dataclass(frozen=True, slots=True)
class Exit:
    """How an attempt ended. `code` as a shell sees it (128 + signal); `error`: it never ran; times in epoch seconds."""

    code: int
    signal: int
    started_at: float
    finished_at: float
    error: str | None = None
    is_lost: bool = False
    """The supervisor is gone without a word: nobody knows the code."""

    @property
    def reason(self) -> str:
        if self.is_lost:
            return "ContainerStatusUnknown"
        if self.error is not None:
            return "StartError"
        return "Completed" if self.code == 0 else "Error"


class StartError(Exception):
    """The shim itself could not be started."""


class Supervised:
    """One attempt. `exit` is None while it runs; `ended` is set when it is not."""

    def __init__(self, directory: Path, mark: str) -> None:
        self.directory = directory
        self.mark = mark
        self.exit: Exit | None = None
        self.ended = asyncio.Event()
        self.on_end: Callable[[], None] | None = None
        """Called once, in the loop, when the attempt has ended."""
        self._state: dict[str, Any] = {}
        self._pidfd = -1

    @classmethod
    async def start(cls, directory: Path, launch: Launch, log: Path, mark: str) -> Supervised:
        """Run `launch` under a shim in `directory` (made here). Returns when the program runs or has failed to start."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        marked = launch.with_mark(mark)
        content: dict[str, object] = {
            "argv": list(marked.argv), "env": dict(marked.env), "cwd": marked.cwd,
            "bwrap_args": None if marked.bwrap_args is None else list(marked.bwrap_args),
            "log": str(log), "log_max_bytes": LOG_MAX_BYTES, "log_keep": LOG_KEEP,
        }  # fmt: skip
        await asyncio.to_thread(shim.write_json, str(directory / "launch.json"), content)
        self = cls(directory, mark)
        if launch.error is not None:
            moment = time.time()
            result = {"code": 128, "signal": 0, "error": launch.error, "started_at": moment, "finished_at": moment}
            shim.write_json(str(directory / "exit.json"), result)
            self._settle()
            return self
        pid = await asyncio.to_thread(_spawn, directory)
        # The shim is a child of this process: it stays a zombie until waited for, so the pid cannot be taken over.
        self._watch(pid)
        await self._wait_for_start()
        return self

    @classmethod
    def adopt(cls, directory: Path, mark: str) -> Supervised:
        """Take over what an earlier agent started: still running, ended meanwhile, or lost with its shim."""
        self = cls(directory, mark)
        self._state = _read(directory / "state.json")
        pid = int(self._state.get("shim_pid") or 0)
        with contextlib.suppress(ProcessLookupError):
            if pid and not (directory / "exit.json").exists():
                self._watch(pid)
                if shim.start_time(pid) != self._state.get("shim_start"):
                    self._unwatch()
        if self._pidfd < 0:
            self._settle()
        return self

    @property
    def started_at(self) -> float:
        return float(self._state.get("started_at") or 0.0)

    @property
    def pid(self) -> int | None:
        """The container's main process on this machine; None before it ran."""
        pid = self._state.get("pid")
        return int(pid) if pid else None

    def stop(self, grace_s: float) -> None:
        """SIGTERM now, SIGKILL after `grace_s`. A later call can only shorten the grace. Does not wait."""
        if self.exit is not None:
            return
        shim.write_json(str(self.directory / "stop.json"), {"grace_s": max(0.0, grace_s)})
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def release(self) -> None:
        """Stop watching; the attempt goes on without us."""
        self._unwatch()

    async def _wait_for_start(self) -> None:
        state, result = self.directory / "state.json", self.directory / "exit.json"
        while not state.exists() and not result.exists() and not self.ended.is_set():  # noqa: ASYNC110
            # A file of our own child is awaited, a few milliseconds long; inotify would cost a dependency.
            await asyncio.sleep(0.003)
        self._state = _read(state)
        if result.exists() and not self._state:
            await self.ended.wait()

    def _watch(self, pid: int) -> None:
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_shim_end)

    def _unwatch(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _on_shim_end(self) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        self._unwatch()
        self._settle()

    def _settle(self) -> None:
        """The shim is gone: take its last word, or clean up after it."""
        self._state = _read(self.directory / "state.json") or self._state
        found = _read(self.directory / "exit.json")
        if found:
            self.exit = Exit(
                int(found["code"]), int(found["signal"]), float(found["started_at"]), float(found["finished_at"]),
                found.get("error"),
            )  # fmt: skip
        else:
            clear_orphans(self.directory, self.mark)
            self.exit = Exit(UNKNOWN_CODE, 0, self.started_at, _mtime(self.directory), is_lost=True)
        self.ended.set()
        if self.on_end is not None:
            self.on_end()

    def refresh(self) -> None:
        """Read the shim's state again (the pid inside bubblewrap comes a moment after the start)."""
        self._state = _read(self.directory / "state.json") or self._state


def read_launch(directory: Path) -> Launch | None:
    """What the attempt in `directory` was started with; None when that is not known any more."""
    found = _read(directory / "launch.json")
    if not found:
        return None
    args = found.get("bwrap_args")
    return Launch(tuple(found["argv"]), found["env"], found["cwd"], None if args is None else tuple(args))


def clear_orphans(directory: Path, mark: str) -> int:
    """SIGKILL what an attempt left without its shim; how many processes there were.

    Numbers are used again, so the recorded session counts only while its recorded process is still the same one; the
    mark counts always.
    """
    state = _read(directory / "state.json")
    pid = int(state.get("pid") or 0)
    is_same = bool(pid) and shim.start_time(pid) == state.get("pid_start")
    return shim.kill_members(int(state.get("session") or -1) if is_same else -1, mark, None)


def _spawn(directory: Path) -> int:
    """Start the shim in a session of its own; its pid."""
    # The base interpreter with -I -S: no site-packages, a third of the memory of a normal start. posix_spawn: quick from
    # a large daemon, and no object that wants to own the child.
    python = str(getattr(sys, "_base_executable", None) or sys.executable)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.posix_spawn(
            python,
            [python, "-I", "-S", shim.__file__, str(directory)],
            {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, str(directory / "shim.log"), flags, 0o600),
            ],
            setsid=True,
        )
    except OSError as error:
        raise StartError(f"{python}: {error.strerror}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
