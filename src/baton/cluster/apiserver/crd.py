"""CustomResourceDefinitions: checking one, serving what it defines, its status.

Owns `CrdManager`, which keeps the registry in step with the stored CRDs (it listens to the store) and knows the
conversion hooks that were supplied in-process. Not here: the schema walk (`schema_crd`), objects of the new kinds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from baton.cluster.apiserver.errors import Cause
from baton.cluster.apiserver.metadata import timestamp
from baton.cluster.apiserver.names import check_label_1035
from baton.cluster.apiserver.resources import Column, Conversion, Registry, Resource, ScaleSpec, Version, version_order
from baton.cluster.apiserver.schema_crd import crd_schema
from baton.cluster.apiserver.store import DELETED, Change, Store

JSON = dict[str, Any]


class CrdManager:
    """Turns stored CRDs into served resources. `conversions` is by `plural.group`."""

    def __init__(self, store: Store, registry: Registry, conversions: Mapping[str, Conversion]) -> None:
        self._registry, self._conversions = registry, conversions
        self.warnings: dict[str, str] = {}
        for crd in store.resource("customresourcedefinitions.apiextensions.k8s.io").select(None):
            self._serve(crd)
        store.subscribe(self._on_changes)

    def _on_changes(self, changes: list[Change]) -> None:
        for change in changes:
            if change.key.resource != "customresourcedefinitions.apiextensions.k8s.io":
                continue
            if change.type == DELETED:
                self._registry.remove(change.key.name)
            elif change.previous is None or change.previous.get("spec") != change.object.get("spec"):
                self._serve(change.object)

    def _serve(self, crd: JSON) -> None:
        self._registry.add(resource_of(crd, self._conversions.get(crd["metadata"]["name"])))

    def causes(self, crd: JSON, warnings: list[str]) -> list[Cause]:
        """What is wrong with a CRD; things accepted but not done are added to `warnings`."""
        spec, out = crd.get("spec") or {}, []
        names, group = spec.get("names") or {}, spec.get("group", "")
        wanted = f"{names.get('plural')}.{group}"
        if crd["metadata"].get("name") != wanted:
            out.append(
                Cause.invalid("metadata.name", crd["metadata"].get("name"), 'must be spec.names.plural+"."+spec.group')
            )
        for field in ("plural", "singular"):
            out += [
                Cause.invalid(f"spec.names.{field}", names.get(field), t)
                for t in check_label_1035(names.get(field) or "x")
            ]
        if spec.get("scope") not in ("Cluster", "Namespaced"):
            out.append(Cause.not_supported("spec.scope", spec.get("scope"), ("Cluster", "Namespaced")))
        versions = spec.get("versions") or []
        if sum(bool(v.get("storage")) for v in versions) != 1:
            out.append(
                Cause.invalid(
                    "spec.versions",
                    [v.get("name") for v in versions],
                    "must have exactly one version marked as storage version",
                )
            )
        for index, version in enumerate(versions):
            js = (version.get("schema") or {}).get("openAPIV3Schema")
            here = f"spec.versions[{index}].schema.openAPIV3Schema"
            if js is None:
                out.append(Cause.required(here, "schemas are required"))
            else:
                crd_schema(js, here, out)
        served = self._registry.resources.get(wanted)
        if served is not None and served.builtin:
            out.append(Cause.invalid("spec.names.plural", names.get("plural"), "this resource is built in"))
        if "x-kubernetes-validations" in json.dumps(spec):
            warnings.append("x-kubernetes-validations rules (CEL) are stored but not evaluated by this API server")
        webhook = (spec.get("conversion") or {}).get("strategy") == "Webhook"
        if webhook and wanted not in self._conversions:
            warnings.append("spec.conversion: webhooks are not called by this API server; only apiVersion is changed")
        return out

    def prepare(self, crd: JSON) -> None:
        """Fills the status of a new or changed CRD: it is served at once."""
        spec, now = crd["spec"], timestamp()
        old = {c["type"]: c for c in (crd.get("status") or {}).get("conditions") or ()}
        conditions = []
        for kind, reason, text in (
            ("NamesAccepted", "NoConflicts", "no conflicts found"),
            ("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        ):
            fresh = {"type": kind, "status": "True", "lastTransitionTime": now, "reason": reason, "message": text}
            conditions.append(old.get(kind, fresh))
        stored = list((crd.get("status") or {}).get("storedVersions") or [])
        storage = next((v["name"] for v in spec["versions"] if v.get("storage")), "")
        if storage not in stored:
            stored.append(storage)
        crd["status"] = {"acceptedNames": dict(spec["names"]), "conditions": conditions, "storedVersions": stored}


def resource_of(crd: JSON, conversion: Conversion | None) -> Resource:
    """The served resource that a (checked) CRD defines."""
    spec = crd["spec"]
    names = spec["names"]
    served = sorted((v for v in spec["versions"] if v.get("served")), key=lambda v: version_order(v["name"]))
    versions = [_version(spec, v) for v in served]
    storage_name = next(v["name"] for v in spec["versions"] if v.get("storage"))
    storage = next((v for v in versions if v.version == storage_name), None)
    if storage is None:
        storage = _version(spec, next(v for v in spec["versions"] if v.get("storage")))
    return Resource(
        group=spec["group"],
        plural=names["plural"],
        kind=names["kind"],
        namespaced=spec["scope"] == "Namespaced",
        versions=versions,
        storage=storage,
        singular=names.get("singular") or names["kind"].lower(),
        list_kind=names.get("listKind") or names["kind"] + "List",
        short_names=tuple(names.get("shortNames") or ()),
        categories=tuple(names.get("categories") or ()),
        builtin=False,
        conversion=conversion,
    )


def _version(spec: JSON, version: JSON) -> Version:
    js = (version.get("schema") or {}).get("openAPIV3Schema")
    subresources = version.get("subresources") or {}
    scale = subresources.get("scale")
    warning = ""
    if version.get("deprecated"):
        kind = f"{spec['group']}/{version['name']} {spec['names']['kind']}"
        warning = version.get("deprecationWarning") or f"{kind} is deprecated"
    return Version(
        group=spec["group"],
        version=version["name"],
        schema=crd_schema(js, "", []),
        columns=_columns(version.get("additionalPrinterColumns")),
        has_status="status" in subresources,
        scale=ScaleSpec(scale["specReplicasPath"], scale["statusReplicasPath"], scale.get("labelSelectorPath"))
        if scale
        else None,
        warning=warning,
        selectable_fields=tuple(f["jsonPath"].lstrip(".") for f in version.get("selectableFields") or ()),
    )


def _columns(columns: list[JSON] | None) -> list[Column]:
    if not columns:
        return [Column("Age", "date", path=".metadata.creationTimestamp")]
    return [
        Column(
            c["name"],
            c["type"],
            c.get("format", ""),
            c.get("description", ""),
            int(c.get("priority", 0)),
            c["jsonPath"],
        )
        for c in columns
    ]
