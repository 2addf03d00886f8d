"""CustomResourceDefinition manifests generated from the types: structural schema, columns, subresources.

Nothing is written by hand that a type already says. Templates and patches of pods stay open
(`x-kubernetes-preserve-unknown-fields`): their schema is the API server's own.
"""

from __future__ import annotations

from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Le, MinLen
from pydantic.fields import FieldInfo

from baton.api import labels, v1alpha1, v1alpha2
from baton.api.resources import Object
from baton.api.wire import Model

_OPEN: Object = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
# Lists that Kubernetes should merge by key under server-side apply.
_LIST_MAPS = {"roles": "name", "roleTemplates": "name"}

_COLUMNS: list[Object] = [
    {"name": "Ready", "type": "string", "jsonPath": '.status.conditions[?(@.type=="Ready")].status'},
    {"name": "Pods", "type": "string", "jsonPath": ".status.pods", "description": "ready pods of wanted pods"},
    {"name": "Hold", "type": "string", "jsonPath": ".status.hold", "description": "what the group waits for"},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
]


def crd_manifests(conversion_webhook: Object | None = None) -> list[Object]:
    """The CRDs to install, v1alpha2 stored and v1alpha1 served.

    ``conversion_webhook`` is a `spec.conversion.webhook` (client config and review versions). Without one the result
    is right only for a server that converts by itself, as the embedded one does; see :func:`without_conversion`.
    """
    conversion: Object = {"strategy": "None"}
    if conversion_webhook is not None:
        conversion = {"strategy": "Webhook", "webhook": conversion_webhook}
    names = {
        "plural": "rolebasedgroups",
        "singular": "rolebasedgroup",
        "kind": "RoleBasedGroup",
        "listKind": "RoleBasedGroupList",
        "shortNames": ["rbg"],
        "categories": ["all"],
    }
    return [
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"rolebasedgroups.{labels.GROUP}"},
            "spec": {
                "group": labels.GROUP,
                "scope": "Namespaced",
                "names": names,
                "conversion": conversion,
                "versions": [
                    _version("v1alpha2", v1alpha2.Spec, storage=True),
                    _version("v1alpha1", v1alpha1.Spec, storage=False),
                ],
            },
        }
    ]


def without_conversion(manifests: list[Object]) -> list[Object]:
    """For a server that cannot convert: only the stored version is served."""
    return [
        {
            **crd,
            "spec": {
                **crd["spec"],
                "versions": [{**v, "served": v["storage"]} for v in crd["spec"]["versions"]],
            },
        }
        for crd in manifests
    ]


def _version(name: str, spec: type[Model], *, storage: bool) -> Object:
    return {
        "name": name,
        "served": True,
        "storage": storage,
        "subresources": {"status": {}},
        "additionalPrinterColumns": _COLUMNS,
        "schema": {
            "openAPIV3Schema": {
                "type": "object",
                "required": ["spec"],
                "properties": {
                    "apiVersion": {"type": "string"},
                    "kind": {"type": "string"},
                    "metadata": {"type": "object"},
                    "spec": schema_of(spec),
                    "status": dict(_OPEN),
                },
            }
        },
    }


def schema_of(model: type[Model]) -> Object:
    """The structural OpenAPI v3 schema of a type, from its fields, defaults and bounds. Defaults are not written into
    the schema: they would be written into every object, and a conversion could not tell them from choices."""
    properties: Object = {}
    required: list[str] = []
    for name, field in model.model_fields.items():
        alias = field.alias or name
        schema = _field_schema(field)
        if alias in _LIST_MAPS:
            schema |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [_LIST_MAPS[alias]]}
        properties[alias] = schema
        if field.is_required():
            required.append(alias)
    result: Object = {"type": "object", "properties": properties}
    if model.__doc__ and not model.__doc__.startswith("Frozen;"):
        result["description"] = " ".join(model.__doc__.split())
    if required:
        result["required"] = required
    return result


def _field_schema(field: FieldInfo) -> Object:
    schema = _type_schema(field.annotation)
    for rule in field.metadata:
        if isinstance(rule, Ge):
            schema["minimum"] = rule.ge
        elif isinstance(rule, Le):
            schema["maximum"] = rule.le
        elif isinstance(rule, MinLen):
            schema["minLength" if schema.get("type") == "string" else "minItems"] = rule.min_length
        elif getattr(rule, "pattern", None):
            schema["pattern"] = rule.pattern
    return schema


def _type_schema(annotation: Any) -> Object:
    origin, args = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _annotated_schema(annotation)
    if origin is Literal:
        return {"type": "string", "enum": list(args)}
    if origin is Union or str(origin) == "<class 'types.UnionType'>":
        return _union_schema([arg for arg in args if arg is not NoneType])
    if origin is list:
        return {"type": "array", "items": _type_schema(args[0])}
    if origin is dict:
        if args[1] is str:
            return {"type": "object", "additionalProperties": {"type": "string"}}
        return dict(_OPEN)
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return schema_of(annotation)
    simple = {str: "string", int: "integer", bool: "boolean"}
    return {"type": simple[annotation]}


def _annotated_schema(annotation: Any) -> Object:
    field = FieldInfo.from_annotation(annotation)
    return _field_schema(field)


def _union_schema(members: list[Any]) -> Object:
    if set(members) == {int, str}:
        return {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}
    schemas = [_type_schema(member) for member in members]
    if len(schemas) > 1:  # several Literals: one enum
        return {"type": "string", "enum": [value for schema in schemas for value in schema["enum"]]}
    return schemas[0]
