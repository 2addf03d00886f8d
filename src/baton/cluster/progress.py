"""What is ready, what waits, for what and why: one line for each role, workload, pod or claim.

Pure: objects in, rows out. Owns the words shown while `baton up` waits. Who fetches the objects is `follow`, who prints
them is the command.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from baton.api import labels, lws
from baton.api.resources import Object
from baton.cluster.publish import PUBLISHED, routes

State = Literal["ready", "waiting", "stuck"]
_UNREACHABLE = re.compile(r"probe failed.*(refused|[Cc]annot connect|Connect call failed)")
"""A probe's way of saying that the program does not listen yet: said shorter here."""
SETTLE_S = 2.0
"""How long a container that no probe checks must have run before it is called ready."""
STUCK_RESTARTS = 2
"""Restarts after which a container that keeps ending is called stuck: no longer likely to cure itself."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line. `stuck`: nothing but a change by the user is likely to make it ready. `where`: file and line, or empty."""

    title: str
    state: State
    text: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.title}: {self.text}"


@dataclass(frozen=True, slots=True)
class View:
    """The objects of one namespace that rows are made of."""

    pods: Sequence[Object]
    events: Sequence[Object] = ()
    now: datetime | None = None

    def warning(self, obj: Object) -> str:
        """The newest Warning event about an object, in one line; empty when there is none."""
        uid = obj["metadata"].get("uid")
        found = [one for one in self.events if one.get("type") == "Warning" and _about(one) == uid]
        if not found:
            return ""
        newest = max(found, key=lambda one: int(one["metadata"].get("resourceVersion") or 0))
        return " ".join(str(newest.get("message") or newest.get("reason")).split())


def rows_of(obj: Object, view: View) -> list[Row]:
    """Rows of one applied object as it is now. An object of a kind without readiness has none."""
    kind, name = obj["kind"], obj["metadata"]["name"]
    if obj["metadata"].get("deletionTimestamp"):
        return [Row(f"{kind.lower()}/{name}", "waiting", "is being deleted")]
    if kind == "RoleBasedGroup":
        return _group(obj, view)
    if kind == "LeaderWorkerSet":
        return [_leader_worker_set(obj, view)]
    if kind in ("Deployment", "StatefulSet"):
        return [_workload(obj, view)]
    if kind == "Pod":
        state, text = explain_pod(obj, view)
        return [Row(f"pod/{name}", state, text)]
    if kind == "PersistentVolumeClaim":
        return [_claim(obj, view)]
    if kind == "Service":
        return _service(obj, view)
    return []


def explain_pod(pod: Object, view: View) -> tuple[State, str]:
    """Where a pod is, and what it waits for."""
    status: Mapping[str, Any] = pod.get("status") or {}
    conditions = {one["type"]: one for one in status.get("conditions") or []}
    if pod["metadata"].get("deletionTimestamp"):
        return "waiting", "is being stopped"
    if status.get("phase") == "Succeeded":
        return "ready", "completed"
    for container in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        found = _explain_container(container, pod["metadata"]["name"])
        if found is not None:
            return found
    if (conditions.get("Ready") or {}).get("status") == "True":
        return ("waiting", "has just started") if _is_fresh(pod, view.now) else ("ready", "ready")
    if status.get("phase") == "Failed":
        return "stuck", f"failed: {status.get('message') or status.get('reason') or 'a container ended'}"
    scheduled = conditions.get("PodScheduled") or {}
    if scheduled.get("status") == "False":
        return "stuck", _unscheduled(_one_line(scheduled.get("message")))
    if not pod["spec"].get("nodeName"):
        return "waiting", "waits for a node"
    warning = view.warning(pod)
    if warning and not _UNREACHABLE.search(warning):
        return "waiting", warning
    running = [one for one in status.get("containerStatuses") or [] if "running" in (one.get("state") or {})]
    if running:
        return "waiting", f"{running[0]['name']} runs, {_probe(pod, running[0]['name'])}"
    return "waiting", "starts"


def _is_fresh(pod: Object, now: datetime | None) -> bool:
    """Ready only because nothing checks it: a command that ends at once looks so for a moment."""
    probed = {one["name"] for one in pod["spec"]["containers"] if one.get("readinessProbe")}
    for one in (pod.get("status") or {}).get("containerStatuses") or []:
        started = ((one.get("state") or {}).get("running") or {}).get("startedAt")
        if now is not None and started and one["name"] not in probed:
            age_s = (now - datetime.fromisoformat(str(started).replace("Z", "+00:00"))).total_seconds()
            if age_s < SETTLE_S:
                return True
    return False


