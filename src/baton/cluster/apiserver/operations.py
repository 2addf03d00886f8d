"""Create, update, apply and delete: from a client's object to a committed write.

Owns `Operations`, the one way to change storage: HTTP handlers, garbage collector and namespace emptying all come
through here. Everything between reading `store.latest` and `store.put` runs without an await, so writes of one key
cannot interleave and an unconditional patch never conflicts. Not here: HTTP, reading, patch formats.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from baton.cluster.apiserver import defaults, metadata, ownership, rules, strategy
from baton.cluster.apiserver.checks import (
    check_namespace,
    check_place,
    content,
    decode_error,
    finished,
    report_unknown,
    same,
)
from baton.cluster.apiserver.conform import conform
from baton.cluster.apiserver.crd import CrdManager
from baton.cluster.apiserver.deletion import DeleteOptions, decide_deletion
from baton.cluster.apiserver.errors import (
    Cause,
    already_exists,
    bad_request,
    conflict,
    forbidden,
    invalid,
)
from baton.cluster.apiserver.names import generate
from baton.cluster.apiserver.ownership import Manager
from baton.cluster.apiserver.resources import Registry, Resource
from baton.cluster.apiserver.store import ADDED, DELETED, MODIFIED, Key, Store
from baton.cluster.apiserver.target import Target, WriteOptions

JSON = dict[str, Any]


class Problem(Protocol):
    """One thing a validator found: a field's path, Kubernetes' word for what is wrong, and text."""

    @property
    def field(self) -> str: ...

    @property
    def reason(self) -> str: ...

    @property
    def message(self) -> str: ...


Validator = Callable[[JSON, JSON | None], Iterable[Problem]]
"""Rules of a custom resource beyond its schema, like a validating webhook but in-process: (new, old), old None on create."""
Mutator = Callable[[JSON], JSON]
"""What a mutating webhook would do, in-process: a complete object in, the one to store out; idempotent."""


class Operations:
    """Writes. One per server; shares the event loop with its `store`."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        crds: CrdManager,
        addresses: strategy.ServiceAddresses,
        validators: Mapping[str, Validator],
        mutators: Mapping[str, Mutator],
    ) -> None:
        self.store, self.registry, self.crds, self.addresses = store, registry, crds, addresses
        self._validators, self._mutators = validators, mutators

    # Create

    async def create(self, target: Target, obj: JSON, options: WriteOptions) -> JSON:
        """Stores a new object; returns it in the target's version."""
        resource, version = target.resource, target.version
        check_place(target, obj)
        check_namespace(self.store, target)
        obj = self._conform(target, obj, options)
        meta = obj.setdefault("metadata", {})
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = self._generate(target, meta["generateName"])
        name = meta.get("name", "")
        if not name:
            cause = Cause.required("metadata.name", "name or generateName is required")
            raise invalid(resource.kind, resource.group, "", [cause])
        if resource.namespaced:
            meta["namespace"] = target.namespace
        else:
            meta.pop("namespace", None)
        key = Key(resource.store_name, target.namespace, name)
        if meta.get("resourceVersion") not in (None, "", "0"):
            raise bad_request("resourceVersion should not be set on objects to be created")
        if self.store.latest(key) is not None:
            raise already_exists(resource.plural, resource.group, name)
        obj["metadata"] = metadata.fresh(meta, counts_generation=resource.counts_generation or not resource.builtin)
        if resource.builtin:
            strategy.prepare_create(resource.kind, obj, version.has_status)
        elif version.has_status:
            obj.pop("status", None)
        self._check_create(target, obj, options)
        manager = Manager(options.manager, "Update", version.api_version)
        obj["metadata"]["managedFields"] = ownership.track_update(resource, version, None, obj, manager)
        return await self._put_new(target, key, obj, options)

    async def _put_new(self, target: Target, key: Key, obj: JSON, options: WriteOptions) -> JSON:
        resource = target.resource
        if resource.kind == "Service":
            causes = strategy.allocate_address(obj, self.addresses)
            if causes:
                raise invalid(resource.kind, resource.group, key.name, causes)
        if resource.kind == "CustomResourceDefinition":
            self.crds.prepare(obj)
        stored = resource.convert(obj, resource.storage)
        if options.dry_run:
            if resource.kind == "Service":
                self.addresses.free(obj["spec"].get("clusterIP", ""))
            return obj
        return resource.convert(await self._put(ADDED, key, stored), target.version)

    def _generate(self, target: Target, prefix: str) -> str:
        for _ in range(8):
            name = generate(prefix)
            if self.store.latest(Key(target.resource.store_name, target.namespace, name)) is None:
                return name
        raise already_exists(target.resource.plural, target.resource.group, prefix)

    def _check_create(self, target: Target, obj: JSON, options: WriteOptions) -> None:
        kind = target.resource.kind
        causes = rules.name_causes(kind, obj["metadata"]["name"]) + metadata.metadata_causes(obj["metadata"])
        if target.resource.builtin:
            causes += rules.create_causes(kind, obj)
        if kind == "CustomResourceDefinition":
            causes += self.crds.causes(obj, options.warnings)
        causes += self._custom_causes(target.resource, obj, None)
        if causes:
            raise invalid(kind, target.resource.group, obj["metadata"]["name"], causes)

    def _custom_causes(self, resource: Resource, obj: JSON, old: JSON | None) -> list[Cause]:
        check = self._validators.get(resource.store_name)
        return [Cause(p.field, p.reason, p.message) for p in check(obj, old)] if check else []

    # Update

    async def update(
        self, target: Target, change: Callable[[JSON], JSON], options: WriteOptions, *, operation: str = "Update"
    ) -> JSON:
        """Reads the object (in the target's version), lets `change` make the new one, checks and stores it.

        `change` must not alter its argument. Nothing is written when nothing changes.
        """
        resource, version = target.resource, target.version
        stored = self.store.latest(target.key)
        if stored is None:
            raise target.missing()
        old = resource.convert(stored, version)
        new = change(old)
        check_place(target, new)
        new = self._conform(target, new, options, name=target.name, known=self._known(target, old))
        new = self._merge_parts(target, _as_stored(target, new), old)
        self._check_update(target, new, old, options)
        manager = Manager(options.manager, operation, version.api_version, target.subresource)
        new["metadata"]["managedFields"] = ownership.track_update(resource, version, old, new, manager)
        return await self._store_update(target, new, old, stored, options)

    async def apply(self, target: Target, config: JSON, options: WriteOptions) -> JSON:
        """Server-side apply; creates the object when it does not exist."""
        resource, version = target.resource, target.version
        if (config.get("metadata") or {}).get("managedFields"):
            raise bad_request("metadata.managedFields must be nil")
        check_place(target, config)
        partial = self._conform(target, config, options, name=target.name, complete=False)
        partial.setdefault("metadata", {})["name"] = target.name
        manager = Manager(options.manager, "Apply", version.api_version, target.subresource)
        stored = self.store.latest(target.key)
        if stored is None:
            if target.subresource:
                raise target.missing()
            return await self._apply_new(target, partial, manager, options)
        asked = partial["metadata"].pop("resourceVersion", None)
        partial["metadata"].pop("uid", None)
        old = resource.convert(stored, version)
        scoped = self._scope(target, partial)
        applied = ownership.merge_applied(resource, version, old, scoped, manager)
        new = {**applied.object, "metadata": {**applied.object["metadata"]}}
        if asked:
            new["metadata"]["resourceVersion"] = asked
        new = self._conform(
            target, new, WriteOptions(validation="Ignore"), name=target.name, known=self._known(target, old)
        )
        new = self._merge_parts(target, _as_stored(target, new), old)
        fields = ownership.settle_conflicts(resource, version, old, new, applied, manager, force=options.force)
        self._check_update(target, new, old, options)
        new["metadata"]["managedFields"] = fields
        return await self._store_update(target, new, old, stored, options)

    async def _apply_new(self, target: Target, partial: JSON, manager: Manager, options: WriteOptions) -> JSON:
        resource, version = target.resource, target.version
        if partial["metadata"].get("uid"):
            raise conflict(resource.plural, resource.group, target.name, "uid mismatch: the object does not exist")
        partial["metadata"].pop("resourceVersion", None)
        check_namespace(self.store, target)
        empty: JSON = {"metadata": {}}
        applied = ownership.merge_applied(resource, version, empty, self._scope(target, partial), manager)
        obj = self._conform(target, partial, WriteOptions(validation="Ignore"), name=target.name)
        if resource.namespaced:
            obj["metadata"]["namespace"] = target.namespace
        obj["metadata"] = metadata.fresh(
            obj["metadata"], counts_generation=resource.counts_generation or not resource.builtin
        )
        if resource.builtin:
            strategy.prepare_create(resource.kind, obj, version.has_status)
        elif version.has_status:
            obj.pop("status", None)
        self._check_create(target, obj, options)
        obj["metadata"]["managedFields"] = ownership.entries(applied.owners)
        return await self._put_new(target, target.key, obj, options)

    def _scope(self, target: Target, config: JSON) -> JSON:
        """The part of an applied configuration that this endpoint may write."""
        if not target.version.has_status:
            return config
        if target.subresource == "status":
            return {k: v for k, v in config.items() if k != "spec"}
        return {k: v for k, v in config.items() if k != "status"}

    def _merge_parts(self, target: Target, new: JSON, old: JSON) -> JSON:
        """Main endpoint: status stays; status endpoint: everything but status stays."""
        resource, version = target.resource, target.version
        asked = new.setdefault("metadata", {}).get("resourceVersion")
        if target.subresource == "status":
            kept = {k: v for k, v in old.items() if k not in ("status", "metadata")}
            meta = (
                new["metadata"]
                if resource.builtin
                else {**old["metadata"], "managedFields": new["metadata"].get("managedFields")}
            )
            new = {**kept, "metadata": meta, **({"status": new["status"]} if "status" in new else {})}
            new["metadata"]["ownerReferences"] = old["metadata"].get("ownerReferences")
        elif version.has_status:
            new = {k: v for k, v in new.items() if k != "status"}
            if "status" in old:
                new["status"] = old["status"]
        if new["metadata"].get("uid") not in (None, "", old["metadata"]["uid"]):
            why = f"Precondition failed: UID in precondition: {new['metadata']['uid']}, UID in object meta: {old['metadata']['uid']}"
            raise conflict(resource.plural, resource.group, target.name, why)
        new["metadata"] = {k: v for k, v in metadata.carried(new["metadata"], old["metadata"]).items() if v is not None}
        if asked not in (None, "", "0", old["metadata"]["resourceVersion"]):
            raise conflict(resource.plural, resource.group, target.name)
        if resource.builtin and not target.subresource:
            strategy.prepare_update(resource.kind, new, old)
        counts = resource.counts_generation or not resource.builtin
        if counts and not target.subresource and content(new) != content(old):
            new["metadata"]["generation"] = old["metadata"].get("generation", 0) + 1
        return new

    def _check_update(self, target: Target, new: JSON, old: JSON, options: WriteOptions) -> None:
        kind = target.resource.kind
        causes = metadata.finalizer_causes(new["metadata"], old["metadata"])
        if new["metadata"] != old["metadata"]:
            causes += metadata.metadata_causes(new["metadata"])
        if not target.subresource:
            if target.resource.builtin and content(new) != content(old):
                causes += rules.create_causes(kind, new) + rules.update_causes(kind, new, old)
            if kind == "CustomResourceDefinition":
                causes += self.crds.causes(new, options.warnings)
                self.crds.prepare(new)
            if content(new) != content(old):
                causes += self._custom_causes(target.resource, new, old)
        if causes:
            raise invalid(kind, target.resource.group, target.name, causes)

    async def _store_update(self, target: Target, new: JSON, old: JSON, stored: JSON, options: WriteOptions) -> JSON:
        if same(new, old):
            return old
        resource = target.resource
        if options.dry_run:
            return new
        body = resource.convert(new, resource.storage)
        if finished(body):
            written = await self._put(DELETED, target.key, body)
        else:
            written = await self._put(MODIFIED, target.key, body)
        if resource.kind == "Service":
            self._move_address(old, new)
        return resource.convert(written, target.version)

    def _move_address(self, old: JSON, new: JSON) -> None:
        was, now = (o.get("spec", {}).get("clusterIP") or "" for o in (old, new))
        if was != now:
            self.addresses.free(was)
            self.addresses.take(now)

    # Delete

    async def delete(self, target: Target, options: DeleteOptions) -> tuple[JSON, bool]:
        """Deletes or marks for deletion. Returns the object and whether it is gone."""
        resource = target.resource
        stored = self.store.latest(target.key)
        if stored is None:
            raise target.missing()
        options.check_preconditions(resource, target.name, stored)
        if resource.kind == "Namespace" and target.name in ("default", "kube-system", "kube-public"):
            raise forbidden(f'namespaces "{target.name}" is forbidden: this namespace may not be deleted')
        marked, gone = decide_deletion(resource, stored, options)
        if options.dry_run:
            return resource.convert(marked, target.version), gone
        if gone:
            written = await self._put(DELETED, target.key, marked)
            if resource.kind == "Service":
                self.addresses.free(stored.get("spec", {}).get("clusterIP") or "")
        elif same(marked, stored):
            written = stored
        else:
            written = await self._put(MODIFIED, target.key, marked)
        return resource.convert(written, target.version), gone

    async def replace_stored(self, key: Key, new: JSON) -> None:
        """Writes a stored form as it is: for the room's own controllers (garbage collector, namespaces, CRDs)."""
        old = self.store.latest(key)
        if old is not None and not same(new, old):
            await self._put(DELETED if finished(new) else MODIFIED, key, new)

    # Shared steps

    async def _put(self, kind: str, key: Key, obj: JSON) -> JSON:
        written, done = self.store.put(kind, key, obj)
        await asyncio.shield(done)
        return written

    def _known(self, target: Target, old: JSON) -> JSON | None:
        """What was checked in this very version when it was stored."""
        return old if target.version is target.resource.storage else None

    def _conform(
        self,
        target: Target,
        obj: JSON,
        options: WriteOptions,
        *,
        name: str = "",
        complete: bool = True,
        known: JSON | None = None,
    ) -> JSON:
        """Prunes, checks types and fills defaults; unknown fields are reported as the options say."""
        resource, version = target.resource, target.version
        done = conform(obj, version.schema, builtin=resource.builtin, defaults=complete, required=complete, known=known)
        out: JSON = done.object
        name = name or str((obj.get("metadata") or {}).get("name") or "")
        report_unknown(resource, version, done.unknown, options)
        if done.causes:
            wrong = [c for c in done.causes if c.reason == "FieldValueTypeInvalid"]
            if wrong and resource.builtin:
                raise bad_request(decode_error(resource, version, wrong[0]))
            raise invalid(resource.kind, resource.group, name, done.causes)
        out["apiVersion"], out["kind"] = version.api_version, resource.kind
        if complete and resource.builtin and version.group == resource.group:
            defaults.apply_defaults(resource.kind, out)
        mutate = self._mutators.get(resource.store_name)
        return mutate(out) if mutate and complete else out


def _as_stored(target: Target, obj: JSON) -> JSON:
    """What storage gives back for a custom object: what another version leaves out and conversion fills in is no change."""
    resource = target.resource
    if resource.builtin or target.version is resource.storage:
        return obj
    return resource.convert(resource.convert(obj, resource.storage), target.version)
