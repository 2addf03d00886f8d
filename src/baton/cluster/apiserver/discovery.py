"""Discovery: which groups, versions and resources there are, in the aggregated and in the legacy form.

Owns the documents of /api, /apis and below. Not here: OpenAPI.
"""

from __future__ import annotations

from typing import Any

from baton.cluster.apiserver.http import Request, dump, send_bytes, send_json
from baton.cluster.apiserver.resources import Registry, Resource, Version

JSON = dict[str, Any]
AGGREGATED = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
# Streams: only these verbs make sense on them.
_STREAM_VERBS = {
    "log": ["get"],
    "exec": ["create", "get"],
    "attach": ["create", "get"],
    "portforward": ["create", "get"],
}
_SUB_KINDS = {
    "log": ("", "v1", "Pod"),
    "exec": ("", "v1", "PodExecOptions"),
    "attach": ("", "v1", "PodAttachOptions"),
    "portforward": ("", "v1", "PodPortForwardOptions"),
    "binding": ("", "v1", "Binding"),
    "eviction": ("policy", "v1", "Eviction"),
    "finalize": ("", "v1", "Namespace"),
    "ephemeralcontainers": ("", "v1", "Pod"),
    "resize": ("", "v1", "Pod"),
    "scale": ("autoscaling", "v1", "Scale"),
}


async def send_groups(request: Request, registry: Registry, *, core: bool) -> None:
    """/api (core) or /apis, in the form the client prefers; 304 when it has it already."""
    accept = request.headers.get("accept", "")
    aggregated = "as=APIGroupDiscoveryList" in accept and "v=v2;" in accept.replace("v=v2beta1", "")
    if not aggregated:
        await send_json(request, 200, _versions(request) if core else _group_list(registry))
        return
    tag = f'"{registry.etag("core" if core else "groups")}"'
    headers = {"ETag": tag, "Vary": "Accept", "Cache-Control": "public"}
    if request.headers.get("if-none-match") == tag:
        await send_bytes(request, 304, b"", content_type=AGGREGATED, headers=headers)
        return
    await send_bytes(request, 200, dump(_aggregated(registry, core)), content_type=AGGREGATED, headers=headers)


def _versions(request: Request) -> JSON:
    server = request.headers.get("host", "127.0.0.1")
    address = [{"clientCIDR": "0.0.0.0/0", "serverAddress": server}]
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": address}


def _group(name: str, versions: list[str]) -> JSON:
    listed = [{"groupVersion": f"{name}/{v}", "version": v} for v in versions]
    return {"name": name, "versions": listed, "preferredVersion": listed[0]}


def _group_list(registry: Registry) -> JSON:
    groups = [_group(g, list(vs)) for g, vs in registry.groups().items() if g]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def group(registry: Registry, name: str) -> JSON | None:
    versions = registry.groups().get(name)
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(name, list(versions))} if versions and name else None


def resource_list(registry: Registry, group_name: str, version: str) -> JSON | None:
    """The legacy list of one group-version."""
    found = registry.groups().get(group_name, {}).get(version)
    if found is None:
        return None
    name = f"{group_name}/{version}" if group_name else version
    out: list[JSON] = []
    for resource, served in found:
        entry: JSON = {
            "name": resource.plural,
            "singularName": resource.singular,
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": list(resource.verbs),
        }
        if resource.short_names:
            entry["shortNames"] = list(resource.short_names)
        if resource.categories:
            entry["categories"] = list(resource.categories)
        out.append(entry)
        for sub, kind, verbs in _subresources(resource, served):
            extra = {"group": kind[0], "version": kind[1]} if kind[0] != served.group else {}
            row = {"name": f"{resource.plural}/{sub}", "singularName": "", "namespaced": resource.namespaced}
            out.append({**row, **extra, "kind": kind[2], "verbs": verbs})
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": out}


def _subresources(resource: Resource, version: Version) -> list[tuple[str, tuple[str, str, str], list[str]]]:
    own = (version.group, version.version, resource.kind)
    out = []
    if version.has_status:
        out.append(("status", own, ["get", "patch", "update"]))
    if version.scale:
        out.append(("scale", _SUB_KINDS["scale"], ["get", "patch", "update"]))
    for sub in resource.subresources:
        default = ["create"] if sub in ("binding", "eviction") else ["get", "patch", "update"]
        out.append((sub, _SUB_KINDS[sub], _STREAM_VERBS.get(sub, default)))
    return out


def _kind(group_name: str, version: str, kind: str) -> JSON:
    return {"group": group_name, "version": version, "kind": kind}


def _aggregated(registry: Registry, core: bool) -> JSON:
    items = []
    for name, versions in registry.groups().items():
        if bool(name) is core:
            continue
        listed = [
            {"version": v, "resources": [_discovered(r, s) for r, s in rs], "freshness": "Current"}
            for v, rs in versions.items()
        ]
        items.append({"metadata": {"name": name} if name else {}, "versions": listed})
    return {"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items}


def _discovered(resource: Resource, version: Version) -> JSON:
    out: JSON = {
        "resource": resource.plural,
        "responseKind": _kind(version.group, version.version, resource.kind),
        "scope": "Namespaced" if resource.namespaced else "Cluster",
        "singularResource": resource.singular,
        "verbs": list(resource.verbs),
    }
    if resource.short_names:
        out["shortNames"] = list(resource.short_names)
    if resource.categories:
        out["categories"] = list(resource.categories)
    subs = [
        {"subresource": sub, "responseKind": _kind(*kind), "verbs": verbs}
        for sub, kind, verbs in _subresources(resource, version)
    ]
    if subs:
        out["subresources"] = subs
    return out


VERSION = {
    "major": "1",
    "minor": "36",
    "gitVersion": "v1.36.2+baton",
    "gitCommit": "",
    "gitTreeState": "clean",
    "buildDate": "2026-11-21T00:00:00Z",
    "goVersion": "",
    "compiler": "cpython",
    "platform": "linux/amd64",
}
