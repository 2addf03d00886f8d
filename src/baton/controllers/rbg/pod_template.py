"""What a role's pods look like: the user's template, plus the labels, environment and discovery file of both eras."""

from __future__ import annotations

import copy

from baton.api import labels, names
from baton.api.merge import strategic_merge
from baton.api.resources import Object
from baton.api.v1alpha2 import RoleSpec, Spec
from baton.controllers.plan import owner_reference
from baton.controllers.revisions import short_hash

_STATEFUL_SET = "apps/v1/StatefulSet"


def is_old_era(role: RoleSpec) -> bool:
    """Roles that came as v1alpha1 (default workload StatefulSet) keep the names of their time as first names."""
    return role.annotations.get(labels.ROLE_WORKLOAD_TYPE) == _STATEFUL_SET


def subdomain(group: str, role: RoleSpec) -> str:
    """The headless Service a pod of the role belongs to by `spec.subdomain`; the other era's name is an alias."""
    return names.old_service_name(group, role.name) if is_old_era(role) else names.new_service_name(group, role.name)


def alias(group: str, role: RoleSpec) -> str:
    """The other era's Service name."""
    return names.new_service_name(group, role.name) if is_old_era(role) else names.old_service_name(group, role.name)


def user_template(spec: Spec, role: RoleSpec) -> Object:
    """The role's template as its author means it: shared template and patch merged, role labels and annotations in.

    This is what a revision is a hash of. Nothing of ours is in it, so that a new release of ours restarts no pod, and no
    size of any role, so that scaling restarts none.
    """
    pattern = role.standalone_pattern
    assert pattern is not None, "validation lets only standalone roles pass"
    if pattern.template_ref is not None:
        shared = next(entry.template for entry in spec.role_templates if entry.name == pattern.template_ref.name)
        template: Object = strategic_merge(shared, pattern.template_ref.patch or {})
    else:
        template = dict(pattern.template or {})
    meta = dict(template.get("metadata") or {})
    extra = {key: value for key, value in role.annotations.items() if key != labels.ROLE_WORKLOAD_TYPE}
    for field, added in (("labels", role.labels), ("annotations", extra)):
        merged = {**added, **(meta.get(field) or {})}
        if merged:
            meta[field] = merged
    return {**template, "metadata": meta} if meta else template


def revision(template: Object) -> str:
    return short_hash(template)


def make_pod(group: Object, role: RoleSpec, template: Object, template_revision: str, ordinal: int) -> Object:
    """The pod of one ordinal."""
    group_name, namespace = group["metadata"]["name"], group["metadata"]["namespace"]
    name = names.pod_name(group_name, role.name, ordinal)
    spec = copy.deepcopy(template.get("spec") or {})
    spec["hostname"] = name
    spec["subdomain"] = subdomain(group_name, role)
    _mount_discovery(spec, group_name)
    added = _environment(group_name, role)
    for container in [*(spec.get("initContainers") or []), *spec["containers"]]:
        own = container.get("env") or []
        taken = {entry.get("name") for entry in own}
        container["env"] = [entry for entry in added if entry["name"] not in taken] + own
    meta = template.get("metadata") or {}
    result: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": {
                **(meta.get("labels") or {}),
                **role_labels(namespace, group_name, role.name),
                **_ordinal_labels(name, role, ordinal),
                labels.REVISION_HASH: template_revision,
            },
            "ownerReferences": [owner_reference(group)],
        },
        "spec": spec,
    }
    if meta.get("annotations"):
        result["metadata"]["annotations"] = dict(meta["annotations"])
    return result


def role_labels(namespace: str, group: str, role: str) -> dict[str, str]:
    """What selects a role's objects, in both eras."""
    uid = names.group_uid(namespace, group)
    return {
        labels.GROUP_NAME: group,
        labels.GROUP_UID: uid,
        labels.GROUP_UNIQUE_HASH: uid,
        labels.ROLE_NAME: role,
        labels.OLD_GROUP_NAME: group,
        labels.OLD_ROLE_NAME: role,
        labels.OLD_GROUP_UNIQUE_KEY: uid,
    }


def _ordinal_labels(pod: str, role: RoleSpec, ordinal: int) -> dict[str, str]:
    result = {labels.POD_INDEX: str(ordinal), labels.STATEFUL_POD_NAME: pod}
    if not is_old_era(role):
        result |= {
            labels.ROLE_TYPE: "PodTemplate",
            labels.ROLE_INSTANCE_NAME: pod,
            labels.ROLE_INSTANCE_INDEX: str(ordinal),
            labels.COMPONENT_NAME: role.name,
            labels.COMPONENT_ID: "0",
            labels.COMPONENT_SIZE: "1",
        }
    return result


def _environment(group: str, role: RoleSpec) -> list[Object]:
    """RBG_* sorted by name, then the names of the first era, sorted too."""
    index = labels.POD_INDEX if is_old_era(role) else labels.ROLE_INSTANCE_INDEX
    values: dict[str, str | Object] = {"GROUP_NAME": group, "ROLE_NAME": role.name, "ROLE_INDEX": _label(index)}
    new = dict(values)
    if not is_old_era(role):
        new["ROLE_INSTANCE_NAME"] = values["INSTANCE_NAME"] = _label(labels.ROLE_INSTANCE_NAME)
        new["COMPONENT_NAME"] = values["COMPONENT_NAME"] = _label(labels.COMPONENT_NAME)
        new["COMPONENT_INDEX"] = values["COMPONENT_INDEX"] = _label(labels.COMPONENT_ID)
    pairs = [(f"RBG_{name}", new[name]) for name in sorted(new)] + [(name, values[name]) for name in sorted(values)]
    return [
        {"name": name, "value": value} if isinstance(value, str) else {"name": name, "valueFrom": value}
        for name, value in pairs
    ]


def _label(key: str) -> Object:
    return {"fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.labels['{key}']"}}


def _mount_discovery(spec: Object, group: str) -> None:
    volumes = spec.setdefault("volumes", [])
    if not any(volume.get("name") == names.DISCOVERY_VOLUME for volume in volumes):
        item = {"key": names.DISCOVERY_KEY, "path": names.DISCOVERY_KEY}
        volumes.append({"name": names.DISCOVERY_VOLUME, "configMap": {"name": group, "items": [item]}})
    for container in spec["containers"]:
        mounts = container.setdefault("volumeMounts", [])
        if not any(mount.get("mountPath", "").rstrip("/") == names.DISCOVERY_MOUNT for mount in mounts):
            mounts.append({"name": names.DISCOVERY_VOLUME, "mountPath": names.DISCOVERY_MOUNT, "readOnly": True})
