"""Why a group has to be made again, and when: the restart policies.

A group is lost when any of its pods was: a container restarted, the pod ended or was deleted. What happened is put in
words here, because the pods that could tell are deleted. Upstream recreates without a pause; here a group that keeps
failing waits longer each time, and its pods (and so their logs) stay meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from baton.api import lws
from baton.api.names import NODE_STOPPED
from baton.api.resources import Object
from baton.controllers.lws.groups import Group
from baton.controllers.lws.memory import Recreation
from baton.controllers.pods import condition, is_terminating, phase

BASE_DELAY = timedelta(seconds=10)
MAX_DELAY = timedelta(seconds=300)
FORGET_AFTER = timedelta(seconds=600)
_MESSAGE_CHARS = 300


@dataclass(frozen=True, slots=True)
class Loss:
    """What happened to a group. ``by_itself``: a container ended; else somebody took a pod away."""

    pod: str
    what: str
    by_itself: bool
    is_restart: bool = False

    def __str__(self) -> str:
        return f"pod {self.pod} {self.what}"


def effective_policy(owner: Object, policy: lws.RestartPolicy) -> lws.RestartPolicy:
    """The annotation of before the policy had a name still works; the deprecated Default means None."""
    if policy == "Default":
        return "None"
    if policy == "RecreateGroupOnPodRestart" and lws.RECREATE_AFTER_START in (
        owner["metadata"].get("annotations") or {}
    ):
        return "RecreateGroupAfterStart"
    return policy


def find_loss(group: Group, policy: lws.RestartPolicy) -> Loss | None:
    """The first reason by which a living group must be made again."""
    if policy == "None" or not group.is_alive:
        return None
    if policy == "RecreateGroupAfterStart" and not _has_started(group):
        return None
    restarted_as_one = _restarted_as_one(group)
    for pod in group.members:
        found = _what_happened(pod)
        if found is not None and not (restarted_as_one and found.is_restart):
            return found
    for index, uid in sorted(group.roster.items()):
        worker = group.workers.get(index)
        if index < group.size and (worker is None or worker["metadata"]["uid"] != uid):
            return Loss(f"{group.leader_name}-{index}", "is gone", by_itself=False)
    return None


def _has_started(group: Group) -> bool:
    """No pod is pending, and every worker has been there."""
    known = set(group.workers) | set(group.roster)
    return known >= set(range(1, group.size)) and all(phase(pod) != "Pending" for pod in group.members)


def _restarted_as_one(group: Group) -> bool:
    """Every container ended before any of them started again, as when a machine or an embedded cluster is stopped and
    started: what making the group again is for has happened. Times are whole seconds, so within one it is not known."""
    ends: list[str] = []
    starts: list[str] = []
    for pod in group.members:
        ready = condition(pod, "Ready") or {}
        if (ready.get("status"), ready.get("reason")) == ("False", NODE_STOPPED):
            continue  # ended with all others, not started again yet
        entries = (pod.get("status") or {}).get("containerStatuses") or []
        for entry in entries:
            state = entry.get("state") or {}
            ended = state.get("terminated") or (entry.get("lastState") or {}).get("terminated") or {}
            end, start = ended.get("finishedAt"), (state.get("running") or {}).get("startedAt")
            if not end:
                return False
            ends.append(str(end))
            starts += [str(start)] if start else []
        if not entries:
            return False
    return bool(ends) and (not starts or max(ends) < min(starts))  # RFC 3339 in UTC sorts as text


def _what_happened(pod: Object) -> Loss | None:
    name, status = str(pod["metadata"]["name"]), pod.get("status") or {}
    if phase(pod) in ("Failed", "Succeeded"):
        reason = status.get("reason") or status.get("message") or phase(pod)
        return Loss(name, f"has ended ({reason}){_ended_container(status)}", by_itself=True)
    if phase(pod) in ("Running", "Pending"):
        for entry in _statuses(status):
            if int(entry.get("restartCount") or 0) > 0:
                return Loss(name, f"restarted: {_describe(entry)}", by_itself=True, is_restart=True)
    if is_terminating(pod):
        return Loss(name, "is being deleted", by_itself=False)
    return None


def _statuses(status: Object) -> list[Object]:
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def _ended_container(status: Object) -> str:
    for entry in _statuses(status):
        if ((entry.get("state") or {}).get("terminated") or {}).get("exitCode"):
            return f": {_describe(entry)}"
    return ""


def _describe(entry: Object) -> str:
    """`container main ended with exit code 137 (OOMKilled): its last words`"""
    ended = (entry.get("lastState") or {}).get("terminated") or (entry.get("state") or {}).get("terminated") or {}
    text = f"container {entry.get('name')} ended"
    if "exitCode" in ended:
        text += f" with exit code {ended['exitCode']}"
    if ended.get("reason") not in (None, "", "Error", "Completed"):
        text += f" ({ended['reason']})"
    words = " ".join(str(ended.get("message") or "").split())
    return f"{text}: {words[-_MESSAGE_CHARS:]}" if words else text


def delay_before(past: Recreation | None, now: datetime) -> timedelta:
    """How long a group that failed again still has to wait; zero or less: it is due."""
    if past is None or is_forgotten(past, now):
        return timedelta()
    wait: timedelta = min(BASE_DELAY * 2 ** min(past.count - 1, 16), MAX_DELAY)
    return past.last + wait - now


def is_forgotten(past: Recreation, now: datetime) -> bool:
    return now - past.last > FORGET_AFTER


def counted(past: Recreation | None, now: datetime) -> Recreation:
    return Recreation(1 if past is None or is_forgotten(past, now) else past.count + 1, now)
