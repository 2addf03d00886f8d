"""OpenAPI v3: enough for kubectl's validation to hand over to the server, and for `kubectl explain`.

Owns the index and one document per group-version, made from the schemas that also judge writes. OpenAPI v2 is an
empty document: kubectl falls back to it only when v3 lacks something. Not here: discovery.
"""

from __future__ import annotations

import hashlib
from typing import Any

from baton.cluster.apiserver.errors import no_such_resource
from baton.cluster.apiserver.http import Request, dump, send_bytes
from baton.cluster.apiserver.resources import Registry, Resource, Version
from baton.cluster.apiserver.schema import ABSENT, Schema
from baton.cluster.apiserver.schema_text import builtin_types

JSON = dict[str, Any]
_SIMPLE = {"string": "string", "integer": "integer", "number": "number", "boolean": "boolean"}
_REF = "#/components/schemas/"


class OpenApi:
    """The documents, kept until the registry changes."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._made_for = registry, -1
        self._documents: dict[str, bytes] = {}

    def _refresh(self) -> None:
        if self._made_for == self._registry.changed:
            return
        self._made_for = self._registry.changed
        documents = {}
        for group, versions in self._registry.groups().items():
            for version, resources in versions.items():
                path = f"apis/{group}/{version}" if group else f"api/{version}"
                documents[path] = dump(_document(resources))
        self._documents = documents

    async def send_index(self, request: Request) -> None:
        self._refresh()
        paths = {
            path: {"serverRelativeURL": f"{request.prefix}/openapi/v3/{path}?hash={_hash(body)}"}
            for path, body in sorted(self._documents.items())
        }
        await send_bytes(request, 200, dump({"paths": paths}))

    async def send_document(self, request: Request, path: str) -> None:
        self._refresh()
        body = self._documents.get(path)
        if body is None:
            raise no_such_resource()
        tag = f'"{_hash(body)}"'
        headers = {"ETag": tag, "Vary": "Accept"}
        if request.query.get("hash") == _hash(body):
            headers["Cache-Control"] = "public, immutable"
            headers["Expires"] = "Thu, 31 Dec 2099 23:59:59 GMT"
        if request.headers.get("if-none-match") == tag:
            await send_bytes(request, 304, b"", headers=headers)
            return
        await send_bytes(request, 200, body, headers=headers)


# A protobuf Document with swagger "2.0", the title and version, and no paths.
_EMPTY_V2 = b"\x0a\x032.0\x12\x15\x0a\x0aKubernetes\x12\x07v1.36.2"
_V2_TYPE = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"


async def send_openapi_v2(request: Request) -> None:
    """An empty document: kubectl asks for v2 only about kinds that v3 lacks, and a refusal would hide that."""
    if "protobuf" in request.headers.get("accept", ""):
        await send_bytes(request, 200, _EMPTY_V2, content_type=_V2_TYPE)
        return
    info = {"title": "Kubernetes", "version": "v1.36.2"}
    await send_bytes(request, 200, dump({"swagger": "2.0", "info": info, "paths": {}, "definitions": {}}))


def _hash(body: bytes) -> str:
    return hashlib.sha512(body).hexdigest().upper()


def _document(resources: list[tuple[Resource, Version]]) -> JSON:
    paths: JSON = {}
    components: JSON = {}
    for resource, version in resources:
        ref = _component(resource, version, components)
        base = f"/apis/{version.group}/{version.version}" if version.group else f"/api/{version.version}"
        scope = "/namespaces/{namespace}" if resource.namespaced else ""
        collection = f"{base}{scope}/{resource.plural}"
        gvk = {"group": version.group, "version": version.version, "kind": resource.kind}
        paths[collection] = {
            "get": _operation(gvk, ref, "list"),
            "post": _operation(gvk, ref, "post", body=True),
        }
        paths[collection + "/{name}"] = {
            "get": _operation(gvk, ref, "get"),
            "put": _operation(gvk, ref, "put", body=True),
            "patch": _operation(gvk, ref, "patch", body=True),
            "delete": _operation(gvk, ref, "delete"),
        }
    info = {"title": "Kubernetes", "version": "v1.36.2"}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": components}}


def _operation(gvk: JSON, ref: str, action: str, *, body: bool = False) -> JSON:
    names = ["dryRun", "fieldManager", "fieldValidation"] if body else []
    if action == "patch":
        names.append("force")
    content = {"application/json": {"schema": {"$ref": ref}}}
    out: JSON = {
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": gvk,
        "parameters": [{"name": n, "in": "query", "schema": {"type": "string"}} for n in names],
        "responses": {"200": {"description": "OK", "content": content}},
    }
    if body:
        out["requestBody"] = {"content": content}
    return out


def _component(resource: Resource, version: Version, components: JSON) -> str:
    gvk = {"group": version.group, "version": version.version, "kind": resource.kind}
    if resource.builtin:
        node = _struct(version.schema, components)
        name = _type_name(version.schema)
    else:
        domain = ".".join(reversed(version.group.split(".")))
        name = f"{domain}.{version.version}.{resource.kind}"
        node = components[name] = _object(version.schema, components)
    described = components[name]
    described.setdefault("x-kubernetes-group-version-kind", [])
    if gvk not in described["x-kubernetes-group-version-kind"]:
        described["x-kubernetes-group-version-kind"].append(gvk)
    assert node is not None
    return _REF + name


def _type_name(schema: Schema) -> str:
    shared = schema.name in ("ObjectMeta", "OwnerReference", "LabelSelector", "ManagedFieldsEntry", "Condition")
    return f"io.k8s.apimachinery.meta.v1.{schema.name}" if shared else f"io.k8s.api.v1.{schema.name}"


def _struct(schema: Schema, components: JSON) -> JSON:
    """A reference to a named struct, which is written once."""
    name = _type_name(schema)
    if name not in components:
        components[name] = {}
        components[name] = _object(schema, components)
    return {"allOf": [{"$ref": _REF + name}]}


def _object(schema: Schema, components: JSON) -> JSON:
    out: JSON = {"type": "object"}
    if schema.description:
        out["description"] = schema.description
    if schema.properties:
        out["properties"] = {k: _node(v, components) for k, v in schema.properties.items()}
    if schema.additional is not None:
        out["additionalProperties"] = _node(schema.additional, components)
    if schema.required:
        out["required"] = list(schema.required)
    if schema.map_atomic:
        out["x-kubernetes-map-type"] = "atomic"
    if schema.preserve_unknown:
        out["x-kubernetes-preserve-unknown-fields"] = True
    return out


def _node(schema: Schema, components: JSON) -> JSON:
    if schema.type == "object":
        if schema.name and schema is builtin_types().get(schema.name):
            return _struct(schema, components)
        out = _object(schema, components)
    elif schema.type == "array":
        out = {"type": "array", "items": _node(schema.items, components) if schema.items else {}}
        out["x-kubernetes-list-type"] = schema.list_type
        if schema.list_keys:
            out["x-kubernetes-list-map-keys"] = list(schema.list_keys)
        if schema.merge_key is not None:
            out["x-kubernetes-patch-strategy"] = "merge,retainKeys" if schema.retain_keys else "merge"
            if schema.merge_key:
                out["x-kubernetes-patch-merge-key"] = schema.merge_key
    else:
        out = _scalar(schema)
    if schema.description:
        out["description"] = schema.description
    if schema.default is not ABSENT and not schema.name:
        out["default"] = schema.default
    if schema.limits is not None and schema.limits.enum is not None:
        out["enum"] = schema.limits.enum
    return out


def _scalar(schema: Schema) -> JSON:
    if schema.type in _SIMPLE:
        return {"type": _SIMPLE[schema.type]}
    if schema.type == "time":
        return {"type": "string", "format": "date-time"}
    if schema.type == "bytes":
        return {"type": "string", "format": "byte"}
    if schema.type in ("quantity", "intOrString"):
        return {"oneOf": [{"type": "string"}, {"type": "integer"}]}
    return {"x-kubernetes-preserve-unknown-fields": True}
