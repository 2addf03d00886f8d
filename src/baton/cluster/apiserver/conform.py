"""Makes an incoming object fit its schema in one walk: unknown fields out, types checked, defaults in.

Owns `conform` and its result. Kubernetes does this in Go's decoder (built-in kinds) and in structural schemas (CRDs);
the differences that users see are kept: a built-in kind takes `null` as "not given", a CRD reports every wrong type
as a cause. Defaults that depend on other fields are in `defaults`, rules between fields in `rules_*`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from baton.cluster.apiserver.errors import Cause
from baton.cluster.apiserver.limits import check_limits
from baton.cluster.apiserver.schema import ABSENT, Schema

JSON = dict[str, Any]
QUANTITY = re.compile(r"^[+-]?(\d+|\d+\.\d*|\.\d+)([eE][+-]?\d+|[KMGTPE]i|[numkMGTPE])?$")
_ALWAYS_KNOWN = ("apiVersion", "kind", "metadata")


@dataclass(slots=True)
class Conformed:
    """`object` is a new object; `unknown` the paths dropped; `causes` what does not fit."""

    object: Any = None
    unknown: list[str] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)


@dataclass(slots=True)
class _Walk:
    builtin: bool
    defaults: bool
    required: bool
    result: Conformed


def conform(
    obj: JSON,
    schema: Schema,
    *,
    builtin: bool,
    defaults: bool = True,
    required: bool = True,
    known: JSON | None = None,
) -> Conformed:
    """Fits `obj` to `schema`. `defaults=False, required=False` is for the partial objects of server-side apply.

    Fields (other than metadata) that equal those of `known`, the stored object, fit already and are taken over as
    they are: most writes change one part of an object. Free-form values are shared with the input, not copied.
    """
    result = Conformed()
    walk = _Walk(builtin, defaults, required, result)
    same = {k: v for k, v in (known or {}).items() if k != "metadata" and k in obj and obj[k] == v}
    if same:
        rest = {k: v for k, v in obj.items() if k not in same}
        result.object = _object(rest, schema, "", walk, present=same)
    else:
        result.object = _node(obj, schema, "", walk)
    return result


def _node(value: Any, schema: Schema, path: str, walk: _Walk) -> Any:
    kind = schema.type
    if kind == "object":
        if not isinstance(value, dict):
            return _wrong(value, "object", path, walk)
        out: Any = _object(value, schema, path, walk)
    elif kind == "array":
        if not isinstance(value, list):
            return _wrong(value, "array", path, walk)
        out = _array(value, schema, path, walk)
    elif kind == "any":
        out = value
    else:
        out = _scalar(value, kind, path, walk)
    if schema.limits is not None:
        walk.result.causes += check_limits(out, schema.limits, path)
    return out


def _object(value: JSON, schema: Schema, path: str, walk: _Walk, present: JSON | None = None) -> JSON:
    """`present` are fields that need no look."""
    out: JSON = dict(present) if present else {}
    properties, additional = schema.properties, schema.additional
    for name, child in value.items():
        child_schema = properties.get(name) or additional
        if child_schema is None:
            if schema.preserve_unknown or (schema.embedded_resource and name in _ALWAYS_KNOWN):
                out[name] = child
            else:
                walk.result.unknown.append(_join(path, name))
            continue
        if child is None and not child_schema.nullable and (walk.builtin or child_schema.default is not ABSENT):
            if additional is not None and child_schema.type == "string":
                out[name] = ""
            continue
        if child is None and child_schema.nullable:
            out[name] = None
            continue
        out[name] = _node(child, child_schema, _join(path, name), walk)
    if walk.defaults:
        for name in schema.defaulted:
            if name not in out:
                default = properties[name].default
                out[name] = _node(default, properties[name], _join(path, name), walk) if default is not None else None
    if walk.required and schema.required:
        _required(out, schema, path, walk)
    return out


def _required(out: JSON, schema: Schema, path: str, walk: _Walk) -> None:
    # Go's zero values stand in for what a built-in status lacks, so only what users write is held to be complete.
    if walk.builtin and path.startswith("status"):
        return
    for name in schema.required:
        missing = name not in out or (walk.builtin and out[name] in ("", [], None))
        if missing and not (walk.builtin and schema.properties[name].type in ("integer", "boolean", "time")):
            walk.result.causes.append(Cause.required(_join(path, name)))


def _array(value: list[Any], schema: Schema, path: str, walk: _Walk) -> list[Any]:
    items = schema.items
    if items is None:
        return value
    out: list[Any] = []
    for index, item in enumerate(value):
        here = f"{path}[{index}]"
        if item is None and walk.builtin:
            item = {} if items.type == "object" else "" if items.type == "string" else None
        if item is None and items.nullable:
            out.append(None)
            continue
        out.append(_node(item, items, here, walk))
    if schema.list_type != "atomic" and not (walk.builtin and schema.merge_key and "metadata" not in path):
        _unique(out, schema, path, walk)
    return out


def _unique(items: list[Any], schema: Schema, path: str, walk: _Walk) -> None:
    """Sets and list-maps of CRDs must not repeat an item; built-in kinds have their own rules for names."""
    seen: list[Any] = []
    for index, item in enumerate(items):
        identity = (
            item if schema.list_type == "set" or not isinstance(item, dict) else [item.get(k) for k in schema.list_keys]
        )
        if identity in seen:
            shown = item if schema.list_type == "set" else dict(zip(schema.list_keys, identity, strict=True))
            walk.result.causes.append(Cause.duplicate(f"{path}[{index}]", shown))
        seen.append(identity)


def _scalar(value: Any, kind: str, path: str, walk: _Walk) -> Any:
    if kind in ("string", "time", "bytes"):
        return value if isinstance(value, str) else _wrong(value, "string", path, walk)
    if kind == "integer":
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return _wrong(value, "integer", path, walk)
    if kind == "boolean":
        return value if isinstance(value, bool) else _wrong(value, "boolean", path, walk)
    if kind == "number":
        good = isinstance(value, int | float) and not isinstance(value, bool)
        return value if good else _wrong(value, "number", path, walk)
    if kind == "intOrString":
        good = isinstance(value, int | str) and not isinstance(value, bool)
        return value if good else _wrong(value, "integer or string", path, walk)
    return _quantity(value, path, walk)


def _quantity(value: Any, path: str, walk: _Walk) -> Any:
    """`4`, `0.5`, `"16Gi"`: kept as text, since every reader of a quantity reads text."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if isinstance(text, str) and QUANTITY.match(text):
        return text
    detail = "quantities must match the regular expression '" + r"^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$" + "'"
    walk.result.causes.append(Cause.invalid(path, value, detail))
    return value


def _wrong(value: Any, expected: str, path: str, walk: _Walk) -> Any:
    walk.result.causes.append(Cause.wrong_type(path, value, expected))
    return value


def _join(path: str, name: str) -> str:
    if not path:
        return name
    return f"{path}.{name}" if "." not in name and "/" not in name else f"{path}[{name}]"
