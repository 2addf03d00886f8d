"""Logs of pods that are gone: what `kubectl logs POD --previous` shows of a pod that was replaced by one of its name.

A controller that makes a group of pods again deletes the very pod that could say why. Owns `ended/NAMESPACE/POD/CONTAINER.log`
in the node's directory, the logs of a pod's last life, and how many are kept. Not here: logs of pods that exist (`logs`).
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from baton.cluster.node import logs

MAX_PODS = 64


class EndedLogs:
    """One directory per pod name; the newest life replaces the one before."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def keep(self, namespace: str, pod: str, directory: Path) -> None:
        """Keep the logs in `directory` (`CONTAINER/ATTEMPT.log` and rotated ones), all attempts in one file. A disk that
        is full loses the logs, not the caller's work."""
        with contextlib.suppress(OSError):
            found = {container.name: _attempts(container) for container in sorted(directory.iterdir())}
            target = self._root / namespace / pod
            shutil.rmtree(target, ignore_errors=True)
            for container, files in found.items():
                if any(path.stat().st_size for path in files):
                    target.mkdir(parents=True, exist_ok=True, mode=0o700)
                    _join(files, target / f"{container}.log")
            self._forget_oldest()

    def path(self, namespace: str, pod: str, container: str) -> Path | None:
        """The log of a container of the pod's last life, if there is one."""
        path = self._root / namespace / pod / f"{container}.log"
        return path if path.is_file() else None

    def _forget_oldest(self) -> None:
        pods = sorted(self._root.glob("*/*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in pods[MAX_PODS:]:
            shutil.rmtree(path, ignore_errors=True)


def _attempts(container: Path) -> list[Path]:
    """The files of all attempts, oldest first."""
    found = [path for path in container.glob("*.log") if path.stem.isdigit()]
    return [file for path in sorted(found, key=lambda path: int(path.stem)) for file in logs.files_of(path)]


def _join(files: list[Path], target: Path) -> None:
    with target.open("wb") as out:
        for path in files:
            with path.open("rb") as source:
                shutil.copyfileobj(source, out)
