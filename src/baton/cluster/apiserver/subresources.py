"""Subresources that are plain requests: scale, binding, eviction, finalize.

Owns their handlers. `status` is a `Target.subresource` of the ordinary handlers; streams (log, exec, portforward) are
in their own files.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from baton.cluster.apiserver import writing
from baton.cluster.apiserver.deletion import DeleteOptions
from baton.cluster.apiserver.errors import bad_request, conflict, method_not_allowed, unsupported_media_type
from baton.cluster.apiserver.http import Request, decode, send_json
from baton.cluster.apiserver.jsonpath import find, put
from baton.cluster.apiserver.metadata import timestamp
from baton.cluster.apiserver.operations import Operations
from baton.cluster.apiserver.patch import json_patch, merge_patch
from baton.cluster.apiserver.resources import ScaleSpec
from baton.cluster.apiserver.selectors import LabelSelector
from baton.cluster.apiserver.target import Target, WriteOptions

JSON = dict[str, Any]


def scale_of(obj: JSON, spec: ScaleSpec) -> JSON:
    """The autoscaling/v1 Scale of an object."""
    meta = obj["metadata"]
    names = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    wanted, present = find(obj, spec.spec_replicas), find(obj, spec.status_replicas)
    status: JSON = {"replicas": present[0] if present else 0}
    selector = find(obj, spec.selector) if spec.selector else []
    if selector and isinstance(selector[0], str):
        status["selector"] = selector[0]
    elif isinstance((obj.get("spec") or {}).get("selector"), dict):
        status["selector"] = _selector_text(obj["spec"]["selector"])
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {n: meta[n] for n in names if n in meta},
        "spec": {"replicas": wanted[0] if wanted else 0},
        "status": status,
    }


def _selector_text(selector: JSON) -> str:
    parts = []
    for r in LabelSelector.from_object(selector).requirements:
        if r.operator == "in" and len(r.values) == 1:
            parts.append(f"{r.key}={r.values[0]}")
        elif r.operator in ("in", "notin"):
            parts.append(f"{r.key} {r.operator} ({','.join(r.values)})")
        else:
            parts.append(r.key if r.operator == "exists" else f"!{r.key}")
    return ",".join(parts)


async def scale(request: Request, target: Target, operations: Operations) -> None:
    """GET, PUT and PATCH of /scale; a write changes only the replicas of the object behind it."""
    spec = target.version.scale
    main = replace(target, subresource="")
    stored = operations.store.get(target.key)
    if spec is None or stored is None:
        raise target.missing()
    if request.method == "GET":
        await send_json(request, 200, scale_of(target.resource.convert(stored, target.version), spec))
        return
    if request.method not in ("PUT", "PATCH"):
        raise method_not_allowed()
    body = await _scale_body(request)

    def change(old: JSON) -> JSON:
        before = scale_of(old, spec)
        after = body if request.method == "PUT" else _patched(request, before, body)
        revision = (after.get("metadata") or {}).get("resourceVersion")
        if revision not in (None, "", old["metadata"]["resourceVersion"]):
            raise conflict(target.resource.plural, target.resource.group, target.name)
        replicas = (after.get("spec") or {}).get("replicas", 0)
        if not isinstance(replicas, int) or isinstance(replicas, bool):
            raise bad_request("Scale.spec.replicas must be an integer")
        return put(old, spec.spec_replicas, replicas)

    options = writing.write_options(request)
    updated = await operations.update(main, change, options)
    await send_json(request, 200, scale_of(updated, spec))


async def _scale_body(request: Request) -> Any:
    if request.method == "PUT":
        return await request.json_object()
    accepted = (writing.JSON_PATCH, writing.MERGE_PATCH, writing.STRATEGIC_PATCH)
    if request.content_type not in accepted:
        raise unsupported_media_type(accepted)
    return decode(await request.body())


def _patched(request: Request, scale_object: JSON, body: Any) -> JSON:
    if request.content_type == writing.JSON_PATCH:
        return json_patch(scale_object, body)
    out: JSON = merge_patch(scale_object, body)
    return out


async def bind(request: Request, target: Target, operations: Operations) -> None:
    """POST pods/X/binding: the scheduler's word on where a pod runs."""
    body = await request.json_object()
    node = (body.get("target") or {}).get("name")
    if not node:
        raise bad_request("Binding.target.name: Required value")

    def change(pod: JSON) -> JSON:
        taken = (pod.get("spec") or {}).get("nodeName")
        if taken and taken != node:
            raise conflict("pods/binding", "", target.name, f'pod {target.name} is already assigned to node "{taken}"')
        if pod["metadata"].get("deletionTimestamp"):
            raise conflict(
                "pods/binding", "", target.name, f"pod {target.name} is being deleted, cannot be assigned to a host"
            )
        return {**pod, "spec": {**pod["spec"], "nodeName": node}}

    options = writing.write_options(request)
    main = replace(target, subresource="")
    await operations.update(main, change, options)
    await operations.update(replace(target, subresource="status"), _scheduled, WriteOptions(manager=options.manager))
    await send_json(
        request, 201, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}
    )


def _scheduled(pod: JSON) -> JSON:
    status = dict(pod.get("status") or {})
    kept = [c for c in status.get("conditions") or () if c["type"] != "PodScheduled"]
    condition = {"type": "PodScheduled", "status": "True", "lastTransitionTime": timestamp()}
    return {**pod, "status": {**status, "conditions": [*kept, condition]}}


async def evict(request: Request, target: Target, operations: Operations) -> None:
    """POST pods/X/eviction: a delete, since there are no disruption budgets here."""
    body = await request.json_object()
    options = DeleteOptions.parse(body.get("deleteOptions") or {}, request.query)
    await operations.delete(replace(target, subresource=""), options)
    await send_json(
        request, 201, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}
    )


async def finalize(request: Request, target: Target, operations: Operations) -> None:
    """PUT namespaces/X/finalize: replaces spec.finalizers."""
    if request.method != "PUT":
        raise method_not_allowed()
    body = await request.json_object()
    stored = operations.store.latest(target.key)
    if stored is None:
        raise target.missing()
    finalizers = (body.get("spec") or {}).get("finalizers") or []
    new = {**stored, "spec": {**(stored.get("spec") or {}), "finalizers": finalizers}}
    await operations.replace_stored(target.key, new)
    await send_json(request, 200, new)
