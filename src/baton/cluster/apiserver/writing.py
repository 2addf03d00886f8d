"""POST, PUT, PATCH and DELETE of objects: from HTTP to `Operations`.

Owns the choice of patch format and the answers of writes. Not here: what a write does (see `operations`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from baton.cluster.apiserver import tables
from baton.cluster.apiserver.deletion import DeleteOptions
from baton.cluster.apiserver.errors import Cause, bad_request, invalid, method_not_allowed, unsupported_media_type
from baton.cluster.apiserver.http import JSON_TYPE, YAML_TYPE, Request, decode, send_json
from baton.cluster.apiserver.operations import Operations
from baton.cluster.apiserver.patch import json_patch, merge_patch
from baton.cluster.apiserver.protobuf import PROTOBUF_TYPE, decode_protobuf
from baton.cluster.apiserver.reading import Selection, list_body, list_objects
from baton.cluster.apiserver.strategic import strategic_merge
from baton.cluster.apiserver.target import Target, WriteOptions

JSON = dict[str, Any]
JSON_PATCH, MERGE_PATCH = "application/json-patch+json", "application/merge-patch+json"
STRATEGIC_PATCH, APPLY_PATCH = "application/strategic-merge-patch+json", "application/apply-patch+yaml"
_BODY = (JSON_TYPE, YAML_TYPE, PROTOBUF_TYPE)


def write_options(request: Request) -> WriteOptions:
    """The query of a write; raises 422 for values that do not exist."""
    dry_run = request.text_list("dryRun")
    if any(v not in ("", "All") for v in dry_run):
        raise invalid("CreateOptions", "meta.k8s.io", "", [Cause.not_supported("dryRun", dry_run[0], ("All",))])
    validation = request.query.get("fieldValidation") or "Warn"
    if validation not in ("Ignore", "Warn", "Strict"):
        allowed = ("Ignore", "Strict", "Warn")
        raise invalid("CreateOptions", "meta.k8s.io", "", [Cause.not_supported("fieldValidation", validation, allowed)])
    return WriteOptions(request.manager, "All" in dry_run, validation, request.flag("force"), request.warnings)


async def answer(request: Request, target: Target, code: int, obj: JSON) -> None:
    """The object in the form the client asked for."""
    if request.form.table:
        meta = {"resourceVersion": obj["metadata"].get("resourceVersion", "")}
        obj = tables.table(target.resource, target.version, [obj], meta, request.form.include_object)
    elif request.form.metadata_only:
        obj = tables.partial(obj)
    await send_json(request, code, obj)


async def body_object(request: Request) -> JSON:
    if request.content_type == PROTOBUF_TYPE:
        return decode_protobuf(await request.body())
    return await request.json_object(accepted=_BODY)


async def create(request: Request, target: Target, operations: Operations) -> None:
    if target.name:
        raise method_not_allowed()
    obj = _typed(await body_object(request), target)
    await answer(request, target, 201, await operations.create(target, obj, write_options(request)))


async def replace_object(request: Request, target: Target, operations: Operations) -> None:
    obj = _typed(await body_object(request), target)
    await answer(request, target, 200, await operations.update(target, lambda _: obj, write_options(request)))


def _typed(obj: JSON, target: Target) -> JSON:
    """The body with its type, which that of a built-in object may leave to the URL (typed client libraries do)."""
    if target.resource.builtin:
        named = {key: obj[key] for key in ("apiVersion", "kind") if obj.get(key)}
        return {**obj, "apiVersion": target.version.api_version, "kind": target.resource.kind, **named}
    _need_type(obj, target)
    return obj


def _need_type(obj: JSON, target: Target) -> None:
    """A body without type is refused as Kubernetes refuses it."""
    if not obj.get("kind") or not obj.get("apiVersion"):
        missing = "Kind" if not obj.get("kind") else "apiVersion"
        raise bad_request(
            f"the object provided is unrecognized (must be of type {target.resource.kind}): couldn't get version/kind; "
            f"json parse error: Object '{missing}' is missing"
        )


async def patch(request: Request, target: Target, operations: Operations) -> None:
    kind, options = request.content_type, write_options(request)
    if kind == APPLY_PATCH:
        await _apply(request, target, operations, options)
        return
    if "force" in request.query:
        cause = Cause.forbidden("force", "may not be specified for non-apply patch")
        raise invalid("PatchOptions", "meta.k8s.io", "", [cause])
    accepted = [JSON_PATCH, MERGE_PATCH, APPLY_PATCH]
    if target.resource.builtin:
        accepted.insert(2, STRATEGIC_PATCH)
    if kind not in accepted:
        raise unsupported_media_type(accepted)
    body = decode(await request.body())
    if kind != JSON_PATCH and not isinstance(body, dict):
        raise bad_request("error decoding patch: the patch must be an object")

    def change(old: JSON) -> JSON:
        if kind == JSON_PATCH:
            return json_patch(old, body)
        if kind == MERGE_PATCH:
            merged: JSON = merge_patch(old, body)
        else:
            merged = strategic_merge(old, body, target.version.schema)
        # A patch that does not name a resourceVersion is unconditional; merging put the current one there.
        return merged

    await answer(request, target, 200, await operations.update(target, change, options))


async def _apply(request: Request, target: Target, operations: Operations, options: WriteOptions) -> None:
    if "fieldManager" not in request.query:
        cause = Cause.required("fieldManager", "is required for apply patch")
        raise invalid("PatchOptions", "meta.k8s.io", "", [cause])
    config = decode(await request.body(), yaml_too=True)
    if not isinstance(config, dict):
        raise bad_request("error decoding YAML: the applied configuration must be an object")
    _need_type(config, target)
    existed = operations.store.latest(target.key) is not None
    result = await operations.apply(target, config, options)
    await answer(request, target, 200 if existed else 201, result)


async def _delete_options(request: Request) -> DeleteOptions:
    raw = await request.body()
    if request.content_type == PROTOBUF_TYPE and raw:
        raise unsupported_media_type((JSON_TYPE, YAML_TYPE))
    body = decode(raw, yaml_too=request.content_type == YAML_TYPE) if raw.strip() else {}
    if body is not None and not isinstance(body, dict):
        raise bad_request("DeleteOptions must be an object")
    return DeleteOptions.parse(body or {}, request.query)


async def delete(request: Request, target: Target, operations: Operations) -> None:
    """200 with a Status when the object is gone, with the object while something holds it."""
    obj, gone = await operations.delete(target, await _delete_options(request))
    if gone and target.resource.kind not in ("Service", "Pod", "PersistentVolumeClaim", "PersistentVolume"):
        details: JSON = {"name": target.name, "kind": target.resource.plural, "uid": obj["metadata"]["uid"]}
        if target.resource.group:
            details["group"] = target.resource.group
        status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
        await send_json(request, 200, status)
        return
    await send_json(request, 200, obj)


async def delete_collection(request: Request, target: Target, operations: Operations) -> None:
    """Deletes what a list would show; answers with the list."""
    options = await _delete_options(request)
    selection = Selection.parse(request, target)
    items, meta = list_objects(request, selection, operations.store)
    for item in items:
        one = replace(target, name=item["metadata"]["name"], namespace=item["metadata"].get("namespace", ""))
        if operations.store.latest(one.key) is not None:
            await operations.delete(one, options)
    await send_json(request, 200, list_body(selection, items, meta))
