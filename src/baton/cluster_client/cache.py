"""A local, indexed copy of one resource, kept current by a watch (an "informer").

Owns the copy; objects in it are shared and must not be changed by readers. Writers may put the server's answer in at
once (:meth:`Cache.observe`), so that they read their own writes before the watch tells of them.
Invariant: for one uid the stored resourceVersion never goes back; a deleted uid never comes back.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import TypeVar

from baton.cluster_client.client import Client
from baton.cluster_client.resources import Object, Resource, key_of
from baton.cluster_client.watch import Change, follow

_K = TypeVar("_K")
Objects = list[Object]
Handler = Callable[[Change], None]
_NUM_TOMBSTONES = 8192


class Cache:
    """``index_labels`` names label keys that :meth:`by_label` will be asked for; owners (uids) are always indexed."""

    def __init__(
        self,
        client: Client,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str | None = None,
        field_selector: str | None = None,
        index_labels: Iterable[str] = (),
    ) -> None:
        self.resource = resource
        self._client = client
        self._namespace = namespace
        self._label_selector = label_selector
        self._field_selector = field_selector
        self._index_labels = tuple(index_labels)
        self._objects: dict[str, Object] = {}
        self._by_owner: dict[str, set[str]] = defaultdict(set)
        self._by_label: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._by_namespace: dict[str, set[str]] = defaultdict(set)
        self._dead: OrderedDict[str, None] = OrderedDict()
        self._handlers: list[Handler] = []
        self._synced = asyncio.Event()

    async def run(self) -> None:
        """Follow the server until cancelled. Run it as a task of the caller's task group."""
        async for change in follow(
            self._client,
            self.resource,
            self._namespace,
            label_selector=self._label_selector,
            field_selector=self._field_selector,
        ):
            self.apply(change)

    async def synced(self) -> None:
        """Return when the first list has been taken over."""
        await self._synced.wait()

    @property
    def is_synced(self) -> bool:
        return self._synced.is_set()

    def subscribe(self, handler: Handler) -> None:
        """``handler`` is called, synchronously, after each change is in the cache. It must not raise or block."""
        self._handlers.append(handler)

    def get(self, name: str, namespace: str | None = None) -> Object | None:
        return self._objects.get(f"{namespace}/{name}" if namespace else name)

    def get_key(self, key: str) -> Object | None:
        return self._objects.get(key)

    def list(self, namespace: str | None = None) -> Objects:
        """All objects, or those of one namespace, ordered by key."""
        keys: Iterable[str] = self._objects if namespace is None else self._by_namespace.get(namespace, ())
        return [self._objects[key] for key in sorted(keys)]

    def by_owner(self, uid: str) -> Objects:
        """Objects with an ownerReference to ``uid``, ordered by key."""
        return [self._objects[key] for key in sorted(self._by_owner.get(uid, ()))]

    def by_label(self, label: str, value: str, namespace: str | None = None) -> Objects:
        """Objects with ``label`` = ``value``, ordered by key. The label must be one of ``index_labels``."""
        if label not in self._index_labels:
            raise KeyError(f"{self.resource.full_name}: label {label!r} is not indexed")
        found = [self._objects[key] for key in sorted(self._by_label.get((label, value), ()))]
        return [obj for obj in found if namespace is None or obj["metadata"].get("namespace") == namespace]

    def observe(self, obj: Object) -> None:
        """Take over the server's answer to a write, unless something newer is here already."""
        if obj.get("kind") == self.resource.kind and "uid" in obj.get("metadata", {}):
            self.apply(Change("MODIFIED", obj))

    def apply(self, change: Change) -> None:
        """Take over one change and tell the subscribers if it is news."""
        obj = change.object
        if obj is None:
            self._synced.set()
        elif change.type == "DELETED":
            if not self._delete(obj):
                return
        else:
            seen = self._objects.get(key_of(obj))
            if not self._store(obj, seen):
                return
            change = Change("ADDED" if seen is None else "MODIFIED", obj)
        for handler in self._handlers:
            handler(change)

    def _store(self, obj: Object, seen: Object | None) -> bool:
        uid = obj["metadata"]["uid"]
        if uid in self._dead:
            return False
        if seen is not None:
            if seen["metadata"]["uid"] == uid and not _is_newer(obj, seen):
                return False
            self._unindex(seen)
        key = key_of(obj)
        self._objects[key] = obj
        for owner in obj["metadata"].get("ownerReferences") or []:
            self._by_owner[owner["uid"]].add(key)
        labels = obj["metadata"].get("labels") or {}
        for label in self._index_labels:
            if label in labels:
                self._by_label[label, labels[label]].add(key)
        self._by_namespace[obj["metadata"].get("namespace") or ""].add(key)
        return True

    def _delete(self, obj: Object) -> bool:
        uid = obj["metadata"]["uid"]
        self._dead[uid] = None
        while len(self._dead) > _NUM_TOMBSTONES:
            self._dead.popitem(last=False)
        seen = self._objects.get(key_of(obj))
        if seen is None or seen["metadata"]["uid"] != uid:
            return False
        self._unindex(seen)
        del self._objects[key_of(obj)]
        return True

    def _unindex(self, obj: Object) -> None:
        key = key_of(obj)
        for owner in obj["metadata"].get("ownerReferences") or []:
            _discard(self._by_owner, owner["uid"], key)
        for label, value in (obj["metadata"].get("labels") or {}).items():
            if label in self._index_labels:
                _discard(self._by_label, (label, value), key)
        _discard(self._by_namespace, obj["metadata"].get("namespace") or "", key)


def _discard(index: dict[_K, set[str]], value: _K, key: str) -> None:
    keys = index.get(value)
    if keys is not None:
        keys.discard(key)
        if not keys:
            del index[value]


def _is_newer(obj: Object, seen: Object) -> bool:
    """Compare resourceVersions as numbers (every server that uses them as such); else any difference is news."""
    new, old = str(obj["metadata"].get("resourceVersion")), str(seen["metadata"].get("resourceVersion"))
    if new.isdigit() and old.isdigit():
        return int(new) > int(old)
    return new != old
