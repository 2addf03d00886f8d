"""CustomResourceDefinition manifests generated from the types: structural schema, defaults, columns, subresources.

Nothing is written by hand that a type already says. Templates and patches of pods stay open
(`x-kubernetes-preserve-unknown-fields`): their schema is the API server's own.
"""

from __future__ import annotations

from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Le, MinLen
from pydantic.fields import FieldInfo

from baton.api import labels, lws, v1alpha1, v1alpha2
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
_LWS_COLUMNS: list[Object] = [
    {"name": "Ready", "type": "integer", "jsonPath": ".status.readyReplicas", "description": "ready groups"},
    {"name": "Desired", "type": "integer", "jsonPath": ".spec.replicas", "description": "wanted groups"},
    {"name": "Up-to-date", "type": "integer", "jsonPath": ".status.updatedReplicas", "description": "updated groups"},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    {"name": "Hold", "type": "string", "jsonPath": ".status.hold", "description": "what it waits for", "priority": 1},
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
        },
        _leader_worker_set(),
    ]


def _leader_worker_set() -> Object:
    """With its defaults, as upstream's has them: there is one version, so no conversion can mistake them for choices."""
    version = _version("v1", lws.Spec, storage=True, columns=_LWS_COLUMNS, defaults=True)
    version["subresources"]["scale"] = {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.hpaPodSelector",
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": lws.FULL_NAME},
        "spec": {
            "group": lws.GROUP,
            "scope": "Namespaced",
            "names": {
                "plural": "leaderworkersets",
                "singular": "leaderworkerset",
                "kind": "LeaderWorkerSet",
                "listKind": "LeaderWorkerSetList",
                "shortNames": ["lws"],
            },
            "conversion": {"strategy": "None"},
            "versions": [version],
        },
    }


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


def _version(
    name: str, spec: type[Model], *, storage: bool, columns: list[Object] = _COLUMNS, defaults: bool = False
) -> Object:
    return {
        "name": name,
        "served": True,
        "storage": storage,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
        "schema": {
            "openAPIV3Schema": {
                "type": "object",
                "required": ["spec"],
                "properties": {
                    "apiVersion": {"type": "string"},
                    "kind": {"type": "string"},
                    "metadata": {"type": "object"},
                    "spec": schema_of(spec, defaults=defaults),
                    "status": dict(_OPEN),
                },
            }
        },
    }


def schema_of(model: type[Model], *, defaults: bool = False) -> Object:
    """The structural OpenAPI v3 schema of a type, from its fields and bounds. With ``defaults`` they are in the schema,
    and so written into every object, where a conversion could not tell them from choices."""
    properties: Object = {}
    required: list[str] = []
    for name, field in model.model_fields.items():
        alias = field.alias or name
        schema = _field_schema(field, defaults)
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


def _field_schema(field: FieldInfo, defaults: bool) -> Object:
    schema = _type_schema(field.annotation, defaults)
    if defaults and not field.is_required() and field.default not in (None, [], {}):
        default = field.default
        schema["default"] = default.wire() if isinstance(default, Model) else default
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


def _type_schema(annotation: Any, defaults: bool) -> Object:
    origin, args = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _annotated_schema(annotation, defaults)
    if origin is Literal:
        return {"type": "string", "enum": list(args)}
    if origin is Union or str(origin) == "<class 'types.UnionType'>":
        return _union_schema([arg for arg in args if arg is not NoneType], defaults)
    if origin is list:
        return {"type": "array", "items": _type_schema(args[0], defaults)}
    if origin is dict:
        if args[1] is str:
            return {"type": "object", "additionalProperties": {"type": "string"}}
        return dict(_OPEN)
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return schema_of(annotation, defaults=defaults)
    simple = {str: "string", int: "integer", bool: "boolean"}
    return {"type": simple[annotation]}


def _annotated_schema(annotation: Any, defaults: bool) -> Object:
    field = FieldInfo.from_annotation(annotation)
    return _field_schema(field, defaults)


def _union_schema(members: list[Any], defaults: bool) -> Object:
    if set(members) == {int, str}:
        return {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}
    schemas = [_type_schema(member, defaults) for member in members]
    if len(schemas) > 1:  # several Literals: one enum
        return {"type": "string", "enum": [value for schema in schemas for value in schema["enum"]]}
    return schemas[0]
