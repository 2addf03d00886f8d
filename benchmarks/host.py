"""The machine under a benchmark: what it is, what a process uses, whether it is quiet. Imports no torch."""

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """For reports: processor, versions, load, commit."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": next((line.split(":")[1].strip() for line in lines if "model name" in line), ""),
        "cores": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "commit": commit.stdout.strip(),
    }


def family(pid: int) -> set[int]:
    """A process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    members = {pid}
    while more := {child for child, parent in parents.items() if parent in members} - members:
        members |= more
    return members


def memory_mb(pid: int) -> float:
    """Resident memory (MB) of a process and its descendants now; shared pages count once for each process."""
    total = 0
    for member in family(pid):
        try:
            total += int(Path(f"/proc/{member}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total / 1e6


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its living descendants so far."""
    ticks = 0
    for member in family(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def wait_quiet(limit_s: float = 10.0, share: float = 0.05) -> float:
    """Wait until the cores have been idle for a third of a second: what the last server still does (spinning threads,
    writing logs) must not be charged to the next. Returns the busy share that was left."""
    deadline, busy = time.monotonic() + limit_s, 1.0
    while time.monotonic() < deadline:
        before = _cpu_ticks()
        time.sleep(0.33)
        after = _cpu_ticks()
        busy = 1 - (after[1] - before[1]) / max(1, after[0] - before[0])
        if busy < share:
            break
    return busy


def _cpu_ticks() -> tuple[int, int]:
    """(all, idle) clock ticks of all cores since boot."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields), fields[3] + fields[4]
