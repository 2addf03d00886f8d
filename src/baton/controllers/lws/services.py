"""The headless Services that give pods their names: one for the set, or one per group. Made once, never changed."""

from __future__ import annotations

from baton.api import lws
from baton.api.resources import SERVICES, Object
from baton.controllers.lws.groups import Group
from baton.controllers.lws.pod_template import Blueprint
from baton.controllers.plan import Action, Create, Delete, controller_of, owner_reference


def plan_shared(owner: Object, blueprints: list[Blueprint], existing: dict[str, Object]) -> list[Action]:
    """``blueprints``: those in use. ``existing`` Services by name; one that is somebody else's serves as well."""
    name = owner["metadata"]["name"]
    if name in existing or all(blueprint.has_own_subdomain for blueprint in blueprints):
        return []
    return [Create(SERVICES, _service(owner, name, owner, {lws.SET_NAME: name}))]


def plan_own(owner: Object, group: Group, blueprint: Blueprint, existing: dict[str, Object]) -> list[Action]:
    """The Service of one living group, if its revision asks for one. It goes with its leader."""
    if group.leader is None or not blueprint.has_own_subdomain:
        return []
    found = existing.get(group.leader_name)
    leader = {"apiVersion": "v1", "kind": "Pod", **group.leader}
    if found is None:
        selector = {lws.SET_NAME: owner["metadata"]["name"], lws.GROUP_INDEX: str(group.index)}
        return [Create(SERVICES, _service(owner, group.leader_name, leader, selector))]
    holder = controller_of(found) or {}
    if holder.get("kind") == "Pod" and holder.get("uid") != leader["metadata"]["uid"]:
        meta = found["metadata"]
        return [Delete(SERVICES, meta["namespace"], meta["name"], meta["uid"], "its leader is gone")]
    return []


def _service(owner: Object, name: str, holder: Object, selector: dict[str, str]) -> Object:
    meta = owner["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": meta["namespace"],
            "labels": {lws.SET_NAME: meta["name"]},
            "ownerReferences": [owner_reference(holder)],
        },
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector},
    }
