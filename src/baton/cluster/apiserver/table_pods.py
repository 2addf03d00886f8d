"""The pod table: READY, STATUS, RESTARTS and the rest, as kubectl users know them.

Owns `POD_COLUMNS` and `pod_cells`. The status word follows kube-apiserver's printer: init containers first, then the
worst container, then deletion.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from baton.cluster.apiserver.ages import age, parse_time
from baton.cluster.apiserver.resources import Column

JSON = dict[str, Any]
NONE = "<none>"
POD_COLUMNS = [
    Column("Name", format="name", description="Name must be unique within a namespace."),
    Column("Ready", description="The containers that are ready, of all containers in the pod."),
    Column("Status", description="What the pod does, or what it waits for."),
    Column("Restarts", description="How often its containers were restarted, and when last."),
    Column("Age", description="Time since creation."),
    Column("IP", description="The pod's own address.", priority=1),
    Column("Node", description="The node it runs on.", priority=1),
    Column("Nominated Node", description="The node it may get after preemption.", priority=1),
    Column("Readiness Gates", description="Conditions that must hold besides container readiness.", priority=1),
]


def pod_cells(pod: JSON) -> list[Any]:
    spec, status = pod.get("spec") or {}, pod.get("status") or {}
    reason, restarts, last_restart, ready = _summary(pod, spec, status)
    shown = f"{restarts} ({age(last_restart.isoformat())} ago)" if restarts and last_restart else str(restarts)
    total = len(spec.get("containers") or ()) + len(_sidecars(spec))
    return [
        pod["metadata"]["name"],
        f"{ready}/{total}",
        reason,
        shown,
        age(pod["metadata"].get("creationTimestamp")),
        status.get("podIP") or NONE,
        spec.get("nodeName") or NONE,
        status.get("nominatedNodeName") or NONE,
        _gates(spec, status),
    ]


def _sidecars(spec: JSON) -> set[str]:
    return {c["name"] for c in spec.get("initContainers") or () if c.get("restartPolicy") == "Always"}


def _gates(spec: JSON, status: JSON) -> str:
    gates = spec.get("readinessGates") or ()
    if not gates:
        return NONE
    true = {c["type"] for c in status.get("conditions") or () if c.get("status") == "True"}
    return f"{sum(g['conditionType'] in true for g in gates)}/{len(gates)}"


class _Tally:
    """Restarts and readiness while the container statuses are walked."""

    def __init__(self) -> None:
        self.restarts = 0
        self.ready = 0
        self.last: datetime | None = None

    def count(self, container: JSON) -> None:
        self.restarts += container.get("restartCount", 0)
        ended = parse_time(((container.get("lastState") or {}).get("terminated") or {}).get("finishedAt"))
        if ended and (self.last is None or ended > self.last):
            self.last = ended


def _summary(pod: JSON, spec: JSON, status: JSON) -> tuple[str, int, datetime | None, int]:
    reason = status.get("reason") or status.get("phase") or "Unknown"
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "SchedulingGated":
            reason = "SchedulingGated"
    tally, sidecars = _Tally(), _sidecars(spec)
    init_reason = _init_reason(spec, status, sidecars, tally)
    if init_reason is None:
        if sidecars == set():
            tally.restarts, tally.last = 0, None
        reason = _container_reason(status, tally, reason)
    else:
        reason = init_reason
    if pod["metadata"].get("deletionTimestamp") and status.get("reason") == "NodeLost":
        reason = "Unknown"
    elif pod["metadata"].get("deletionTimestamp") and status.get("phase") not in ("Succeeded", "Failed"):
        reason = "Terminating"
    return reason, tally.restarts, tally.last, tally.ready


def _init_reason(spec: JSON, status: JSON, sidecars: set[str], tally: _Tally) -> str | None:
    """The status word while init containers are not done; None afterwards."""
    total = len(spec.get("initContainers") or ())
    for index, container in enumerate(status.get("initContainerStatuses") or ()):
        tally.count(container)
        state = container.get("state") or {}
        ended, waiting = state.get("terminated"), state.get("waiting")
        if ended is not None and ended.get("exitCode", 0) == 0:
            continue
        if container["name"] in sidecars and container.get("started"):
            tally.ready += bool(container.get("ready"))
            continue
        if ended is not None:
            return "Init:" + _ended(ended)
        if waiting and waiting.get("reason") and waiting["reason"] != "PodInitializing":
            return f"Init:{waiting['reason']}"
        return f"Init:{index}/{total}"
    return None


def _ended(state: JSON) -> str:
    if state.get("reason"):
        return str(state["reason"])
    return f"Signal:{state['signal']}" if state.get("signal") else f"ExitCode:{state.get('exitCode', 0)}"


def _container_reason(status: JSON, tally: _Tally, reason: str) -> str:
    running = False
    for container in reversed(status.get("containerStatuses") or []):
        tally.count(container)
        state = container.get("state") or {}
        waiting, ended = state.get("waiting") or {}, state.get("terminated")
        if waiting.get("reason"):
            reason = waiting["reason"]
        elif ended is not None:
            reason = _ended(ended)
        elif container.get("ready") and state.get("running") is not None:
            running = True
            tally.ready += 1
    if reason == "Completed" and running:
        ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or ())
        reason = "Running" if ready else "NotReady"
    return reason
