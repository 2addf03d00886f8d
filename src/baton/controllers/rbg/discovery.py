"""The group's ConfigMap behind /etc/rbg/config.yaml: who is in the group and where. Changes with sizes, never with health."""

from __future__ import annotations

import json
from functools import lru_cache

import yaml

from baton.api import labels, names
from baton.api.resources import CONFIG_MAPS, Object
from baton.api.v1alpha2 import RoleSpec, Spec
from baton.controllers.plan import Action, Create, Patch, controller_of, owner_reference
from baton.controllers.rbg.pod_template import subdomain


def config_yaml(group: str, spec: Spec) -> str:
    """The file's text. `group.size` counts roles, `roles.X.size` replicas; keys are sorted, as upstream writes them."""
    content = {
        "group": {"name": group, "roles": [role.name for role in spec.roles], "size": len(spec.roles)},
        "roles": {role.name: {"size": role.replicas, "instances": _instances(group, role)} for role in spec.roles},
    }
    return _as_yaml(json.dumps(content, sort_keys=True))


@lru_cache(maxsize=1024)  # YAML is slow to write, and most passes change nothing here
def _as_yaml(text: str) -> str:
    return yaml.safe_dump(json.loads(text), sort_keys=True, default_flow_style=False)


def _instances(group: str, role: RoleSpec) -> list[Object]:
    ports = {names.port_key(port.name, port.port): port.port for port in role.service_ports}
    instances = []
    for ordinal in range(role.replicas):
        instance: Object = {"address": f"{names.pod_name(group, role.name, ordinal)}.{subdomain(group, role)}"}
        instances.append(instance | ({"ports": dict(ports)} if ports else {}))
    return instances


def plan_config_map(group: Object, spec: Spec, existing: Object | None) -> tuple[list[Action], str | None]:
    """Actions, and what is wrong when a ConfigMap of that name belongs to somebody else."""
    meta = group["metadata"]
    data = {names.DISCOVERY_KEY: config_yaml(meta["name"], spec)}
    if existing is None:
        obj = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": meta["name"],
                "namespace": meta["namespace"],
                "labels": {labels.GROUP_NAME: meta["name"], labels.OLD_GROUP_NAME: meta["name"]},
                "ownerReferences": [owner_reference(group)],
            },
            "data": data,
        }
        return [Create(CONFIG_MAPS, obj)], None
    owner = controller_of(existing)
    if owner is None or owner.get("uid") != meta["uid"]:
        return [], f"ConfigMap {meta['name']} exists and is not the group's; rename one of them"
    if existing.get("data") != data:
        # The whole map is replaced: a key that somebody added has no place in it.
        gone = {key: None for key in existing.get("data") or {} if key not in data}
        body = {"data": data | gone}
        return [Patch(CONFIG_MAPS, meta["namespace"], meta["name"], body, why="members of the group changed")], None
    return [], None
