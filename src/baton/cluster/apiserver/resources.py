"""What the server serves: resources, their versions, and the registry that paths and discovery look up.

Owns `Resource` (one stored kind), `Version` (one group and version it is served under), `ScaleSpec` and `Registry`.
Neighbours: `builtins` fills the registry, `crd` adds to it while running. Not here: objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from baton.cluster.apiserver.schema import Schema

JSON = dict[str, Any]
Conversion = Callable[[JSON, str], JSON]
"""Turns an object into the given apiVersion (`group/version`); returns a new object, never changes its argument."""

VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a Table. `path` is a JSONPath for CRD columns and unused for built-in ones."""

    name: str
    type: str = "string"
    format: str = ""
    description: str = ""
    priority: int = 0
    path: str = ""


@dataclass(frozen=True, slots=True)
class ScaleSpec:
    """Dotted paths (`.spec.replicas`) of the scale subresource."""

    spec_replicas: str
    status_replicas: str
    selector: str | None = None


@dataclass(slots=True)
class Version:
    """A resource as seen under one apiVersion."""

    group: str
    version: str
    schema: Schema
    columns: list[Column] | None = None  # None: built-in table or the default columns
    has_status: bool = False
    scale: ScaleSpec | None = None
    warning: str = ""  # deprecation text for the Warning header
    selectable_fields: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


@dataclass(slots=True)
class Resource:
    """One stored kind. `versions` is in order of preference; objects are stored as `storage`."""

    group: str
    plural: str
    kind: str
    namespaced: bool
    versions: list[Version]
    storage: Version
    singular: str = ""
    list_kind: str = ""
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()  # besides status and scale: log, exec, ...
    builtin: bool = True
    counts_generation: bool = True
    verbs: tuple[str, ...] = VERBS
    conversion: Conversion | None = None
    converts_by_relabel: bool = True  # without a conversion hook only apiVersion changes

    @property
    def store_name(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def convert(self, obj: JSON, version: Version) -> JSON:
        """`obj` (stored form or any served one) as `version`."""
        if obj.get("apiVersion") == version.api_version:
            return obj
        if self.conversion is not None:
            return self.conversion(obj, version.api_version)
        return {**obj, "apiVersion": version.api_version}

    def find_version(self, api_version: str) -> Version | None:
        return next((v for v in self.versions if v.api_version == api_version), None)


@dataclass(slots=True)
class Registry:
    """Served resources by (group, version, plural). `changed` grows with every change."""

    served: dict[tuple[str, str, str], tuple[Resource, Version]] = field(default_factory=dict)
    resources: dict[str, Resource] = field(default_factory=dict)
    changed: int = 0

    def add(self, resource: Resource) -> None:
        """Adds or replaces a resource."""
        self.remove(resource.store_name)
        self.resources[resource.store_name] = resource
        for version in resource.versions:
            self.served[version.group, version.version, resource.plural] = (resource, version)
        self.changed += 1

    def remove(self, store_name: str) -> None:
        if self.resources.pop(store_name, None) is not None:
            self.served = {k: v for k, v in self.served.items() if v[0].store_name != store_name}
            self.changed += 1

    def lookup(self, group: str, version: str, plural: str) -> tuple[Resource, Version] | None:
        return self.served.get((group, version, plural))

    def by_kind(self, api_version: str, kind: str) -> tuple[Resource, Version] | None:
        for resource, version in self.served.values():
            if resource.kind == kind and version.api_version == api_version:
                return resource, version
        return None

    def groups(self) -> dict[str, dict[str, list[tuple[Resource, Version]]]]:
        """group -> version (most preferred first) -> resources."""
        out: dict[str, dict[str, list[tuple[Resource, Version]]]] = {}
        for resource, version in self.served.values():
            out.setdefault(version.group, {}).setdefault(version.version, []).append((resource, version))
        return {g: dict(sorted(vs.items(), key=lambda kv: version_order(kv[0]))) for g, vs in out.items()}

    def etag(self, *parts: str) -> str:
        text = "|".join((str(sorted(self.served)), str(self.changed), *parts))
        return hashlib.sha256(text.encode()).hexdigest()[:32].upper()


def version_order(version: str) -> tuple[int, int, int, str]:
    """Sort key: v2 before v1 before v1beta2 before v1alpha1, as Kubernetes prefers them."""
    rest = version.removeprefix("v")
    for stage, rank in (("alpha", 2), ("beta", 1)):
        if stage in rest:
            major, _, minor = rest.partition(stage)
            if major.isdigit():
                return (rank, -int(major), -int(minor or 0), version)
    return (0, -int(rest), 0, version) if rest.isdigit() else (3, 0, 0, version)
