"""A store in memory with faults on demand: also the example of a third party's class (`--hicache-storage-backend dynamic`)."""

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from baton.kvcache.stores.base import Object, StoreConfig, StoreError


class DictStore:
    """`shared` makes several stores one, as workers of one deployment see it. `before` runs inside each call with its name and may
    block or raise."""

    def __init__(self, config: StoreConfig, shared: dict[str, bytes] | None = None) -> None:
        if unknown := set(config.extra) - {"greeting"}:
            raise StoreError(f"the dict store knows no {sorted(unknown)}")
        self.objects: dict[str, bytes] = {} if shared is None else shared
        self.calls: list[str] = []
        self.registered: list[NDArray[np.uint8]] = []
        self.before: Callable[[str], None] = lambda _: None
        self.is_full = False
        self.closed = threading.Event()

    def register(self, memory: NDArray[np.uint8]) -> None:
        self.registered.append(memory)

    def batch_exists(self, names: Sequence[str]) -> int:
        self._enter("exists")
        return next((i for i, name in enumerate(names) if name not in self.objects), len(names))

    def batch_get(self, names: Sequence[str], targets: Sequence[Object]) -> list[bool]:
        self._enter("get")
        return [self._get(name, target) for name, target in zip(names, targets, strict=True)]

    def batch_put(self, names: Sequence[str], objects: Sequence[Object]) -> list[bool]:
        self._enter("put")
        if self.is_full:
            return [name in self.objects for name in names]
        for name, data in zip(names, objects, strict=True):
            self.objects.setdefault(name, data.tobytes())
        return [True] * len(names)

    def discard(self, names: Sequence[str]) -> None:
        self._enter("discard")
        for name in names:
            self.objects.pop(name, None)

    def clear(self) -> None:
        self._enter("clear")
        self.objects.clear()

    def stats(self) -> Mapping[str, float]:
        return {"num_objects": len(self.objects)}

    def close(self) -> None:
        self.closed.set()

    def _get(self, name: str, target: Object) -> bool:
        data = self.objects.get(name)
        if data is None or len(data) != len(target):
            return False
        target[:] = np.frombuffer(data, dtype=np.uint8)
        return True

    def _enter(self, what: str) -> None:
        self.calls.append(what)
        self.before(what)
