"""Variables by which the TPU processes of a group (or subgroup) find each other; only for pods that ask for TPUs.

The names and the default port are those of Cloud TPU's runtime, as upstream sets them.
"""

from __future__ import annotations

from baton.api import lws
from baton.api.resources import Object

RESOURCE = "google.com/tpu"
FIRST_PORT = 8476


def asks_for_tpus(spec: Object) -> bool:
    return bool(_containers(spec))


def add_variables(pod: Object, template: lws.LeaderWorkerTemplate, leader: str, worker: int) -> None:
    """Add to the pod of one worker (0: the leader). Every pod is taken to have as many TPU containers as this one.

    A user who sets TPU_WORKER_HOSTNAMES or TPU_WORKER_ID does all of this alone.
    """
    containers = _containers(pod["spec"])
    members = _members(template, worker)
    if not containers or worker not in members or _own(containers[0]) & {"TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"}:
        return
    ports = [_port(container, FIRST_PORT + index) for index, container in enumerate(containers)]
    hosts = [f"{leader}-{one}" if one else leader for one in members]
    names = [f"{host}.{pod['spec']['subdomain']}" for host in hosts for _ in containers]
    addresses = [f"{name}:{ports[index % len(ports)]}" for index, name in enumerate(names)]
    for index, container in enumerate(containers):
        values = {
            "TPU_WORKER_HOSTNAMES": ",".join(names),
            "TPU_WORKER_ID": str(members.index(worker) * len(containers) + index),
            "TPU_NAME": leader,
            "TPU_PROCESS_ADDRESSES": ",".join(addresses),
        }
        if "TPU_PROCESS_PORT" not in _own(container):
            values["TPU_PROCESS_PORT"] = ports[index]
        container.setdefault("env", []).extend({"name": name, "value": value} for name, value in values.items())


def _members(template: lws.LeaderWorkerTemplate, worker: int) -> list[int]:
    """Who of the group works together with ``worker``, in the order of their ids."""
    has_tpus = asks_for_tpus((template.leader_template or template.worker_template)["spec"])
    found = list(range(0 if has_tpus else 1, template.size))
    policy = template.sub_group_policy
    if policy is None or policy.sub_group_size is None:
        return found
    if policy.sub_group_policy_type == "LeaderExcluded":
        found = [one for one in found if one]
    index = lws.subgroup_index(template.size, policy.sub_group_size, worker)
    return [one for one in found if lws.subgroup_index(template.size, policy.sub_group_size, one) == index]


def _containers(spec: Object) -> list[Object]:
    every = [*spec["containers"], *(spec.get("initContainers") or [])]
    return [container for container in every if _wants(container)]


def _wants(container: Object) -> bool:
    resources = container.get("resources") or {}
    counts = [(resources.get(kind) or {}).get(RESOURCE) for kind in ("limits", "requests")]
    return any(count not in (None, 0, "0", "") for count in counts)


def _own(container: Object) -> set[str]:
    return {str(entry.get("name")) for entry in container.get("env") or []}


def _port(container: Object, default: int) -> str:
    given = [entry for entry in container.get("env") or [] if entry.get("name") == "TPU_PROCESS_PORT"]
    return str(given[0].get("value") or default) if given else str(default)
