"""How much memory this process may still take: what pools are sized by and host tiers are refused by.

What the page cache holds counts as free, since the system gives it back; a container's own limit (cgroup v2) counts too.
"""

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_memory_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int:
    """Bytes; never below 0."""
    free = _field(meminfo, "MemAvailable:") * 1024 or os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _number(cgroup / "memory.max")
    if limit is None:
        return free
    used = (_number(cgroup / "memory.current") or 0) - _field(cgroup / "memory.stat", "inactive_file")
    return max(0, min(free, limit - used))


def _number(path: Path) -> int | None:
    """None: the file is not there, or says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _field(path: Path, name: str) -> int:
    """The number behind `name` at the start of a line; 0 if there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
