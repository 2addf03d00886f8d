"""The garbage collector: dependents follow their owners, namespaces and CRDs are emptied.

Owns `GarbageCollector`, one task fed by committed changes. It keeps an index of owners and acts through `Operations`
like any client. Invariant: `_uids` holds exactly the uids of stored objects; `_dependents[u]` the keys of stored
objects that name owner u. Not here: marking for deletion (see `deletion`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from baton.cluster.apiserver.deletion import FOREGROUND, ORPHAN, DeleteOptions
from baton.cluster.apiserver.errors import StatusError
from baton.cluster.apiserver.operations import Operations
from baton.cluster.apiserver.resources import Registry
from baton.cluster.apiserver.store import ADDED, DELETED, Change, Key, Store, StoreClosedError
from baton.cluster.apiserver.target import Target, WriteOptions

log = logging.getLogger(__name__)
JSON = dict[str, Any]
_CRDS = "customresourcedefinitions.apiextensions.k8s.io"


class GarbageCollector:
    """`start` and `stop` it in the event loop of the store."""

    def __init__(self, store: Store, registry: Registry, operations: Operations) -> None:
        self._store, self._registry, self._operations = store, registry, operations
        self._uids: dict[str, Key] = {}
        self._dependents: dict[str, set[Key]] = {}
        self._work: asyncio.Queue[Key | str] = asyncio.Queue()  # a key to look at, or the uid of an owner that is gone
        self._task: asyncio.Task[None] | None = None
        store.subscribe(self._on_changes)

    def start(self) -> None:
        """Indexes what is stored, looks at all of it once, then follows changes."""
        for name in self._store.resources():
            for (namespace, obj_name), obj in list(self._store.resource(name).objects.items()):
                self._index(Key(name, namespace, obj_name), None, obj)
        for key in list(self._uids.values()):
            self._work.put_nowait(key)
        self._task = asyncio.create_task(self._run(), name="garbage-collector")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def idle(self) -> None:
        """Returns when all work known now is done (for tests and orderly shutdown)."""
        await self._work.join()

    # Index

    def _on_changes(self, changes: list[Change]) -> None:
        if self._task is None:
            return
        for change in changes:
            new = None if change.type == DELETED else change.object
            self._index(change.key, change.previous, new)
            if change.type == DELETED:
                self._on_deleted(change)
            elif self._needs_look(change):
                self._work.put_nowait(change.key)

    def _index(self, key: Key, old: JSON | None, new: JSON | None) -> None:
        if old is not None:
            self._uids.pop(old["metadata"]["uid"], None)
            for uid in _owner_uids(old):
                dependents = self._dependents.get(uid, set())
                dependents.discard(key)
                if not dependents:
                    self._dependents.pop(uid, None)
        if new is not None:
            self._uids[new["metadata"]["uid"]] = key
            for uid in _owner_uids(new):
                self._dependents.setdefault(uid, set()).add(key)

    def _on_deleted(self, change: Change) -> None:
        uid = change.object["metadata"]["uid"]
        if uid in self._dependents:
            self._work.put_nowait(uid)
        # An owner in foreground deletion waits for its dependents, a namespace for its content.
        for owner in _owner_uids(change.object):
            if owner in self._uids:
                self._work.put_nowait(self._uids[owner])
        if change.key.namespace:
            namespace = Key("namespaces", "", change.key.namespace)
            found = self._store.get(namespace)
            if found is not None and found["metadata"].get("deletionTimestamp"):
                self._work.put_nowait(namespace)
        if change.key.resource == _CRDS:
            self._work.put_nowait(Key(change.key.name, "", ""))

    def _needs_look(self, change: Change) -> bool:
        meta = change.object["metadata"]
        if meta.get("deletionTimestamp"):
            return True
        if change.type == ADDED:
            return bool(meta.get("ownerReferences")) or change.key.resource == "namespaces"
        before = (change.previous or {}).get("metadata", {}).get("ownerReferences")
        return bool(meta.get("ownerReferences")) and before != meta.get("ownerReferences")

    # Work

    async def _run(self) -> None:
        while True:
            item = await self._work.get()
            try:
                if isinstance(item, str):
                    await self._owner_gone(item)
                elif item.name == "":
                    await self._empty_resource(item.resource)
                else:
                    await self._look(item)
            except StoreClosedError:
                return
            except (
                StatusError
            ) as error:  # somebody else was faster, or validation refuses: seen again on its next change
                log.warning("garbage collection step failed", extra={"item": str(item), "error": error.message})
            finally:
                self._work.task_done()

    async def _look(self, key: Key) -> None:
        obj = self._store.get(key)
        if obj is None:
            return
        meta = obj["metadata"]
        if meta.get("deletionTimestamp"):
            finalizers = meta.get("finalizers") or ()
            if ORPHAN in finalizers:
                await self._orphan(key, obj)
            elif FOREGROUND in finalizers:
                await self._foreground(key, obj)
            if key.resource == "namespaces":
                await self._empty_namespace(key)
        elif key.resource == "namespaces":
            await self._default_account(key.name)
        if meta.get("ownerReferences"):
            await self._check_owners(key, obj)

    async def _default_account(self, namespace: str) -> None:
        """Every namespace has a service account named default."""
        if self._store.latest(Key("serviceaccounts", namespace, "default")) is None:
            found = self._registry.lookup("", "v1", "serviceaccounts")
            assert found
            body = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
            options = WriteOptions(manager="kube-controller-manager")
            await self._operations.create(Target(*found, namespace), body, options)

    async def _owner_gone(self, uid: str) -> None:
        for key in list(self._dependents.get(uid, ())):
            obj = self._store.get(key)
            if obj is not None:
                await self._check_owners(key, obj)

    async def _check_owners(self, key: Key, obj: JSON) -> None:
        """Deletes an object whose owners are all gone; forgets those that are."""
        owners = obj["metadata"].get("ownerReferences") or []
        alive = [o for o in owners if self._owner_exists(o, key)]
        if len(alive) == len(owners):
            return
        if alive:
            await self._set_owners(key, alive)
            return
        waiting = any(f in (FOREGROUND, ORPHAN) for f in obj["metadata"].get("finalizers") or ())
        await self._delete(key, None if waiting else "Background", uid=obj["metadata"]["uid"])

    def _owner_exists(self, owner: JSON, dependent: Key) -> bool:
        place = self._uids.get(owner["uid"])
        return place is not None and place.namespace in ("", dependent.namespace)

    async def _set_owners(self, key: Key, owners: list[JSON]) -> None:
        latest = self._store.latest(key)
        if latest is None:
            return
        kept = [o for o in latest["metadata"].get("ownerReferences") or [] if o in owners]
        meta = {**latest["metadata"], "ownerReferences": kept}
        if not kept:
            del meta["ownerReferences"]
        await self._operations.replace_stored(key, {**latest, "metadata": meta})

    async def _orphan(self, key: Key, obj: JSON) -> None:
        uid = obj["metadata"]["uid"]
        for dependent in list(self._dependents.get(uid, ())):
            found = self._store.get(dependent)
            if found is not None:
                kept = [o for o in found["metadata"].get("ownerReferences") or [] if o["uid"] != uid]
                await self._set_owners(dependent, kept)
        await self._drop_finalizer(key, ORPHAN)

    async def _foreground(self, key: Key, obj: JSON) -> None:
        """Deletes dependents first; the owner goes when none that blocks it is left."""
        uid = obj["metadata"]["uid"]
        blocked = False
        for dependent in list(self._dependents.get(uid, ())):
            found = self._store.get(dependent)
            if found is None:
                continue
            reference = next(o for o in found["metadata"]["ownerReferences"] if o["uid"] == uid)
            blocked = blocked or bool(reference.get("blockOwnerDeletion"))
            if not found["metadata"].get("deletionTimestamp"):
                await self._delete(dependent, "Foreground", uid=found["metadata"]["uid"])
        left = [self._store.get(d) for d in self._dependents.get(uid, ())]
        still = any(
            o is not None
            and any(r["uid"] == uid and r.get("blockOwnerDeletion") for r in o["metadata"]["ownerReferences"])
            for o in left
        )
        if not blocked or not still:
            await self._drop_finalizer(key, FOREGROUND)

    async def _drop_finalizer(self, key: Key, name: str) -> None:
        latest = self._store.latest(key)
        if latest is None:
            return
        meta = dict(latest["metadata"])
        meta["finalizers"] = [f for f in meta.get("finalizers") or () if f != name]
        if not meta["finalizers"]:
            del meta["finalizers"]
        await self._operations.replace_stored(key, {**latest, "metadata": meta})

    async def _empty_namespace(self, key: Key) -> None:
        left = False
        for name in list(self._registry.resources):
            if not self._registry.resources[name].namespaced:
                continue
            for obj in list(self._store.resource(name).select(key.name)):
                left = True
                if not obj["metadata"].get("deletionTimestamp"):
                    await self._delete(Key(name, key.name, obj["metadata"]["name"]), "Background")
        remaining = left and any(
            next(self._store.resource(n).select(key.name), None) is not None for n in self._registry.resources
        )
        latest = self._store.latest(key)
        if not remaining and latest is not None:
            spec = {**(latest.get("spec") or {}), "finalizers": []}
            await self._operations.replace_stored(key, {**latest, "spec": spec})

    async def _empty_resource(self, name: str) -> None:
        """The CRD is gone: so are its objects, finalizers or not, since nothing serves them any more."""
        for (namespace, obj_name), obj in list(self._store.resource(name).objects.items()):
            meta = {k: v for k, v in obj["metadata"].items() if k not in ("finalizers", "deletionGracePeriodSeconds")}
            meta.setdefault("deletionTimestamp", meta["creationTimestamp"])
            await self._operations.replace_stored(Key(name, namespace, obj_name), {**obj, "metadata": meta})

    async def _delete(self, key: Key, propagation: str | None, *, uid: str | None = None) -> None:
        resource = self._registry.resources.get(key.resource)
        if resource is None or self._store.latest(key) is None:
            return
        target = Target(resource, resource.storage, key.namespace, key.name)
        await self._operations.delete(target, DeleteOptions(propagation=propagation, uid=uid))


def _owner_uids(obj: JSON) -> list[str]:
    return [o["uid"] for o in obj["metadata"].get("ownerReferences") or ()]
