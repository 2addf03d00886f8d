"""The rank's hands on the lower tiers: page copies to and from host memory, and the store's worker.

Carries out what the cache decided (`kvcache.tiers`); decides nothing. Built by `assemble`, called by the rank's loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from baton.engine.page_copies import PageCopier
from baton.kvcache.tiers import Copies, StoreAction, StoreEvent

if TYPE_CHECKING:
    from baton.kvcache.stores.worker import StoreWorker


class Tiers:
    def __init__(self, copier: PageCopier, worker: StoreWorker | None) -> None:
        self._copier = copier
        self._worker = worker

    @property
    def has_store(self) -> bool:
        return self._worker is not None

    def poll(self) -> list[StoreEvent]:
        """What the store answered since the last call; the worker wakes the loop when there is something."""
        return [] if self._worker is None else self._worker.poll()

    def move(self, copies: Copies, actions: list[StoreAction]) -> None:
        """The copies first: a `Write` reads what they wrote."""
        if copies:
            self._copier.carry_out(copies)
        if self._worker is not None:
            for action in actions:
                self._worker.do(action)

    def store_stats(self) -> Mapping[str, float]:
        return {} if self._worker is None else self._worker.stats()

    def clear_store(self) -> str:
        """Forget every object of the store; what went wrong, or nothing."""
        assert self._worker is not None
        return self._worker.clear()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