def _unscheduled(message: str) -> str:
    missing = re.search(r'persistentvolumeclaim "([^"]+)" not found', message)
    if missing:
        return (
            f"{message}: apply a PersistentVolumeClaim {missing[1]} (its directory: baton up --volume {missing[1]}=DIR)"
        )
    return f"does not fit on a node: {message}"


def _explain_container(container: Object, pod: str) -> tuple[State, str] | None:
    """What a container's own state says: a reason it does not run, None when there is nothing to say."""
    state = container.get("state") or {}
    waiting = state.get("waiting") or {}
    reason, restarts = str(waiting.get("reason") or ""), int(container.get("restartCount") or 0)
    ended = (container.get("lastState") or {}).get("terminated") or state.get("terminated")
    if reason in ("", "ContainerCreating", "PodInitializing") and not (ended and "running" not in state and restarts):
        return None
    name = container["name"]
    if ended and (reason == "CrashLoopBackOff" or "waiting" not in state):
        stuck = restarts >= STUCK_RESTARTS
        message = f" ({_last_words(ended['message'])})" if ended.get("message") else ""
        times = f"{restarts} restart{'s' if restarts != 1 else ''}"
        text = f"{name} exits with code {ended.get('exitCode')}{message}, {times}; see `kubectl logs {pod} --previous`"
        return "stuck" if stuck else "waiting", text
    message = _one_line(waiting.get("message"))
    return "stuck", f"{name}: {reason}{': ' + message if message else ''}"


def _probe(pod: Object, container: str) -> str:
    spec: Object = next((one for one in pod["spec"]["containers"] if one["name"] == container), {})
    for key in ("startupProbe", "readinessProbe"):
        probe = spec.get(key)
        if probe:
            for kind in ("tcpSocket", "httpGet", "grpc"):
                if probe.get(kind):
                    return f"its {key} waits for port {probe[kind].get('port')}"
            return f"its {key} does not pass yet"
    return "not ready yet"


def _group(group: Object, view: View) -> list[Row]:
    name, status = group["metadata"]["name"], group.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition["type"] == "Accepted" and condition["status"] == "False":
            return [Row(f"rolebasedgroup/{name}", "stuck", f"refused: {_one_line(condition.get('message'))}")]
    told = {one.get("name"): one for one in status.get("roleStatuses") or []}
    rows = [_role(group, role, told.get(role["name"]) or {}, view, name) for role in group["spec"]["roles"]]
    if not any(row.state == "stuck" for row in rows):
        return rows
    # A role without pods waits for another one here, and in vain as long as that one is stuck.
    idle = {f"{name}/{role['name']}" for role in group["spec"]["roles"] if not _role_pods(view, name, role["name"])}
    return [Row(row.title, "stuck", row.text) if row.state == "waiting" and row.title in idle else row for row in rows]


def _role(group: Object, role: Object, told: Object, view: View, name: str) -> Row:
    wanted = int(role.get("replicas", 1))
    title = f"{name}/{role['name']}"
    pods = _role_pods(view, name, role["name"])
    summary = _pods_row(title, pods, wanted, view)
    if summary.state != "ready" and not any(not _is_ready(one) for one in pods):
        hold = told.get("hold")
        why = _hold(hold) if hold else view.warning(group)
        return Row(title, "waiting", f"{_count(pods, wanted)} ready{', ' + why if why else ''}")
    return summary


def _hold(hold: Any) -> str:
    if not isinstance(hold, dict):
        return _one_line(hold)
    return _one_line(hold.get("reason") or hold.get("gate"))


def _workload(workload: Object, view: View) -> Row:
    spec, name = workload["spec"], workload["metadata"]["name"]
    selector = (spec.get("selector") or {}).get("matchLabels") or {}
    pods = [one for one in view.pods if _matches(one, selector)]
    row = _pods_row(f"{workload['kind'].lower()}/{name}", pods, int(spec.get("replicas", 1)), view)
    if row.state == "waiting" and not pods:
        warning = view.warning(workload)
        return Row(row.title, "waiting", f"{row.text}{', ' + warning if warning else ''}")
    return row


