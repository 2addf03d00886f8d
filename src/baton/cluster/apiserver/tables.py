"""Tables: what `kubectl get` prints, made by the server.

Owns `table` and `partial`, and the columns of CRDs. Columns of built-in kinds are in `table_rows`. Not here: JSONPath
itself (see `jsonpath`).
"""

from __future__ import annotations

from typing import Any

from baton.cluster.apiserver.ages import age
from baton.cluster.apiserver.jsonpath import find
from baton.cluster.apiserver.resources import Column, Resource, Version
from baton.cluster.apiserver.table_rows import BUILTIN_TABLES

JSON = dict[str, Any]
_NAME = Column(
    "Name", format="name", description="Name must be unique within a namespace. It cannot be changed once set."
)
_DEFAULT = ([_NAME, Column("Age")], lambda o: [o["metadata"]["name"], age(o["metadata"].get("creationTimestamp"))])


def table(resource: Resource, version: Version, objects: list[JSON], meta: JSON, include: str) -> JSON:
    """A meta.k8s.io/v1 Table. `include` is None, Metadata or Object."""
    if version.columns is not None:
        columns = [_NAME, *version.columns]
        rows = [[o["metadata"]["name"], *(_cell(o, c) for c in version.columns)] for o in objects]
    else:
        columns, cells = BUILTIN_TABLES.get(resource.kind, _DEFAULT) if resource.builtin else _DEFAULT
        if resource.kind == "Event" and version.group:
            objects_for_cells = [resource.convert(o, resource.storage) for o in objects]
        else:
            objects_for_cells = objects
        rows = [cells(o) for o in objects_for_cells]
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": meta,
        "columnDefinitions": [
            {"name": c.name, "type": c.type, "format": c.format, "description": c.description, "priority": c.priority}
            for c in columns
        ],
        "rows": [{"cells": r, "object": _included(o, include)} for r, o in zip(rows, objects, strict=True)],
    }


def _included(obj: JSON, include: str) -> JSON | None:
    if include == "None":
        return None
    return obj if include == "Object" else partial(obj)


def partial(obj: JSON) -> JSON:
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}


def _cell(obj: JSON, column: Column) -> Any:
    """A CRD cell: the first value at the path, by the column's type; null when there is none."""
    found = find(obj, column.path)
    if not found or found[0] is None:
        return None
    value = found[0]
    if column.type == "date":
        return age(value) if isinstance(value, str) else None
    if column.type == "string":
        if isinstance(value, bool):
            return "true" if value else "false"
        return value if isinstance(value, str) else _text(found if len(found) > 1 else value)
    if column.type == "integer":
        return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    if column.type == "number":
        return float(value) if isinstance(value, int | float) else None
    return value if isinstance(value, bool) else None


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "[" + " ".join(_text(v) for v in value) + "]"
    if isinstance(value, dict):
        return "map[" + " ".join(f"{k}:{_text(v)}" for k, v in sorted(value.items())) + "]"
    return str(value)
