"""A pod's status from what its containers are. Pure: snapshots in, `status` out, in a kubelet's words.

Conditions of others (readiness gates, PodScheduled, DisruptionTarget) are read, never written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.cluster.node.environment import HOST_IP, Object

OWN_CONDITIONS = ("PodReadyToStartContainers", "Initialized", "ContainersReady", "Ready")


@dataclass(frozen=True, slots=True)
class ContainerSnapshot:
    """One container at one moment. `state` and `last_state` are as on the wire; `is_done`: it will not run again."""

    name: str
    image: str
    image_id: str
    container_id: str
    state: Mapping[str, Any]
    last_state: Mapping[str, Any]
    is_ready: bool
    is_started: bool
    restart_count: int
    has_run: bool
    exit_code: int | None
    is_done: bool

    def on_the_wire(self, *, is_ready: bool) -> Object:
        status: Object = {
            "name": self.name, "image": self.image, "imageID": self.image_id, "containerID": self.container_id,
            "state": dict(self.state), "lastState": dict(self.last_state), "ready": is_ready,
            "started": self.is_started, "restartCount": self.restart_count,
        }  # fmt: skip
        if not self.container_id:
            del status["containerID"]
        return status


@dataclass(frozen=True, slots=True)
class PodSnapshot:
    """A pod at one moment. `address` is "" before the pod has a slot; `now` in epoch seconds."""

    pod: Object
    address: str
    init: Sequence[ContainerSnapshot]
    sidecars: frozenset[str]
    containers: Sequence[ContainerSnapshot]
    now: float
    started_at: float


def rfc3339(epoch_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch_s))


def build(snapshot: PodSnapshot) -> Object:
    """The pod's status, without the conditions that are not ours."""
    status: Object = {
        "phase": phase(snapshot),
        "conditions": conditions(snapshot),
        "hostIP": HOST_IP,
        "hostIPs": [{"ip": HOST_IP}],
        "startTime": rfc3339(snapshot.started_at),
        "qosClass": (snapshot.pod.get("status") or {}).get("qosClass") or "BestEffort",
        "containerStatuses": [one.on_the_wire(is_ready=one.is_ready) for one in snapshot.containers],
    }
    if snapshot.init:
        status["initContainerStatuses"] = [
            one.on_the_wire(is_ready=one.is_ready if one.name in snapshot.sidecars else one.exit_code == 0)
            for one in snapshot.init
        ]
    if snapshot.address:
        status["podIP"] = snapshot.address
        status["podIPs"] = [{"ip": snapshot.address}]
    return status


def as_patch(status: Object) -> Object:
    """For a strategic merge: a condition that has no reason or message loses the one it had."""
    gone = {"reason": None, "message": None}
    return {**status, "conditions": [{**gone, **condition} for condition in status["conditions"]]}


def is_initialized(snapshot: PodSnapshot) -> bool:
    return all(
        (one.is_started or (one.has_run and any(c.has_run for c in snapshot.containers)))
        if one.name in snapshot.sidecars
        else one.exit_code == 0 and one.is_done
        for one in snapshot.init
    )


def phase(snapshot: PodSnapshot) -> str:
    """Pending until every container ran once; then Running until all have ended for good."""
    policy = snapshot.pod["spec"].get("restartPolicy") or "Always"
    failed_init = [
        one for one in snapshot.init if one.name not in snapshot.sidecars and one.is_done and one.exit_code != 0
    ]
    if failed_init:
        return "Failed"
    if not is_initialized(snapshot) or any(not one.has_run for one in snapshot.containers):
        return "Pending"
    if policy == "Always" or not all(one.is_done for one in snapshot.containers):
        return "Running"
    return "Succeeded" if all(one.exit_code == 0 for one in snapshot.containers) else "Failed"


def conditions(snapshot: PodSnapshot) -> list[Object]:
    """Our four conditions; a transition time stays as long as its status."""
    old = {one["type"]: one for one in (snapshot.pod.get("status") or {}).get("conditions") or []}
    unready = [one.name for one in snapshot.containers if not one.is_ready]
    missing_init = [one.name for one in snapshot.init if not (one.is_started or (one.is_done and one.exit_code == 0))]
    ended = phase(snapshot) in ("Succeeded", "Failed")
    gates = [gate["conditionType"] for gate in snapshot.pod["spec"].get("readinessGates") or []]
    closed = [gate for gate in gates if old.get(gate, {}).get("status") != "True"]
    initialized = is_initialized(snapshot)
    result = [
        _condition("PodReadyToStartContainers", bool(snapshot.address)),
        _condition(
            "Initialized",
            initialized,
            "ContainersNotInitialized",
            f"containers with incomplete status: {_list(missing_init)}",
        ),
    ]
    if ended:
        completed = phase(snapshot) == "Succeeded"
        reason = "PodCompleted" if completed else "PodFailed"
        result += [_condition("ContainersReady", False, reason), _condition("Ready", False, reason)]
    else:
        why = f"containers with unready status: {_list(unready)}"
        result.append(_condition("ContainersReady", not unready, "ContainersNotReady", why))
        if unready:
            result.append(_condition("Ready", False, "ContainersNotReady", why))
        else:
            gate_message = "; ".join(
                f'corresponding condition of pod readiness gate "{one}" does not exist' for one in closed
            )
            result.append(_condition("Ready", not closed, "ReadinessGatesNotReady", gate_message))
    for one in result:
        before = old.get(one["type"])
        same = before is not None and before.get("status") == one["status"] and before.get("lastTransitionTime")
        one["lastTransitionTime"] = same or rfc3339(snapshot.now)
    return result


def differs(pod: Object, status: Object) -> bool:
    """Whether writing `status` would change the pod (foreign conditions and unknown fields aside)."""
    current = pod.get("status") or {}
    own = [one for one in current.get("conditions") or [] if one["type"] in OWN_CONDITIONS]
    by_type = {one["type"]: _comparable(one) for one in own}
    if by_type != {one["type"]: _comparable(one) for one in status["conditions"]}:
        return True
    return any(_normal(current.get(key)) != _normal(value) for key, value in status.items() if key != "conditions")


def _comparable(condition: Object) -> dict[str, Any]:
    return {key: condition.get(key) or None for key in ("status", "reason", "message")}


def _normal(value: Any) -> Any:
    """Without empty members, which a server may leave out."""
    if isinstance(value, dict):
        return {key: _normal(one) for key, one in value.items() if one not in ({}, [], "", None, False)}
    if isinstance(value, list):
        return [_normal(one) for one in value]
    return value


def _condition(kind: str, is_true: bool, reason: str = "", message: str = "") -> Object:
    result: Object = {"type": kind, "status": "True" if is_true else "False"}
    if not is_true:
        result |= {key: value for key, value in (("reason", reason), ("message", message)) if value}
    return result


def _list(names: Sequence[str]) -> str:
    return f"[{' '.join(names)}]"