def _leader_worker_set(found: Object, view: View) -> Row:
    name, spec = found["metadata"]["name"], found["spec"]
    wanted = int(spec.get("replicas", 1)) * int(spec["leaderWorkerTemplate"].get("size", 1))
    pods = [one for one in view.pods if _matches(one, {lws.SET_NAME: name})]
    row = _pods_row(f"leaderworkerset/{name}", pods, wanted, view)
    why = (found.get("status") or {}).get("hold") or view.warning(found)
    if row.state == "waiting" and len(pods) < wanted and why:
        return Row(row.title, "waiting", f"{_count(pods, wanted)} ready, {_one_line(why)}")
    return row


def _pods_row(title: str, pods: Sequence[Object], wanted: int, view: View) -> Row:
    """Counted pods, with the first of those that are not ready explained."""
    text = f"{_count(pods, wanted)} ready"
    worst: State = "ready"
    for pod in pods:
        if _is_ready(pod) and not _is_fresh(pod, view.now):
            continue
        state, why = explain_pod(pod, view)
        if worst == "ready" or (state == "stuck" and worst == "waiting"):
            worst, text = state, f"{_count(pods, wanted)} ready, {pod['metadata']['name']}: {why}"
    if worst == "ready" and len(pods) != wanted:
        worst = "waiting"
    return Row(title, worst, text)


def _claim(claim: Object, view: View) -> Row:
    title, phase = f"persistentvolumeclaim/{claim['metadata']['name']}", (claim.get("status") or {}).get("phase")
    if phase == "Bound":
        return Row(title, "ready", f"bound to volume {claim['spec'].get('volumeName')}")
    return Row(title, "waiting", view.warning(claim) or "waits for a volume")


def _service(service: Object, view: View) -> list[Row]:
    """Only what is published on 127.0.0.1 has something to wait for."""
    wanted = routes(service)
    if not wanted:
        return []
    title = f"service/{service['metadata']['name']}"
    told = _published(service)
    if told == [f"127.0.0.1:{route.port}" for route in wanted]:
        return [Row(title, "ready", f"published at {', '.join(told)}")]
    warning = view.warning(service)
    return [Row(title, "stuck" if warning else "waiting", warning or f"waits for port {wanted[0].port} on 127.0.0.1")]


def addresses(services: Iterable[Object]) -> list[tuple[str, str]]:
    """(service, address) of each port that a program on this machine can connect to; headless Services have none."""
    found = []
    for service in services:
        spec, name = service["spec"], service["metadata"]["name"]
        address, told = spec.get("clusterIP"), _published(service)
        for index, port in enumerate(spec.get("ports") or []):
            scheme = "http://" if _speaks_http(port) else ""
            if index < len(told):
                found.append((name, f"{scheme}{told[index]}"))
            elif address and address != "None":
                found.append((name, f"{scheme}{address}:{port['port']}"))
    return found


def _speaks_http(port: Object) -> bool:
    name = str(port.get("appProtocol") or port.get("name") or "")
    return name.startswith("http") or (not name and port["port"] in (80, 8000, 8080))


def _published(service: Object) -> list[str]:
    text = (service["metadata"].get("annotations") or {}).get(PUBLISHED)
    return text.split(",") if text else []


def _about(event: Object) -> str | None:
    about = event.get("involvedObject") or event.get("regarding") or {}
    uid = about.get("uid")
    return str(uid) if uid else None


def _role_pods(view: View, group: str, role: str) -> list[Object]:
    return [one for one in view.pods if _is_of_role(one, group, role)]


def _is_of_role(pod: Object, group: str, role: str) -> bool:
    found = pod["metadata"].get("labels") or {}
    new = found.get(labels.GROUP_NAME) == group and found.get(labels.ROLE_NAME) == role
    return new or (found.get(labels.OLD_GROUP_NAME) == group and found.get(labels.OLD_ROLE_NAME) == role)


def _matches(pod: Object, selector: Mapping[str, str]) -> bool:
    found = pod["metadata"].get("labels") or {}
    return bool(selector) and all(found.get(key) == value for key, value in selector.items())


def _is_ready(pod: Object) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
    return ready and not pod["metadata"].get("deletionTimestamp")


def _count(pods: Sequence[Object], wanted: int) -> str:
    return f"{sum(map(_is_ready, pods))}/{wanted}"


def _last_words(message: Any) -> str:
    """A program's last lines on one; of a Python traceback only the exception, which is its last."""
    lines = str(message).strip().splitlines()
    is_traceback = any(line.lstrip().startswith(('File "', "Traceback ")) for line in lines)
    return _one_line(lines[-1] if is_traceback else message)


def _one_line(text: Any) -> str:
    return " ".join(str(text or "").split())
