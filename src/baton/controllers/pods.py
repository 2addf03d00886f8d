"""Facts about one pod, read from its object: phase, readiness, why it is not ready. Nothing is decided here."""

from __future__ import annotations

from datetime import datetime, timedelta

from baton.api.resources import Object
from baton.controllers.plan import parse_time


def is_terminating(pod: Object) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp"))


def phase(pod: Object) -> str:
    return str((pod.get("status") or {}).get("phase") or "Pending")


def condition(pod: Object, kind: str) -> Object | None:
    for entry in (pod.get("status") or {}).get("conditions") or []:
        if entry.get("type") == kind:
            return dict(entry)
    return None


def is_ready(pod: Object) -> bool:
    """Condition Ready is True and the pod is neither finished nor on its way out."""
    ready = condition(pod, "Ready")
    return ready is not None and ready.get("status") == "True" and phase(pod) == "Running" and not is_terminating(pod)


def available_at(pod: Object, min_ready_s: int) -> datetime | None:
    """When a ready pod counts (or counted) as available; None for one that is not ready."""
    ready = condition(pod, "Ready")
    if not is_ready(pod) or ready is None:
        return None
    since = ready.get("lastTransitionTime") or pod["metadata"].get("creationTimestamp")
    return parse_time(str(since)) + timedelta(seconds=min_ready_s)


def is_available(pod: Object, min_ready_s: int, now: datetime) -> bool:
    """Ready, and for ``min_ready_s`` at least."""
    if not min_ready_s:
        return is_ready(pod)
    at = available_at(pod, min_ready_s)
    return at is not None and at <= now


def revision_of(pod: Object) -> str:
    return str((pod["metadata"].get("labels") or {}).get("controller-revision-hash") or "")


def container_statuses(pod: Object) -> dict[str, Object]:
    entries = (pod.get("status") or {}).get("containerStatuses") or []
    return {entry["name"]: entry for entry in entries}


def explain(pod: Object) -> str:
    """Why a pod is not ready, in one line that names it."""
    return f"pod {pod['metadata']['name']} {_cause(pod)}"


def _cause(pod: Object) -> str:
    if is_terminating(pod):
        return "is terminating"
    scheduled = condition(pod, "PodScheduled")
    if scheduled is not None and scheduled.get("status") == "False":
        return f"cannot be scheduled: {scheduled.get('message') or scheduled.get('reason')}"
    status = pod.get("status") or {}
    if phase(pod) in ("Failed", "Succeeded"):
        return f"has ended: {status.get('message') or status.get('reason') or phase(pod)}"
    for entry in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (entry.get("state") or {}).get("waiting")
        if waiting and waiting.get("reason") not in ("ContainerCreating", "PodInitializing"):
            detail = f": {waiting['message']}" if waiting.get("message") else ""
            return f"container {entry['name']} is waiting ({waiting.get('reason')}{detail})"
        ended = (entry.get("state") or {}).get("terminated")
        if ended and ended.get("exitCode"):
            return f"container {entry['name']} ended with exit code {ended['exitCode']}"
    if not (pod.get("spec") or {}).get("nodeName"):
        return "is not scheduled yet"
    return "is starting" if phase(pod) == "Pending" else "is running but not ready yet"
