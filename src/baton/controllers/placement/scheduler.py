"""All pods that wait for a node, in one pass: priority first, then age. One key, so no two decisions race."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from baton.api.resources import NODES, PERSISTENT_VOLUME_CLAIMS, PODS, Object
from baton.controllers.placement.place import Placement, place
from baton.controllers.plan import Action, Bind, Controller, Note, Patch, Plan, Trigger, World, set_condition
from baton.controllers.pods import condition, is_terminating, phase

_ALL = "all"
SCHEDULER_NAMES = frozenset({"", "default-scheduler"})


@dataclass(frozen=True, slots=True)
class ClusterObserved:
    nodes: list[Object]
    pods: list[Object]
    claims: dict[str, Object]


def observe(world: World, key: str) -> ClusterObserved | None:
    claims = {f"{c['metadata']['namespace']}/{c['metadata']['name']}": c for c in world.all(PERSISTENT_VOLUME_CLAIMS)}
    return ClusterObserved(world.all(NODES), world.all(PODS), claims)


def reconcile(observed: ClusterObserved, now: datetime) -> Plan:
    """Bind what fits; mark what does not with PodScheduled=False and an event when the reason is new."""
    waiting = [pod for pod in observed.pods if _waits(pod)]
    waiting.sort(key=lambda pod: (-int(pod["spec"].get("priority") or 0), *_age(pod)))
    running = [pod for pod in observed.pods if pod["spec"].get("nodeName")]
    actions: list[Action] = []
    notes: list[Note] = []
    for pod in waiting:
        meta = pod["metadata"]
        problem = _unbound_claim(pod, observed.claims)
        found = Placement(None, problem) if problem else place(pod, observed.nodes, running)
        if found.node is not None:
            actions.append(Bind(meta["namespace"], meta["name"], meta["uid"], found.node))
            text = f"Successfully assigned {meta['namespace']}/{meta['name']} to {found.node}"
            notes.append(Note("Normal", "Scheduled", text, pod))
            running.append({**pod, "spec": {**pod["spec"], "nodeName": found.node}})
        else:
            known = condition(pod, "PodScheduled") or {}
            if known.get("message") != found.message or known.get("status") != "False":
                actions.append(_unschedulable(pod, found.message, now))
                notes.append(Note("Warning", "FailedScheduling", found.message, pod))
    return Plan(tuple(actions), notes=tuple(notes))


def _waits(pod: Object) -> bool:
    spec = pod["spec"]
    return (
        not spec.get("nodeName")
        and not spec.get("schedulingGates")
        and (spec.get("schedulerName") or "") in SCHEDULER_NAMES
        and not is_terminating(pod)
        and phase(pod) == "Pending"
    )


def _age(pod: Object) -> tuple[str, str, str]:
    meta = pod["metadata"]
    return str(meta.get("creationTimestamp")), meta["namespace"], meta["name"]


def _unbound_claim(pod: Object, claims: dict[str, Object]) -> str:
    for volume in pod["spec"].get("volumes") or []:
        name = (volume.get("persistentVolumeClaim") or {}).get("claimName")
        if not name:
            continue
        claim = claims.get(f"{pod['metadata']['namespace']}/{name}")
        if claim is None:
            return f'persistentvolumeclaim "{name}" not found'
        if (claim.get("status") or {}).get("phase") != "Bound":
            return f'pod has unbound immediate PersistentVolumeClaims: "{name}"'
    return ""


def _unschedulable(pod: Object, message: str, now: datetime) -> Patch:
    conditions = list((pod.get("status") or {}).get("conditions") or [])
    conditions = set_condition(conditions, "PodScheduled", False, "Unschedulable", message, now, None)
    meta = pod["metadata"]
    body: Object = {"status": {"phase": "Pending", "conditions": conditions}}
    return Patch(PODS, meta["namespace"], meta["name"], body, subresource="status", why=message)


def _one_key(_: Object, __: World) -> Iterable[str]:
    return (_ALL,)


CONTROLLER: Controller[ClusterObserved] = Controller(
    name="scheduler",
    resource=PODS,
    triggers=(Trigger(PODS, _one_key), Trigger(NODES, _one_key), Trigger(PERSISTENT_VOLUME_CLAIMS, _one_key)),
    observe=observe,
    reconcile=reconcile,
    primary=lambda observed: None,
)
