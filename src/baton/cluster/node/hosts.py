"""The hosts files of slots: live, since running containers have them mounted.

A file is changed in place (same inode), with one write and one cut, and only when its text differs. What the lines are
is `baton.cluster.services.names`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from baton.cluster.node.environment import Object
from baton.cluster.node.objects import Objects
from baton.cluster.node.slots import Slot
from baton.cluster.services import names

SETTLE_S = 0.02
"""Changes come in bursts (a pod becomes ready, its endpoints follow): one rewrite answers them all."""


class HostsFiles:
    """All hosts files of the agent. `slots` gives the pods that have one."""

    def __init__(self, objects: Objects, slots: Callable[[], list[tuple[Object, Slot]]]) -> None:
        self._objects, self._slots = objects, slots
        self._written: dict[Path, str] = {}
        self._changed = asyncio.Event()
        self._records: dict[tuple[str, str], list[str]] | None = None
        for cache in (objects.pods, objects.services):
            cache.subscribe(lambda _: self.invalidate())

    def invalidate(self) -> None:
        self._records = None
        self._changed.set()

    def write(self, pod: Object, slot: Slot) -> None:
        """Bring one file up to date."""
        if self._records is None:
            self._records = names.records(self._objects.services.list(), self._objects.pods.list())
        text = names.header(pod, slot.address) + names.lines(self._records, slot.namespace)
        if self._written.get(slot.hosts) == text and slot.hosts.exists():
            return
        replace_in_place(slot.hosts, text)
        self._written[slot.hosts] = text

    async def run(self) -> None:
        """Follow the changes until cancelled."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(SETTLE_S)
            self._changed.clear()
            current = self._slots()
            for pod, slot in current:
                with contextlib.suppress(FileNotFoundError):  # the pod has ended meanwhile
                    self.write(pod, slot)
            alive = {slot.hosts for _, slot in current}
            self._written = {path: text for path, text in self._written.items() if path in alive}


def replace_in_place(path: Path, text: str) -> None:
    """New content, same inode."""
    data = text.encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)
