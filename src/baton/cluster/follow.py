"""Wait until objects are ready, telling each change: the loop between the API server and `progress`.

Owns when to stop: all ready, time over, or everything that is not ready is stuck for a while. Prints nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from baton.api.resources import (
    DEPLOYMENTS,
    EVENTS,
    LEADER_WORKER_SETS,
    PERSISTENT_VOLUME_CLAIMS,
    PODS,
    ROLE_BASED_GROUPS,
    SERVICES,
    STATEFUL_SETS,
    Object,
    Resource,
)
from baton.cluster.apply import Applied
from baton.cluster.progress import Row, View, rows_of
from baton.cluster_client import Cache, Client

STUCK_PATIENCE_S = 20.0
_TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """One object to follow; `where` is put before its rows when they are told at the end (file and line)."""

    resource: Resource
    object: Object
    where: str = ""

    @classmethod
    def applied(cls, one: Applied) -> Target:
        return cls(one.resource, one.object, f"{one.manifest.source}:{one.manifest.line}: ")

    @property
    def namespace(self) -> str | None:
        namespace = self.object["metadata"].get("namespace")
        return str(namespace) if namespace else None


async def standing(client: Client) -> list[Target]:
    """What a cluster was running: every group and workload, and the pods and claims that nothing owns."""
    found = []
    kinds = (ROLE_BASED_GROUPS, LEADER_WORKER_SETS, STATEFUL_SETS, DEPLOYMENTS)
    for resource in (PERSISTENT_VOLUME_CLAIMS, *kinds, PODS, SERVICES):
        for obj in (await client.list(resource)).items:
            if not obj["metadata"].get("ownerReferences"):
                found.append(Target(resource, obj))
    return found


@dataclass(frozen=True, slots=True)
class Outcome:
    """The last rows, and whether all of them are ready."""

    rows: list[Row]
    services: list[Object]

    @property
    def is_ready(self) -> bool:
        return all(row.state == "ready" for row in self.rows)


class Follower:
    """Follows some objects and what belongs to them; use it inside `running`."""

    def __init__(self, client: Client, targets: Sequence[Target]) -> None:
        self._targets = list(targets)
        self._changed = asyncio.Event()
        namespaces = sorted({one.namespace or "default" for one in targets})
        self._caches: dict[tuple[Resource, str], Cache] = {}
        for namespace in namespaces:
            wanted = {PODS, EVENTS, SERVICES}
            wanted |= {one.resource for one in targets if one.namespace == namespace}
            for resource in wanted:
                cache = Cache(client, resource, namespace)
                cache.subscribe(lambda _: self._changed.set())
                self._caches[resource, namespace] = cache
        self._tasks: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Follower]:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(cache.run(), name=f"follow-{c.plural}") for (c, _), cache in self._caches.items()
            ]
            try:
                for cache in self._caches.values():
                    await cache.synced()
                yield self
            finally:
                for task in tasks:
                    task.cancel()

    def rows(self) -> list[Row]:
        return [row for one in self._targets for row in self._rows(one)]

    def services(self) -> list[Object]:
        """The Services among the targets as they are now."""
        found = [self._now(one) for one in self._targets if one.resource == SERVICES]
        return [one for one in found if one is not None]

    async def wait(
        self, timeout_s: float, tell: Callable[[list[Row]], None], patience_s: float = STUCK_PATIENCE_S
    ) -> Outcome:
        """Until ready, stuck for `patience_s`, or `timeout_s`; `tell` gets the rows whenever they may have changed."""
        loop = asyncio.get_running_loop()
        deadline, stuck_since = loop.time() + timeout_s, loop.time()
        while True:
            self._changed.clear()
            rows = self.rows()
            tell(rows)
            states = {row.state for row in rows}
            if "waiting" in states:
                stuck_since = loop.time()
            give_up = loop.time() >= deadline or loop.time() - stuck_since > patience_s
            if states <= {"ready"} or give_up:
                return Outcome(rows, self.services())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _TICK_S)

    def _rows(self, one: Target) -> list[Row]:
        obj = self._now(one)
        if obj is None:
            title = f"{one.object['kind'].lower()}/{one.object['metadata']['name']}"
            return [Row(title, "stuck", "is gone: deleted by somebody else", one.where)] if one.namespace else []
        namespace = one.namespace or "default"
        view = View(
            pods=self._caches[PODS, namespace].list(),
            events=self._caches[EVENTS, namespace].list(),
            now=datetime.now(UTC),
        )
        return [replace(row, where=one.where) for row in rows_of(obj, view)]

    def _now(self, one: Target) -> Object | None:
        cache = self._caches.get((one.resource, one.namespace or ""))
        if cache is None:
            return one.object
        return cache.get(one.object["metadata"]["name"], one.namespace)
