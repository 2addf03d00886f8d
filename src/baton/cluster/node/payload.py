"""Writing the files of a configMap, secret or projected volume so that readers see all of one version or all of another.

The layout is a kubelet's: files live in a dated directory, `..data` is a symlink to it, each top-level name is a
symlink through `..data`. An update writes a new directory and renames one symlink.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

Payload = Mapping[str, tuple[bytes, int]]
"""Relative path -> content and file mode."""


def write(directory: Path, payload: Payload) -> bool:
    """Make `directory` show exactly `payload`; whether anything changed. Raises ValueError for a path that leaves it."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in payload:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or path.parts[0].startswith(".."):
            raise ValueError(f"path {name!r} must be relative and stay in the volume")
    if _is_current(directory, payload):
        return False
    fresh = Path(tempfile.mkdtemp(prefix="..", dir=directory))
    for name, (content, mode) in payload.items():
        target = fresh / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(mode)
    fresh.chmod(0o755)
    data = directory / "..data"
    old = data.resolve() if data.is_symlink() else None
    swap = directory / "..data_tmp"
    swap.unlink(missing_ok=True)
    swap.symlink_to(fresh.name)
    swap.rename(data)
    _link_names(directory, {PurePosixPath(name).parts[0] for name in payload})
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return True


def _is_current(directory: Path, payload: Payload) -> bool:
    data = directory / "..data"
    if not data.is_dir():
        return False
    present = {str(path.relative_to(data)): path for path in data.rglob("*") if path.is_file()}
    if set(present) != {str(PurePosixPath(name)) for name in payload}:
        return False
    return all(
        present[str(PurePosixPath(name))].read_bytes() == content
        and present[str(PurePosixPath(name))].stat().st_mode & 0o777 == mode
        for name, (content, mode) in payload.items()
    )


def _link_names(directory: Path, wanted: set[str]) -> None:
    for name in wanted:
        link = directory / name
        if not link.is_symlink():
            link.symlink_to(os.path.join("..data", name))  # noqa: PTH118  (pathlib would normalise nothing, but reads worse)
    for entry in directory.iterdir():
        if entry.is_symlink() and entry.name not in wanted and not entry.name.startswith(".."):
            entry.unlink()
