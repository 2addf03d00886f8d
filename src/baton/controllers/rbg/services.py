"""Headless Services of a group's roles under the names of both eras, and the names of pods behind the second one.

A pod has one subdomain, so DNS gives it a name under one Service only. For the other name this module keeps an
EndpointSlice with the pods' host names, which is what DNS servers (and our hosts files) read; nothing else is special.
"""

from __future__ import annotations

from collections.abc import Iterable

from baton.api import labels, names
from baton.api.resources import ENDPOINT_SLICES, SERVICES, Object
from baton.api.v1alpha2 import RoleSpec, Spec
from baton.controllers.plan import Action, Create, Delete, Note, Patch, controller_of, covers, owner_reference
from baton.controllers.pods import is_terminating
from baton.controllers.rbg.pod_template import alias, role_labels, subdomain

_MANAGER = "baton-rolebasedgroup"


def plan_services(group: Object, spec: Spec, existing: list[Object]) -> tuple[list[Action], list[Note]]:
    """``existing``: every Service of the namespace that has one of our names or belongs to the group."""
    meta = group["metadata"]
    by_name = {service["metadata"]["name"]: service for service in existing}
    wanted: dict[str, Object] = {}
    for role in spec.roles:
        for name in (subdomain(meta["name"], role), alias(meta["name"], role)):
            wanted.setdefault(name, _service(group, role, name))
    actions: list[Action] = []
    notes: list[Note] = []
    for name, service in wanted.items():
        found = by_name.get(name)
        if found is None:
            actions.append(Create(SERVICES, service))
        elif not _is_ours(found, meta["uid"]):
            text = f"Service {name} exists and is not the group's; it is left alone"
            notes.append(Note("Warning", "ServiceNotOwned", text))
        elif not covers(found.get("spec"), service["spec"]):
            actions.append(Patch(SERVICES, meta["namespace"], name, {"spec": service["spec"]}, why="differs"))
    for name, service in sorted(by_name.items()):
        if name not in wanted and _is_ours(service, meta["uid"]):
            actions.append(Delete(SERVICES, meta["namespace"], name, service["metadata"]["uid"], "its role is gone"))
    return actions, notes


def service_names(group: str, roles: Iterable[str]) -> list[str]:
    """The names that a group with these roles wants for itself."""
    return sorted({make(group, role) for role in roles for make in (names.old_service_name, names.new_service_name)})


def _is_ours(obj: Object, uid: str) -> bool:
    owner = controller_of(obj)
    return owner is not None and owner.get("uid") == uid


def _service(group: Object, role: RoleSpec, name: str) -> Object:
    meta = group["metadata"]
    spec: Object = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {labels.GROUP_NAME: meta["name"], labels.ROLE_NAME: role.name},
    }
    if role.service_ports:
        spec["ports"] = [port.wire() for port in role.service_ports]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": meta["namespace"],
            "labels": role_labels(meta["namespace"], meta["name"], role.name),
            "ownerReferences": [owner_reference(group)],
        },
        "spec": spec,
    }


def plan_alias_slices(group: Object, spec: Spec, pods: dict[str, list[Object]], existing: list[Object]) -> list[Action]:
    """Keep one slice of host names per role for its second Service name."""
    meta = group["metadata"]
    by_name = {entry["metadata"]["name"]: entry for entry in existing if _is_ours(entry, meta["uid"])}
    actions: list[Action] = []
    wanted: set[str] = set()
    for role in spec.roles:
        service = alias(meta["name"], role)
        name = f"{service}-names"
        wanted.add(name)
        endpoints = [_endpoint(pod) for pod in pods.get(role.name, []) if _has_address(pod)]
        found = by_name.get(name)
        if found is None:
            if endpoints:
                actions.append(Create(ENDPOINT_SLICES, _slice(group, role, name, service, endpoints)))
        elif not covers(found.get("endpoints") or [], endpoints):
            body: Object = {"endpoints": endpoints}
            actions.append(Patch(ENDPOINT_SLICES, meta["namespace"], name, body, why="addresses changed"))
    for name, entry in sorted(by_name.items()):
        if name not in wanted:
            actions.append(
                Delete(ENDPOINT_SLICES, meta["namespace"], name, entry["metadata"]["uid"], "its role is gone")
            )
    return actions


def _has_address(pod: Object) -> bool:
    return bool((pod.get("status") or {}).get("podIP")) and not is_terminating(pod)


def _endpoint(pod: Object) -> Object:
    meta = pod["metadata"]
    return {
        "addresses": [pod["status"]["podIP"]],
        "hostname": pod["spec"].get("hostname") or meta["name"],
        # These names must resolve before a pod is ready: members of a group find each other while starting.
        "conditions": {"ready": True},
        "targetRef": {"kind": "Pod", "namespace": meta["namespace"], "name": meta["name"], "uid": meta["uid"]},
    }


def _slice(group: Object, role: RoleSpec, name: str, service: str, endpoints: list[Object]) -> Object:
    meta = group["metadata"]
    return {
        "apiVersion": ENDPOINT_SLICES.api_version,
        "kind": ENDPOINT_SLICES.kind,
        "metadata": {
            "name": name,
            "namespace": meta["namespace"],
            "labels": {
                labels.SERVICE_NAME: service,
                labels.MANAGED_BY: _MANAGER,
                labels.GROUP_NAME: meta["name"],
                labels.ROLE_NAME: role.name,
            },
            "ownerReferences": [owner_reference(group)],
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [],
    }
