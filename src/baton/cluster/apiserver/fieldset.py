"""Sets of field paths in the FieldsV1 form, and how to get them from objects.

Owns the algebra (`union`, `difference`, `intersection`), `fields_of` (what an applied configuration names) and
`compare` (what an update changed). A set is the JSON of managedFields itself: keys are `f:name`, `k:{...}` and `v:...`;
an empty node, or one with ".", is a member; the root stands for no path. Not here: who owns what (see `ownership`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from baton.cluster.apiserver.schema import ABSENT, ANY, Schema

JSON = dict[str, Any]
FieldSet = dict[str, Any]


class Comparison(NamedTuple):
    """Paths that `new` has and `old` lacks, that differ, and that only `old` has."""

    added: FieldSet
    modified: FieldSet
    removed: FieldSet


# Algebra


def is_member(node: FieldSet) -> bool:
    return not node or "." in node


def _node(member: bool, children: FieldSet) -> FieldSet | None:
    if not children:
        return {} if member else None
    return {".": {}, **children} if member else children


def _children(node: FieldSet) -> FieldSet:
    return {k: v for k, v in node.items() if k != "."} if "." in node else node


def union(a: FieldSet, b: FieldSet) -> FieldSet:
    out = dict(a)
    for key, node in b.items():
        if key in out:
            old = out[key]
            joined = _node(is_member(old) or is_member(node), union(_children(old), _children(node)))
            out[key] = {} if joined is None else joined
        else:
            out[key] = node
    return out


def difference(a: FieldSet, b: FieldSet) -> FieldSet:
    out: FieldSet = {}
    for key, node in a.items():
        if key not in b:
            out[key] = node
            continue
        left = _node(is_member(node) and not is_member(b[key]), difference(_children(node), _children(b[key])))
        if left is not None:
            out[key] = left
    return out


def intersection(a: FieldSet, b: FieldSet) -> FieldSet:
    out: FieldSet = {}
    for key, node in a.items():
        if key in b:
            both = _node(is_member(node) and is_member(b[key]), intersection(_children(node), _children(b[key])))
            if both is not None:
                out[key] = both
    return out


def paths(fields: FieldSet, prefix: str = "") -> Iterator[str]:
    """Members as people read them: `.spec.containers[name="c"].image`."""
    for key, node in fields.items():
        if key == ".":
            continue
        here = prefix + _segment(key)
        if is_member(node):
            yield here
        yield from paths(_children(node), here)


def _segment(key: str) -> str:
    kind, _, rest = key.partition(":")
    if kind == "f":
        return f".{rest}"
    if kind == "k":
        keys = json.loads(rest)
        return "[" + ",".join(f"{k}={json.dumps(v)}" for k, v in sorted(keys.items())) + "]"
    return f"[={rest}]"


# Items of lists


def item_element(item: Any, schema: Schema) -> str:
    """The path element of one item of a list map (`k:`) or set (`v:`)."""
    if schema.list_type == "set" or not isinstance(item, dict):
        return "v:" + msgspec.json.encode(item).decode()
    items = schema.items or ANY
    keys = {}
    for name in sorted(schema.list_keys):
        value = item.get(name)
        if value is None and name in items.properties and items.properties[name].default is not ABSENT:
            value = items.properties[name].default
        if value is not None:
            keys[name] = value
    return "k:" + msgspec.json.encode(keys).decode()


def by_element(items: list[Any], schema: Schema) -> dict[str, Any]:
    """Items by path element in order; of duplicates the first counts."""
    out: dict[str, Any] = {}
    for item in items:
        out.setdefault(item_element(item, schema), item)
    return out


def child_schema(schema: Schema, name: str) -> Schema:
    """The schema of a field; fields of free-form objects are deduced (maps merge, lists are atomic)."""
    return schema.properties.get(name) or schema.additional or ANY


def is_granular(value: Any, schema: Schema) -> bool:
    """Whether the parts of `value` have owners of their own."""
    if isinstance(value, dict):
        return not schema.map_atomic and schema.type in ("object", "any")
    return isinstance(value, list) and schema.list_type in ("map", "set")


# From objects


def fields_of(config: JSON, schema: Schema) -> FieldSet:
    """What an applied configuration names: its leaves, and each item of a list map."""
    return {f"f:{k}": _applied(v, child_schema(schema, k)) for k, v in config.items()}


def _applied(value: Any, schema: Schema) -> FieldSet:
    if not value or not is_granular(value, schema):
        return {}
    if isinstance(value, dict):
        return {f"f:{k}": _applied(v, child_schema(schema, k)) for k, v in value.items()}
    out: FieldSet = {}
    for element, item in by_element(value, schema).items():
        inner = _applied(item, schema.items or ANY) if isinstance(item, dict) else {}
        out[element] = {".": {}, **inner} if inner else {}
    return out


def _whole(value: Any, schema: Schema) -> FieldSet:
    """A value that came or went: it and everything in it."""
    if not value or not is_granular(value, schema):
        return {}
    if isinstance(value, dict):
        return {".": {}, **{f"f:{k}": _whole(v, child_schema(schema, k)) for k, v in value.items()}}
    items = schema.items or ANY
    inner = {e: _whole(i, items) for e, i in by_element(value, schema).items()}
    return {".": {}, **inner}


def compare(old: JSON, new: JSON, schema: Schema) -> Comparison:
    out = Comparison({}, {}, {})
    if old is not new:
        _compare_maps(old, new, schema, out)
    return out


def _compare_maps(old: JSON, new: JSON, schema: Schema, out: Comparison) -> None:
    for name in old.keys() | new.keys():
        child = child_schema(schema, name)
        _compare_at(f"f:{name}", old.get(name, ABSENT), new.get(name, ABSENT), child, out)


def _compare_at(element: str, old: Any, new: Any, schema: Schema, out: Comparison) -> None:
    if old is new or old == new:
        return
    if old is ABSENT:
        out.added[element] = _whole(new, schema)
    elif new is ABSENT:
        out.removed[element] = _whole(old, schema)
    elif type(old) is not type(new) or not is_granular(new, schema):
        out.modified[element] = {}
    else:
        inner = Comparison({}, {}, {})
        if isinstance(new, dict):
            _compare_maps(old, new, schema, inner)
        else:
            was, now = by_element(old, schema), by_element(new, schema)
            items = schema.items or ANY
            for key in was.keys() | now.keys():
                _compare_at(key, was.get(key, ABSENT), now.get(key, ABSENT), items, inner)
        for whole, part in zip(out, inner, strict=True):
            if part:
                whole[element] = part


_UNOWNED: FieldSet = {
    "f:apiVersion": {},
    "f:kind": {},
    "f:metadata": {
        ".": {},
        **{
            f"f:{name}": {}
            for name in (
                "name", "namespace", "creationTimestamp", "selfLink", "uid", "generation", "managedFields",
                "resourceVersion", "deletionTimestamp", "deletionGracePeriodSeconds",
            )
        },
    },
}  # fmt: skip


def owned(fields: FieldSet) -> FieldSet:
    """`fields` without what nobody owns: type, identity and what the server writes, and bare spec and status."""
    out = difference(fields, _UNOWNED)
    for name in ("f:spec", "f:status"):
        if "." in out.get(name, {}):
            out[name] = _children(out[name])
    return out
