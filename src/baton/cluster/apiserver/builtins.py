"""The built-in resources: one line each, with what discovery says of them.

Owns `builtin_resources()` and the conversion between the two Event APIs. Not here: their fields (`schemas/`), their
defaults and rules, their table columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from baton.cluster.apiserver.resources import Resource, ScaleSpec, Version
from baton.cluster.apiserver.schema_text import builtin_types

JSON = dict[str, Any]
_SCALE = ScaleSpec(".spec.replicas", ".status.replicas", ".status.selector")

# group/version, Kind, plural, short names, flags: c cluster-scoped, s status, r scale, a category all, g generation
_TABLE = """
v1 Pod pods po s,a,g
v1 Service services svc s,a
v1 Endpoints endpoints ep -
v1 ConfigMap configmaps cm -
v1 Secret secrets - -
v1 PersistentVolume persistentvolumes pv c,s
v1 PersistentVolumeClaim persistentvolumeclaims pvc s
v1 ServiceAccount serviceaccounts sa -
v1 Namespace namespaces ns c,s
v1 Node nodes no c,s
v1 Event events ev -
apps/v1 ControllerRevision controllerrevisions - -
apps/v1 StatefulSet statefulsets sts s,r,a,g
apps/v1 Deployment deployments deploy s,r,a,g
apps/v1 ReplicaSet replicasets rs s,r,a,g
discovery.k8s.io/v1 EndpointSlice endpointslices - g
coordination.k8s.io/v1 Lease leases - -
storage.k8s.io/v1 StorageClass storageclasses sc c
apiextensions.k8s.io/v1 CustomResourceDefinition customresourcedefinitions crd,crds c,s,g
"""
_SUBRESOURCES = {
    "pods": ("log", "exec", "attach", "portforward", "binding", "eviction", "ephemeralcontainers", "resize"),
    "namespaces": ("finalize",),
}
_SELECTABLE = {
    "pods": ("spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName", "status.phase",
             "status.podIP", "status.nominatedNodeName", "spec.hostNetwork"),
    "events": ("involvedObject.kind", "involvedObject.namespace", "involvedObject.name", "involvedObject.uid",
               "involvedObject.apiVersion", "involvedObject.resourceVersion", "involvedObject.fieldPath", "reason",
               "reportingComponent", "source", "type"),
    "secrets": ("type",),
    "services": ("spec.clusterIP", "spec.type"),
    "namespaces": ("status.phase",),
    "nodes": ("spec.unschedulable",),
    "replicasets": ("status.replicas",),
}  # fmt: skip


def builtin_resources() -> Iterable[Resource]:
    """Fresh `Resource` objects for every built-in kind."""
    types = builtin_types()
    for line in _TABLE.strip().splitlines():
        api_version, kind, plural, shorts, flags = line.split()
        group, _, version = api_version.rpartition("/")
        has = set(flags.split(","))
        served = Version(
            group,
            version,
            types["CoreV1Event" if kind == "Event" else kind],
            has_status="s" in has,
            scale=_SCALE if "r" in has else None,
            selectable_fields=_SELECTABLE.get(plural, ()),
        )
        resource = Resource(
            group=group,
            plural=plural,
            kind=kind,
            namespaced="c" not in has,
            versions=[served],
            storage=served,
            singular=kind.lower(),
            list_kind=f"{kind}List",
            short_names=() if shorts == "-" else tuple(shorts.split(",")),
            categories=("all",) if "a" in has else (),
            subresources=_SUBRESOURCES.get(plural, ()),
            counts_generation="g" in has,
        )
        if kind == "Event":
            events = Version("events.k8s.io", "v1", types["EventsV1Event"], selectable_fields=_EVENTS_FIELDS)
            resource.versions.append(events)
            resource.conversion = convert_event
        yield resource


# The same object in both APIs: (core/v1 name, events.k8s.io/v1 name)
_EVENT_NAMES = (
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
)
_EVENTS_FIELDS = ("regarding.kind", "regarding.namespace", "regarding.name", "regarding.uid", "reason",
                  "reportingController", "type")  # fmt: skip


def convert_event(obj: JSON, api_version: str) -> JSON:
    """A core/v1 Event as events.k8s.io/v1 or back: the same facts under other names."""
    to_core = api_version == "v1"
    names = {new: old for old, new in _EVENT_NAMES} if to_core else dict(_EVENT_NAMES)
    out = {names.get(k, k): v for k, v in obj.items()}
    out["apiVersion"] = api_version
    return out
