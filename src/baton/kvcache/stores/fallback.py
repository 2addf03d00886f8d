"""Two stores as one: what the first does not have, or cannot give now, the second gives.

For a shared store that may lose objects (Mooncake) above one that does not (files of this host): every object is put into
both, read from the first that has it. Asked for by `"fallback": {"backend": "file", ...}` in the extra config; the other keys of
that object are the second back end's own. Broken is only the whole: one of the two may fail for as long as it likes.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from baton.kvcache.stores.base import DiscardingStore, Object, Store, StoreConfig, StoreError

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

RETRY_S = 5.0
"""After a failure a store is left alone for so long: its time-outs must not be paid at every call."""


@dataclass(slots=True)
class _Member:
    name: str
    store: Store
    retry_at: float = 0.0
    """Of the clock; written by the reader's and the writer's thread, either's word is good."""
    num_failures: int = 0
    """Calls. Of two that fail at once one may go uncounted."""
    num_reads: int = 0
    """Objects that were read here."""


class FallbackStore:
    """A `Store` over two, which it owns."""

    def __init__(self, first: Store, second: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._members = (_Member("first", first), _Member("fallback", second))
        self._clock = clock

    def register(self, memory: NDArray[np.uint8]) -> None:
        for member in self._members:
            member.store.register(memory)

    def batch_exists(self, names: Sequence[str]) -> int:
        """A run of objects may change over from one store to the other, once in each direction for every gap."""
        count, last, answered = 0, -1, 0
        while count != last and count < len(names):
            last = count
            for member in self._members:
                found = self._try(member, partial(_exists, names[count:]))
                if found is not None:
                    count += found
                    answered += 1
        self._check(answered, len(names))
        return count

    def batch_get(self, names: Sequence[str], targets: Sequence[Object]) -> list[bool]:
        done = [False] * len(names)
        answered = 0
        for member in self._members:
            missing = [index for index, ok in enumerate(done) if not ok]
            if not missing:
                break
            wanted = [names[index] for index in missing]
            found = self._try(member, partial(_get, wanted, [targets[index] for index in missing]))
            if found is not None:
                answered += 1
                member.num_reads += sum(found)
                for index, ok in zip(missing, found, strict=True):
                    done[index] = ok
        self._check(answered, len(names))
        return done

    def batch_put(self, names: Sequence[str], objects: Sequence[Object]) -> list[bool]:
        answers = [
            found
            for member in self._members
            if (found := self._try(member, lambda one: one.batch_put(names, objects))) is not None
        ]
        self._check(len(answers), len(names))
        return [any(found) for found in zip(*answers, strict=True)]

    def discard(self, names: Sequence[str]) -> None:
        """From both: which of them gave the damaged bytes is not remembered."""
        for member in self._members:
            if isinstance(member.store, DiscardingStore):
                self._try(member, partial(_discard, names))

    def clear(self) -> None:
        """Both, whatever state they are in: an object that stayed in one would come back."""
        for member in self._members:
            member.store.clear()

    def stats(self) -> Mapping[str, float]:
        """The first store's numbers by their names, the second's as fallback_*; of each also failed calls and objects read."""
        found: dict[str, float] = {}
        for prefix, member in zip(("", "fallback_"), self._members, strict=True):
            own = {**member.store.stats(), "failed_calls": member.num_failures, "objects_read": member.num_reads}
            found |= {prefix + name: value for name, value in own.items()}
        return found

    def close(self) -> None:
        for member in self._members:
            member.store.close()

    def _try(self, member: _Member, call: Callable[[Store], _T]) -> _T | None:
        """The answer, or None from a store that fails or failed a moment ago."""
        if self._clock() < member.retry_at:
            return None
        try:
            return call(member.store)
        except (
            Exception
        ) as error:  # any exception of a store means "not well" (`base`); both failing is raised by `_check`
            member.num_failures += 1
            member.retry_at = self._clock() + RETRY_S
            logger.warning("%s store: %s; the other one serves", member.name, error)
            return None

    def _check(self, answered: int, asked: int) -> None:
        if asked and not answered:
            raise StoreError("neither the store nor its fallback answers")


def _exists(names: Sequence[str], store: Store) -> int:
    return store.batch_exists(names)


def _get(names: Sequence[str], targets: Sequence[Object], store: Store) -> list[bool]:
    return store.batch_get(names, targets)


def _discard(names: Sequence[str], store: Store) -> None:
    assert isinstance(store, DiscardingStore)
    store.discard(names)


def open_with_fallback(backend: str, config: StoreConfig, open_one: Callable[[str, StoreConfig], Store]) -> Store:
    """`backend`, over the one that config.extra["fallback"] names. Raises `StoreError`."""
    second = config.extra["fallback"]
    if not isinstance(second, dict) or not isinstance(second.get("backend"), str):
        raise StoreError('fallback wants an object such as {"backend": "file", "path": "/kv"}')
    if "fallback" in second:
        raise StoreError("fallback: one is enough")
    rest = {key: value for key, value in config.extra.items() if key != "fallback"}
    own = {key: value for key, value in second.items() if key != "backend"}
    first = open_one(backend, replace(config, extra=rest))
    try:
        return FallbackStore(first, open_one(second["backend"], replace(config, extra=own)))
    except StoreError:
        first.close()
        raise
