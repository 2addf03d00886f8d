"""apps/v1 ReplicaSet: a number of interchangeable pods of one template, with random names."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from datetime import datetime

from baton.api.resources import PODS, REPLICA_SETS, Object
from baton.controllers.plan import (
    Action,
    Controller,
    Create,
    Delete,
    Note,
    Plan,
    Trigger,
    World,
    changed_status,
    own_key,
    owner_key,
    owner_reference,
)
from baton.controllers.pods import available_at, is_available, is_ready, is_terminating, phase


@dataclass(frozen=True, slots=True)
class ReplicaSetObserved:
    replica_set: Object
    pods: list[Object]


def observe(world: World, key: str) -> ReplicaSetObserved | None:
    namespace, _, name = key.partition("/")
    found = world.get(REPLICA_SETS, name, namespace)
    return None if found is None else ReplicaSetObserved(found, world.owned(PODS, found["metadata"]["uid"]))


def reconcile(observed: ReplicaSetObserved, now: datetime) -> Plan:
    owner = observed.replica_set
    if owner["metadata"].get("deletionTimestamp"):
        return Plan()
    wanted = int(owner["spec"].get("replicas", 1))
    min_ready_s = int(owner["spec"].get("minReadySeconds") or 0)
    alive = [pod for pod in observed.pods if not is_terminating(pod) and phase(pod) not in ("Failed", "Succeeded")]
    actions: list[Action] = []
    notes: list[Note] = []
    for _ in range(wanted - len(alive)):
        actions.append(Create(PODS, _make_pod(owner)))
    if wanted > len(alive):
        notes.append(Note("Normal", "SuccessfulCreate", f"create {wanted - len(alive)} pods"))
    for pod in sorted(alive, key=lambda pod: _keep_order(pod, min_ready_s, now))[wanted:]:
        meta = pod["metadata"]
        actions.append(Delete(PODS, meta["namespace"], meta["name"], meta["uid"], f"scaled down to {wanted}"))
        notes.append(Note("Normal", "SuccessfulDelete", f"delete pod {meta['name']}"))
    status = {
        "observedGeneration": owner["metadata"].get("generation"),
        "replicas": len(alive),
        "fullyLabeledReplicas": len(alive),
        "readyReplicas": sum(map(is_ready, alive)),
        "availableReplicas": sum(is_available(pod, min_ready_s, now) for pod in alive),
    }
    return Plan(tuple(actions), changed_status(owner, status), tuple(notes), _requeue(alive, min_ready_s, now))


def _keep_order(pod: Object, min_ready_s: int, now: datetime) -> tuple[bool, bool, bool, str, str]:
    """Pods to keep come first: scheduled, available, ready, oldest."""
    meta = pod["metadata"]
    return (
        not pod["spec"].get("nodeName"),
        not is_ready(pod),
        not is_available(pod, min_ready_s, now),
        str(meta.get("creationTimestamp")),
        meta["name"],
    )


def _requeue(pods: list[Object], min_ready_s: int, now: datetime) -> float | None:
    times = [available_at(pod, min_ready_s) for pod in pods] if min_ready_s else []
    return min(((at - now).total_seconds() for at in times if at is not None and at > now), default=None)


def _make_pod(owner: Object) -> Object:
    template = owner["spec"]["template"]
    meta = copy.deepcopy(template.get("metadata") or {})
    meta |= {
        "generateName": f"{owner['metadata']['name']}-",
        "namespace": owner["metadata"]["namespace"],
        "ownerReferences": [owner_reference(owner)],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": copy.deepcopy(template["spec"])}


CONTROLLER: Controller[ReplicaSetObserved] = Controller(
    name="replicaset",
    resource=REPLICA_SETS,
    triggers=(Trigger(REPLICA_SETS, own_key), Trigger(PODS, owner_key(REPLICA_SETS))),
    observe=observe,
    reconcile=reconcile,
    primary=lambda observed: observed.replica_set,
)
