"""A private directory that lasts as long as its owner: whoever makes the next one sweeps away those whose owner was killed.

The owner holds a lock on a file in it. The kernel lets go of that lock however the owner ends, and everybody under the same kernel sees it,
whatever their process ids are (containers that share a /tmp).
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

PREFIX = "baton-"
_OWNER = "owner"


@dataclass(frozen=True, slots=True)
class OwnedDirectory:
    """Mode 0700. Whoever called `create` calls `remove`."""

    path: str
    _lock: int

    @classmethod
    def create(cls, max_path_bytes: int) -> "OwnedDirectory":
        """In the temporary directory, or in /tmp where that has too long a path."""
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        if len(os.fsencode(path)) > max_path_bytes:
            path.rmdir()
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
        # Locked before it has its name: what is called so and can be locked has no owner.
        lock = os.open(path / "new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        (path / "new").rename(path / _OWNER)
        _sweep(path.parent)
        return cls(str(path), lock)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _sweep(parent: Path) -> None:
    """Remove the directories of this user whose owner is gone."""
    with contextlib.suppress(OSError):
        for entry in list(parent.glob(f"{PREFIX}*")):
            with contextlib.suppress(OSError):  # of somebody else, locked, or swept by another worker meanwhile
                status = entry.lstat()
                if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077:
                    _remove_if_left(entry)


def _remove_if_left(directory: Path) -> None:
    lock = os.open(directory / _OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(lock)
