"""Turns a CustomResourceDefinition's `openAPIV3Schema` into a `Schema`.

Owns the structural schema rules that matter here and the errors for what breaks them. Not here: the CRD object's own
life (see `crd`).
"""

from __future__ import annotations

from typing import Any

from baton.cluster.apiserver.errors import Cause
from baton.cluster.apiserver.limits import limits_of
from baton.cluster.apiserver.schema import ABSENT, Schema
from baton.cluster.apiserver.schema_text import builtin_types

JSON = dict[str, Any]
_KINDS = ("object", "array", "string", "integer", "number", "boolean")


def crd_schema(js: JSON | None, path: str, causes: list[Cause]) -> Schema:
    """The schema of a CRD version; a CRD without one keeps every field. Problems are appended to `causes`."""
    root = _node(js, path, causes) if js else Schema("object", preserve_unknown=True)
    if root.type != "object":
        causes.append(Cause.invalid(f"{path}.type", root.type, 'must be "object" at the root'))
    root.properties = {
        **root.properties,
        "apiVersion": Schema("string"),
        "kind": Schema("string"),
        "metadata": builtin_types()["ObjectMeta"],
    }
    return root


def _node(js: JSON, path: str, causes: list[Cause]) -> Schema:
    kind = js.get("type", "")
    if js.get("x-kubernetes-int-or-string"):
        node = Schema("intOrString", limits=limits_of({k: v for k, v in js.items() if k != "anyOf"}))
        return _common(node, js)
    if not kind:
        if js.get("x-kubernetes-preserve-unknown-fields"):
            return _common(Schema("any", preserve_unknown=True), js)
        causes.append(Cause.required(f"{path}.type", "must not be empty for specified object fields"))
        return Schema("any")
    if kind not in _KINDS:
        causes.append(Cause.not_supported(f"{path}.type", kind, _KINDS))
        return Schema("any")
    node = Schema(kind, limits=limits_of(js), required=tuple(js.get("required", ())))
    if kind == "object":
        _object(node, js, path, causes)
    elif kind == "array":
        _array(node, js, path, causes)
    return _common(node, js)


def _common(node: Schema, js: JSON) -> Schema:
    node.default = js.get("default", ABSENT)
    node.nullable = bool(js.get("nullable"))
    node.description = js.get("description", "")
    return node


def _object(node: Schema, js: JSON, path: str, causes: list[Cause]) -> None:
    properties = js.get("properties") or {}
    node.properties = {k: _node(v, f"{path}.properties[{k}]", causes) for k, v in properties.items()}
    node.defaulted = tuple(k for k, v in properties.items() if "default" in v)
    additional = js.get("additionalProperties")
    if isinstance(additional, dict):
        node.additional = _node(additional, f"{path}.additionalProperties", causes)
    elif additional is True:
        node.additional = Schema("any", preserve_unknown=True)
    node.map_atomic = js.get("x-kubernetes-map-type") == "atomic"
    node.preserve_unknown = bool(js.get("x-kubernetes-preserve-unknown-fields"))
    node.embedded_resource = bool(js.get("x-kubernetes-embedded-resource"))


def _array(node: Schema, js: JSON, path: str, causes: list[Cause]) -> None:
    items = js.get("items")
    if not isinstance(items, dict):
        causes.append(Cause.required(f"{path}.items", "must be specified"))
        return
    node.items = _node(items, f"{path}.items", causes)
    node.list_type = js.get("x-kubernetes-list-type", "atomic")
    node.list_keys = tuple(js.get("x-kubernetes-list-map-keys", ()))
    if node.list_type not in ("atomic", "set", "map"):
        causes.append(Cause.not_supported(f"{path}.x-kubernetes-list-type", node.list_type, ("atomic", "map", "set")))
    if node.list_type == "map" and not node.list_keys:
        causes.append(Cause.required(f"{path}.x-kubernetes-list-map-keys", "must not be empty for a list map"))
