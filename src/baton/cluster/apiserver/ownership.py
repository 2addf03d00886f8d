"""Server-side apply and managedFields: who owns which field, conflicts, and what goes when an owner lets go.

Owns `track_update` (create, update, patch) and `apply` (apply-patch). The rules are those of Kubernetes'
structured-merge-diff. Not here: the algebra of field sets (see `fieldset`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from baton.cluster.apiserver import fieldset
from baton.cluster.apiserver.errors import StatusError
from baton.cluster.apiserver.fieldset import FieldSet
from baton.cluster.apiserver.metadata import timestamp
from baton.cluster.apiserver.resources import Resource, Version
from baton.cluster.apiserver.schema import ANY, Schema

JSON = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Manager:
    """One owner. Two operations of the same name, or of two apiVersions, are different owners."""

    name: str
    operation: str  # Apply or Update
    api_version: str
    subresource: str = ""

    def is_same_applier(self, other: Manager) -> bool:
        return replace(self, api_version="") == replace(other, api_version="")


@dataclass(slots=True)
class _Owned:
    fields: FieldSet
    time: str


Owners = dict[Manager, _Owned]


def owners_of(metadata: JSON) -> Owners:
    out: Owners = {}
    for entry in metadata.get("managedFields") or ():
        manager = Manager(
            entry.get("manager", ""),
            entry.get("operation", "Update"),
            entry.get("apiVersion", ""),
            entry.get("subresource", ""),
        )
        out[manager] = _Owned(entry.get("fieldsV1") or {}, entry.get("time", ""))
    return out


def entries(owners: Owners) -> list[JSON]:
    """The managedFields list; owners of nothing are left out."""
    out = []
    for manager, owned in owners.items():
        if not owned.fields:
            continue
        entry = {
            "manager": manager.name,
            "operation": manager.operation,
            "apiVersion": manager.api_version,
            "time": owned.time,
            "fieldsType": "FieldsV1",
            "fieldsV1": owned.fields,
        }
        if manager.subresource:
            entry["subresource"] = manager.subresource
        out.append(entry)
    return sorted(out, key=lambda e: (e["operation"], e["time"], e["manager"], e["apiVersion"]))


class _Comparisons:
    """`old` against `new` in each apiVersion that some owner speaks, computed once."""

    def __init__(self, resource: Resource, version: Version, old: JSON, new: JSON) -> None:
        self._resource, self._version, self._old, self._new = resource, version, old, new
        self._done: dict[str, fieldset.Comparison | None] = {}

    def get(self, api_version: str) -> fieldset.Comparison | None:
        """None when the version is no longer served (its owners are then dropped)."""
        if api_version not in self._done:
            self._done[api_version] = self._compare(api_version)
        return self._done[api_version]

    def _compare(self, api_version: str) -> fieldset.Comparison | None:
        version = self._resource.find_version(api_version)
        if version is None:
            return None
        old, new = self._old, self._new
        if version is not self._version:
            old, new = self._resource.convert(old, version), self._resource.convert(new, version)
        return fieldset.Comparison(*(fieldset.owned(s) for s in fieldset.compare(old, new, version.schema)))


def track_update(resource: Resource, version: Version, old: JSON | None, new: JSON, manager: Manager) -> list[JSON]:
    """managedFields after `manager` changed `old` (None: created) into `new`, both in `version`.

    A client may replace or clear the list itself (`metadata.managedFields: []` or `[{}]` clears it).
    """
    given = new["metadata"].get("managedFields")
    before = (old or {}).get("metadata", {}).get("managedFields")
    cleared = given == [{}] or (given == [] and bool(before))
    owners = owners_of({"managedFields": [] if cleared else given if given is not None else before})
    if cleared:
        return []
    base = old if old is not None else {"metadata": {}, "spec": {}, "status": {}}
    comparisons = _Comparisons(resource, version, base, new)
    mine = comparisons.get(manager.api_version)
    if mine is None:
        return entries(owners)
    changed = fieldset.union(mine.added, mine.modified)
    _take_away(owners, comparisons, manager)
    had = owners.get(manager)
    fields = fieldset.difference(fieldset.union(had.fields if had else {}, changed), mine.removed)
    if had is None or fields != had.fields:
        owners[manager] = _Owned(fields, timestamp())
    return entries(owners)


def _take_away(owners: Owners, comparisons: _Comparisons, manager: Manager) -> None:
    """Fields that were changed or removed leave the sets of all other owners."""
    for other in list(owners):
        seen = comparisons.get(other.api_version)
        if seen is None:
            del owners[other]
        elif other != manager:
            left = fieldset.difference(owners[other].fields, fieldset.union(seen.added, seen.modified))
            owners[other].fields = fieldset.difference(left, seen.removed)


@dataclass(frozen=True, slots=True)
class Applied:
    """What an apply makes of the live object: content (not yet defaulted) and owners to be written with it."""

    object: JSON
    owners: Owners


def merge_applied(resource: Resource, version: Version, live: JSON, config: JSON, manager: Manager) -> Applied:
    """First half of an apply: the live object with `config` merged in and what the applier let go taken out."""
    schema = version.schema
    owners = owners_of(live["metadata"])
    last: FieldSet = {}
    for known in [m for m in owners if m.is_same_applier(manager)]:
        last = fieldset.union(last, owners.pop(known).fields)
    fields = fieldset.owned(fieldset.fields_of(config, schema))
    owners[manager] = _Owned(fields, timestamp())
    merged = _merge_map(live, config, schema)
    gone = fieldset.difference(last, fields)
    for owned in owners.values():
        gone = fieldset.difference(gone, owned.fields)
    if gone:
        kept: FieldSet = {}
        for owned in owners.values():
            kept = fieldset.union(kept, owned.fields)
        merged = _without(merged, gone, kept, schema)
    return Applied(merged, owners)


def settle_conflicts(
    resource: Resource, version: Version, live: JSON, new: JSON, applied: Applied, manager: Manager, *, force: bool
) -> list[JSON]:
    """Second half: managedFields of the result, or 409 when fields of others would change without `force`."""
    comparisons = _Comparisons(resource, version, live, new)
    clashes: dict[Manager, FieldSet] = {}
    mine = applied.owners[manager].fields
    for other, owned in applied.owners.items():
        seen = comparisons.get(other.api_version)
        if other == manager or seen is None:
            continue
        clash = fieldset.intersection(owned.fields, fieldset.union(seen.added, seen.modified))
        # Only what the applier itself names can clash; a default that follows from it cannot.
        if other.api_version == manager.api_version:
            clash = fieldset.intersection(clash, mine)
        if clash:
            clashes[other] = clash
    if clashes and not force:
        raise conflict_error(resource, clashes)
    _take_away(applied.owners, comparisons, manager)
    before = owners_of(live["metadata"]).get(manager)
    if before is not None and before.fields == mine:
        applied.owners[manager].time = before.time
    return entries(applied.owners)


def conflict_error(resource: Resource, clashes: dict[Manager, FieldSet]) -> StatusError:
    """409 as kubectl shows it: each owner with its fields, and one cause per field."""
    causes, lines, count = [], [], 0
    for manager in sorted(clashes, key=lambda m: (m.name, m.operation)):
        who = f'conflict with "{manager.name}"'
        if manager.subresource:
            who += f' with subresource "{manager.subresource}"'
        if manager.operation == "Update":
            who += f" using {manager.api_version}"
        fields = sorted(fieldset.paths(clashes[manager]))
        count += len(fields)
        lines.append((who, fields))
        causes += [{"reason": "FieldManagerConflict", "message": who, "field": f} for f in fields]
    if count == 1:
        text = f"{lines[0][0]}: {lines[0][1][0]}"
    else:
        text = "\n".join(
            f"conflicts with {who.removeprefix('conflict with ')}:\n" + "\n".join(f"- {f}" for f in fs)
            for who, fs in lines
        )
    plural = "conflict" if count == 1 else "conflicts"
    message = f"Apply failed with {count} {plural}: {text}"
    return StatusError(409, "Conflict", message, {"causes": causes})


# Merging


def _merge_map(live: JSON, config: JSON, schema: Schema) -> JSON:
    out = dict(live)
    for name, value in config.items():
        child = fieldset.child_schema(schema, name)
        out[name] = _merge(out.get(name), value, child)
    return out


def _merge(live: Any, value: Any, schema: Schema) -> Any:
    if not fieldset.is_granular(value, schema) or type(live) is not type(value):
        return value
    if isinstance(value, dict):
        return _merge_map(live, value, schema)
    return _merge_list(live, value, schema)


def _merge_list(live: list[Any], value: list[Any], schema: Schema) -> list[Any]:
    """The applied order; items that only the live object has stay before the item they stood before."""
    items = schema.items or ANY
    was, now = fieldset.by_element(live, schema), fieldset.by_element(value, schema)
    order, position = list(was), 0
    out: list[Any] = []
    done: set[str] = set()
    for element, item in now.items():
        while position < len(order) and (order[position] not in now or order[position] in done):
            if order[position] not in now:
                out.append(was[order[position]])
            position += 1
        out.append(_merge(was.get(element), item, items))
        done.add(element)
    return out + [was[e] for e in order[position:] if e not in now]


def _without(value: Any, gone: FieldSet, kept: FieldSet, schema: Schema) -> Any:
    """`value` less the members of `gone`, except where `kept` still has something below."""
    if isinstance(value, list):
        return _list_without(value, gone, kept, schema)
    if not isinstance(value, dict):
        return value
    out = dict(value)
    for element, node in gone.items():
        name = element[2:]
        if not element.startswith("f:") or name not in out:
            continue
        left = _part_without(out[name], node, kept.get(element), fieldset.child_schema(schema, name))
        if left is _GONE:
            del out[name]
        else:
            out[name] = left
    return out


_GONE = object()


def _part_without(value: Any, node: FieldSet, kept: FieldSet | None, schema: Schema) -> Any:
    if kept is None and fieldset.is_member(node):
        return _GONE
    left = _without(value, {k: v for k, v in node.items() if k != "."}, kept or {}, schema)
    return _GONE if kept is None and left in ({}, []) else left


def _list_without(value: list[Any], gone: FieldSet, kept: FieldSet, schema: Schema) -> list[Any]:
    out = []
    for item in value:
        element = fieldset.item_element(item, schema)
        left = item
        if element in gone:
            left = _part_without(item, gone[element], kept.get(element), schema.items or ANY)
        if left is not _GONE:
            out.append(left)
    return out
