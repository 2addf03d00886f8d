"""The interface of a store, in the spirit of SGLang's HiCacheStorage: batches of whole objects, consecutive existence.

A store moves bytes under names and promises nothing about them: `seal` checks every object that comes back, so a store may
lose, evict or damage objects, and a wrong one is a miss. Calls block; they come from the worker's reader thread and its writer
thread, one call at a time each. Any exception is taken as "the store is not well": the worker counts it and its breaker
decides. A store must not print, exit, or install signal handlers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from baton.protocol.errors import BatonError

Object = NDArray[np.uint8]
"""uint8 [object_bytes], C-contiguous; lies in registered memory."""


class StoreError(BatonError):
    """The store cannot be opened, or does not answer as it should. The message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """What a back end is opened with."""

    object_bytes: int
    """Every object has this size: a page (or a head group of it) and its seal."""
    rank: int = 0
    num_ranks: int = 1
    """Ranks of this worker that open the store beside this one."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """--hicache-storage-backend-extra-config, less the keys that the worker itself understands. A key that the back end does not
    know is a `StoreError` that names it."""


class Store(Protocol):
    """Opened by `BackEnd(config: StoreConfig)`; raises `StoreError` when that cannot work. A store service that is not up (yet) is no
    such error: calls fail until it is there."""

    def register(self, memory: NDArray[np.uint8]) -> None:
        """Objects will lie in this memory (uint8, contiguous, lives until `close`): a back end with zero copy pins it."""

    def batch_exists(self, names: Sequence[str]) -> int:
        """How many of `names`, from the first on, are there without a gap."""

    def batch_get(self, names: Sequence[str], targets: Sequence[Object]) -> list[bool]:
        """Fill each target; False where the object is absent, of another size, or could not be read."""

    def batch_put(self, names: Sequence[str], objects: Sequence[Object]) -> list[bool]:
        """True where the object is in the store now (also if it had been). The bytes may be reused after the return."""

    def clear(self) -> None:
        """Forget every object that this store holds, of all workers."""

    def stats(self) -> Mapping[str, float]:
        """Numbers for metrics, by name (e.g. "used_bytes", "capacity_bytes", "num_objects", "evicted_objects"). Cheap, never blocks."""

    def close(self) -> None: ...


@runtime_checkable
class DiscardingStore(Store, Protocol):
    """A store that can also remove single objects. Without that, a damaged object is a miss until the store evicts it, since
    `batch_put` leaves what is there."""

    def discard(self, names: Sequence[str]) -> None:
        """These came back damaged: forget them, so that good ones can be put."""
