"""Which isolation this machine allows: probed by doing, never by guessing from versions.

`choose` answers once, at start; the note says what the choice costs, for `baton up` to show.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

from baton.cluster.node.bubblewrap import Bubblewrap
from baton.cluster.node.plain import Plain
from baton.cluster.node.runtime import Runtime

Wanted = Literal["auto", "bubblewrap", "plain"]
PROBE_TIMEOUT_S = 10.0
_PLAIN_COSTS = (
    "volume paths are rewritten in command, args and env (a program that builds them itself does not find them); "
    "/tmp, /dev/shm and all files are the machine's; cluster names resolve in Python programs only"
)


class IsolationError(Exception):
    """The isolation that was asked for does not work here; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Isolation:
    runtime: Runtime
    note: str

    @property
    def name(self) -> str:
        return self.runtime.name


def choose(wanted: Wanted = "auto") -> Isolation:
    """The runtime to use. Raises `IsolationError` when bubblewrap was demanded and does not work."""
    if wanted == "plain":
        return Isolation(Plain(), f"plain: {_PLAIN_COSTS}")
    program, problem = probe()
    if problem is None and program is not None:
        return Isolation(
            Bubblewrap(program),
            "bubblewrap: volumes at the manifest's paths, host files read-only; the network and process ids are the machine's",
        )
    if wanted == "bubblewrap":
        raise IsolationError(f"--isolation bubblewrap: {problem}; install bubblewrap, or use --isolation plain")
    return Isolation(Plain(), f"plain, since {problem}: {_PLAIN_COSTS}")


def probe() -> tuple[str | None, str | None]:
    """bwrap's path and what is wrong with it (None: it works)."""
    program = shutil.which("bwrap")
    if program is None:
        return None, "bwrap is not installed"
    command = [
        program, "--die-with-parent", "--unshare-uts", "--hostname", "probe", "--ro-bind", "/", "/",
        "--dev-bind", "/dev", "/dev", "--bind", "/proc", "/proc", "--tmpfs", "/tmp", "--", "true",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return program, f"bwrap does not run here ({error})"
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        return program, f"bwrap does not work here ({reason[-1] if reason else f'exit status {done.returncode}'})"
    return program, None
