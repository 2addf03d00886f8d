"""An API server's behaviour in memory, with the verbs of `cluster_client.Client`: what the node agent's tests talk to.

Kept to what those tests need: one resourceVersion for all, watches from a version, merge (and strategic for conditions)
patches, pods that go only when deleted with grace 0.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import uuid
from collections.abc import AsyncIterator
from typing import Any, cast

from baton.cluster_client import AlreadyExists, Client, Conflict, NotFound, Object, ObjectList, Resource, WatchEvent
from baton.cluster_client.resources import EVENTS, PODS


class MemoryApi:
    """Use `client` where a `Client` is wanted."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str | None, str], Object] = {}
        self._log: list[tuple[int, Resource, WatchEvent]] = []
        self._versions = itertools.count(1)
        self._changed = asyncio.Condition()
        self._version = 0

    @property
    def client(self) -> Client:
        return cast(Client, self)

    # -- for tests

    def pod(self, name: str, namespace: str = "default") -> Object | None:
        return self.objects.get((PODS.full_name, namespace, name))

    def events(self) -> list[tuple[str, str]]:
        """(reason, message), oldest first."""
        found = [obj for (kind, _, _), obj in self.objects.items() if kind == EVENTS.full_name]
        return [(obj["reason"], obj["message"]) for obj in found]

    async def until(self, condition: Any, timeout_s: float = 20.0) -> Any:
        """Wait until `condition()` is true after some change; its value."""
        async with asyncio.timeout(timeout_s), self._changed:
            while not (value := condition()):
                await self._changed.wait()
            return value

    # -- the verbs

    async def list(self, resource: Resource, namespace: str | None = None, **_: Any) -> ObjectList:
        items = [
            copy.deepcopy(obj)
            for (kind, where, _), obj in self.objects.items()
            if kind == resource.full_name and namespace in (None, where)
        ]
        return ObjectList(items, str(self._version))

    async def get(self, resource: Resource, name: str, namespace: str | None = None, **_: Any) -> Object:
        return copy.deepcopy(self._find(resource, name, namespace))

    async def create(self, resource: Resource, obj: Object, namespace: str | None = None, **_: Any) -> Object:
        obj = copy.deepcopy(obj)
        meta = obj["metadata"]
        if resource.namespaced:
            meta.setdefault("namespace", namespace or "default")
        key = (resource.full_name, meta.get("namespace"), meta["name"])
        if key in self.objects:
            raise AlreadyExists(409, "AlreadyExists", f"{meta['name']} already exists")
        meta.setdefault("uid", str(uuid.uuid4()))
        obj.setdefault("apiVersion", resource.api_version)
        obj.setdefault("kind", resource.kind)
        return await self._write(resource, obj, "ADDED")

    async def update(self, resource: Resource, obj: Object, **_: Any) -> Object:
        self._find(resource, obj["metadata"]["name"], obj["metadata"].get("namespace"))
        return await self._write(resource, copy.deepcopy(obj), "MODIFIED")

    async def patch(
        self, resource: Resource, name: str, namespace: str | None, body: Any, *, kind: str = "merge", **_: Any
    ) -> Object:
        current = copy.deepcopy(self._find(resource, name, namespace))
        wanted = body.get("metadata", {}).get("uid")
        if wanted and wanted != current["metadata"]["uid"]:
            raise Conflict(409, "Conflict", "uid differs")
        foreign = []
        if kind == "strategic" and "conditions" in body.get("status", {}):
            types = {one["type"] for one in body["status"]["conditions"]}
            old = current.get("status", {}).get("conditions") or []
            foreign = [one for one in old if one["type"] not in types]
        merged = _merge(current, body)
        if foreign:
            merged["status"]["conditions"] = [*merged["status"]["conditions"], *foreign]
        return await self._write(resource, merged, "MODIFIED")

    async def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        grace_period_s: int | None = None,
        uid: str | None = None,
        **_: Any,
    ) -> Object:
        obj = copy.deepcopy(self._find(resource, name, namespace))
        if uid is not None and obj["metadata"]["uid"] != uid:
            raise Conflict(409, "Conflict", "uid differs")
        if resource is PODS and grace_period_s != 0 and obj["spec"].get("nodeName"):
            default = obj["spec"].get("terminationGracePeriodSeconds", 30)
            obj["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            obj["metadata"]["deletionGracePeriodSeconds"] = default if grace_period_s is None else grace_period_s
            return await self._write(resource, obj, "MODIFIED")
        del self.objects[resource.full_name, obj["metadata"].get("namespace"), name]
        return await self._tell(resource, obj, "DELETED")

    async def watch(
        self, resource: Resource, namespace: str | None = None, *, resource_version: str | None = None, **_: Any
    ) -> AsyncIterator[WatchEvent]:
        seen = int(resource_version or 0)
        while True:
            async with self._changed:
                while self._version <= seen:
                    await self._changed.wait()
                fresh = [one for one in self._log if one[0] > seen]
                seen = self._version
            for _, kind, event in fresh:
                if kind == resource and namespace in (None, event.object["metadata"].get("namespace")):
                    yield WatchEvent(event.type, copy.deepcopy(event.object))

    def _find(self, resource: Resource, name: str, namespace: str | None) -> Object:
        found = self.objects.get((resource.full_name, namespace if resource.namespaced else None, name))
        if found is None:
            raise NotFound(404, "NotFound", f'{resource.plural} "{name}" not found')
        return found

    async def _write(self, resource: Resource, obj: Object, kind: Any) -> Object:
        meta = obj["metadata"]
        self.objects[resource.full_name, meta.get("namespace"), meta["name"]] = obj
        return await self._tell(resource, obj, kind)

    async def _tell(self, resource: Resource, obj: Object, kind: Any) -> Object:
        async with self._changed:
            self._version = next(self._versions)
            obj["metadata"]["resourceVersion"] = str(self._version)
            self._log.append((self._version, resource, WatchEvent(kind, copy.deepcopy(obj))))
            self._changed.notify_all()
        return copy.deepcopy(obj)


def _merge(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merge(result.get(key), value)
    return result
