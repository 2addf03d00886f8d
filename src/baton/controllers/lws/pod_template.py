"""What the pods of a group look like: the user's template with the set's names, labels, annotations and environment.

Placement terms are `placement`'s, accelerator variables `tpu`'s.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from baton.api import labels, lws
from baton.api.resources import Object
from baton.controllers.lws import tpu
from baton.controllers.lws.placement import add_exclusive_terms, pin_to_topology
from baton.controllers.plan import owner_reference


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What one revision says about groups: templates, size, subgroups, network, claims."""

    revision: str
    template: lws.LeaderWorkerTemplate
    network: lws.NetworkConfig

    @property
    def leader_template(self) -> Object:
        return self.template.leader_template or self.template.worker_template

    @property
    def has_own_subdomain(self) -> bool:
        return self.network.subdomain_policy == "UniquePerReplica"

    def subdomain(self, set_name: str, group: int) -> str:
        return lws.leader_name(set_name, group) if self.has_own_subdomain else set_name


def make_leader(owner: Object, blueprint: Blueprint, group: int) -> Object:
    meta = owner["metadata"]
    name = lws.leader_name(meta["name"], group)
    pod = _make_pod(owner, blueprint, group, 0)
    own = pod["metadata"]["annotations"]
    if blueprint.has_own_subdomain:
        own[lws.SUBDOMAIN_POLICY] = blueprint.network.subdomain_policy
    policy = blueprint.template.sub_group_policy
    if policy is not None:
        own[lws.SUBGROUP_POLICY_TYPE] = policy.sub_group_policy_type
    pod["metadata"]["ownerReferences"] = [owner_reference(owner)]
    topology = _annotation(owner, lws.EXCLUSIVE_TOPOLOGY)
    if topology:
        add_exclusive_terms(pod["spec"], topology, lws.GROUP_KEY, lws.unique_key(meta["namespace"], name))
    return pod


def make_worker(owner: Object, blueprint: Blueprint, leader: Object, worker: int, topology_value: str | None) -> Object:
    """``topology_value``: where the leader is, by the exclusive topology's label; None without one."""
    group = int(leader["metadata"]["labels"][lws.GROUP_INDEX])
    pod = _make_pod(owner, blueprint, group, worker)
    pod["metadata"]["annotations"][lws.LEADER_NAME] = leader["metadata"]["name"]
    if tpu.asks_for_tpus(blueprint.leader_template["spec"]):
        pod["metadata"]["annotations"][lws.LEADER_REQUESTS_TPUS] = "true"
    pod["metadata"]["ownerReferences"] = [owner_reference({"apiVersion": "v1", "kind": "Pod", **leader})]
    if topology_value is not None:
        pin_to_topology(pod["spec"], _annotation(owner, lws.EXCLUSIVE_TOPOLOGY), topology_value)
    return pod


def _annotation(owner: Object, key: str) -> str:
    return str((owner["metadata"].get("annotations") or {}).get(key) or "")


def _make_pod(owner: Object, blueprint: Blueprint, group: int, worker: int) -> Object:
    set_name, namespace = owner["metadata"]["name"], owner["metadata"]["namespace"]
    leader = lws.leader_name(set_name, group)
    name = lws.worker_name(set_name, group, worker) if worker else leader
    template = blueprint.template.worker_template if worker else blueprint.leader_template
    meta = template.get("metadata") or {}
    spec = copy.deepcopy(template["spec"])
    spec["hostname"] = name
    spec["subdomain"] = blueprint.subdomain(set_name, group)
    _mount_claims(spec, blueprint, name)
    address = f"{leader}.{spec['subdomain']}.{namespace}"
    _add_variables(spec, address, blueprint.template.size, worker)
    found_labels = {
        **(meta.get("labels") or {}),
        lws.SET_NAME: set_name,
        lws.GROUP_INDEX: str(group),
        lws.WORKER_INDEX: str(worker),
        lws.GROUP_KEY: lws.unique_key(namespace, leader),
        lws.REVISION: blueprint.revision,
        labels.REVISION_HASH: blueprint.revision,
        labels.POD_INDEX: str(worker or group),
        labels.STATEFUL_POD_NAME: name,
    }
    annotations = {**(meta.get("annotations") or {}), lws.SIZE: str(blueprint.template.size)}
    for key in (lws.EXCLUSIVE_TOPOLOGY, lws.SUBGROUP_EXCLUSIVE_TOPOLOGY):
        if _annotation(owner, key):
            annotations[key] = _annotation(owner, key)
    pod: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": found_labels, "annotations": annotations},
        "spec": spec,
    }
    _add_subgroup(pod, blueprint.template, leader, worker)
    tpu.add_variables(pod, blueprint.template, leader, worker)
    return pod


def _add_subgroup(pod: Object, template: lws.LeaderWorkerTemplate, leader: str, worker: int) -> None:
    policy = template.sub_group_policy
    if policy is None or policy.sub_group_size is None:
        return
    annotations, found_labels = pod["metadata"]["annotations"], pod["metadata"]["labels"]
    annotations[lws.SUBGROUP_SIZE] = str(policy.sub_group_size)
    if not worker and policy.sub_group_policy_type == "LeaderExcluded":
        return
    index = str(lws.subgroup_index(template.size, policy.sub_group_size, worker))
    key = lws.unique_key(leader, index)
    found_labels |= {lws.SUBGROUP_INDEX: index, lws.SUBGROUP_KEY: key}
    topology = annotations.get(lws.SUBGROUP_EXCLUSIVE_TOPOLOGY)
    if topology:
        add_exclusive_terms(pod["spec"], topology, lws.SUBGROUP_KEY, key)


def _add_variables(spec: Object, address: str, size: int, worker: int) -> None:
    """The set's variables come first, the leader's address before all, and the user's cannot take their names."""
    added = [
        {"name": lws.LEADER_ADDRESS_VARIABLE, "value": address},
        {"name": lws.GROUP_SIZE_VARIABLE, "value": str(size)},
        {"name": lws.WORKER_INDEX_VARIABLE, "value": str(worker)},
    ]
    names = {entry["name"] for entry in added}
    for container in [*(spec.get("initContainers") or []), *spec["containers"]]:
        own = [entry for entry in container.get("env") or [] if entry.get("name") not in names]
        container["env"] = [*copy.deepcopy(added), *own]


def _mount_claims(spec: Object, blueprint: Blueprint, pod: str) -> None:
    claims = [claim["metadata"]["name"] for claim in blueprint.template.volume_claim_templates]
    volumes = [volume for volume in spec.get("volumes") or [] if volume.get("name") not in claims]
    volumes += [{"name": claim, "persistentVolumeClaim": {"claimName": f"{claim}-{pod}"}} for claim in claims]
    if volumes:
        spec["volumes"] = volumes
