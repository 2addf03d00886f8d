"""A group's status: counts and one hold per role, conditions, and the events that a change of them deserves."""

from __future__ import annotations

from datetime import datetime

from baton.api.labels import ROLE_NAME
from baton.api.resources import Object
from baton.api.wire import FieldError
from baton.controllers.plan import Action, Create, Note, format_time, set_condition
from baton.controllers.pod_set import Hold
from baton.controllers.rbg.roles import RoleResult

_HOLD_EVENTS = {
    "Dependency": ("Normal", "DependencyNotMet"),
    "Conflict": ("Warning", "Conflict"),
    "Paused": ("Normal", "RolloutPaused"),
    "InPlaceOnly": ("Warning", "RolloutBlocked"),
}


def role_statuses(group: Object) -> dict[str, Object]:
    entries = (group.get("status") or {}).get("roleStatuses") or []
    return {entry["name"]: entry for entry in entries if entry.get("name")}


def group_status(group: Object, results: dict[str, RoleResult], now: datetime) -> Object:
    """The whole new status."""
    old = role_statuses(group)
    generation = group["metadata"].get("generation")
    entries = [_role_status(result, old.get(name, {}), now) for name, result in results.items()]
    unready = [name for name, result in results.items() if not result.is_ready]
    conditions = list((group.get("status") or {}).get("conditions") or [])
    conditions = set_condition(conditions, "Accepted", True, "Valid", "The spec is valid", now, generation)
    if unready:
        message = f"Not all role ready: {', '.join(unready)}"
        conditions = set_condition(conditions, "Ready", False, "RoleNotReady", message, now, generation)
    else:
        conditions = set_condition(conditions, "Ready", True, "AllRolesReady", "All roles are ready", now, generation)
    rolling = [name for name, result in results.items() if result.started and result.is_updating and name in old]
    if rolling:
        message = f"Roles with pods of an older template: {', '.join(rolling)}"
        conditions = set_condition(conditions, "RollingUpdateInProgress", True, "Updating", message, now, generation)
    else:
        message = "All pods have the newest template"
        conditions = set_condition(conditions, "RollingUpdateInProgress", False, "UpToDate", message, now, generation)
    status: Object = {
        "observedGeneration": generation,
        "conditions": conditions,
        "roleStatuses": entries,
        "pods": _pods_text(results),
    }
    held = [entry for entry in entries if "hold" in entry]
    if held:
        first = next((entry for entry in held if entry["hold"]["gate"] != "Dependency"), held[0])
        status["hold"] = f"{first['name']}: {first['hold']['reason']}"
    return status


def _pods_text(results: dict[str, RoleResult]) -> str:
    ready = sum(result.plan.counts.ready for result in results.values())
    return f"{ready}/{sum(result.role.replicas for result in results.values())}"


def _role_status(result: RoleResult, old: Object, now: datetime) -> Object:
    counts = result.plan.counts
    entry: Object = {
        "name": result.role.name,
        "replicas": counts.replicas,
        "readyReplicas": counts.ready,
        "availableReplicas": counts.available,
        "updatedReplicas": counts.updated,
        "currentRevision": result.current_revision,
        "updateRevision": result.update_revision,
        "started": result.started,
    }
    if result.plan.hold is not None:
        entry["hold"] = _hold(result.plan.hold, old.get("hold") or {}, now)
    return entry


def _hold(hold: Hold, old: Object, now: datetime) -> Object:
    """``since`` is when the gate began to hold; its reason may change in the meantime."""
    since = old.get("since") if old.get("gate") == hold.gate else None
    return {"gate": hold.gate, "reason": hold.reason, "since": since or format_time(now)}


def refused_status(group: Object, errors: list[FieldError], now: datetime) -> Object:
    """For a spec that cannot be carried out: what runs is left alone, the conditions say what to change."""
    generation = group["metadata"].get("generation")
    conditions = list((group.get("status") or {}).get("conditions") or [])
    message = "; ".join(map(str, errors))[:1024]
    conditions = set_condition(conditions, "Accepted", False, "InvalidSpec", message, now, generation)
    conditions = set_condition(conditions, "Ready", False, "InvalidSpec", message, now, generation)
    return {
        **(group.get("status") or {}),
        "observedGeneration": generation,
        "conditions": conditions,
        "hold": message,
    }


def rejected_status(group: Object, planned: Object, refusals: list[tuple[Action, str]], now: datetime) -> Object:
    """``planned`` with a hold on every role whose pod the API server refused."""
    old = role_statuses(group)
    holds: dict[str, Hold] = {}
    for action, message in refusals:
        role = _role_of(action)
        if role:
            holds.setdefault(role, Hold("Rejected", message))
    entries = [
        {**entry, "hold": _hold(holds[entry["name"]], old.get(entry["name"], {}).get("hold") or {}, now)}
        if entry["name"] in holds
        else entry
        for entry in planned.get("roleStatuses") or []
    ]
    first = next(((entry["name"], entry["hold"]) for entry in entries if entry["name"] in holds), None)
    text = f"{first[0]}: {first[1]['reason']}" if first else refusals[0][1]
    return {**planned, "roleStatuses": entries, "hold": text}


def _role_of(action: Action) -> str:
    if isinstance(action, Create):
        return str((action.obj["metadata"].get("labels") or {}).get(ROLE_NAME) or "")
    return ""


def notes_on_change(group: Object, status: Object) -> list[Note]:
    """Events for what changed between the group's status and ``status``: never one for a state that lasts."""
    notes: list[Note] = []
    before, after = _conditions(group.get("status") or {}), _conditions(status)
    old_ready, new_ready = before.get("Ready", {}), after.get("Ready", {})
    if new_ready.get("status") == "True" and old_ready.get("status") != "True":
        notes.append(Note("Normal", "AllRolesReady", "All roles are ready"))
    elif new_ready.get("reason") == "InvalidSpec" and new_ready.get("message") != old_ready.get("message"):
        notes.append(Note("Warning", "InvalidSpec", str(new_ready.get("message"))))
    old_roles = role_statuses(group)
    for entry in status.get("roleStatuses") or []:
        hold = entry.get("hold") or {}
        event = _HOLD_EVENTS.get(hold.get("gate", ""))
        if event and (old_roles.get(entry["name"], {}).get("hold") or {}).get("gate") != hold["gate"]:
            kind = "Warning" if event[0] == "Warning" else "Normal"
            notes.append(Note(kind, event[1], f"role {entry['name']}: {hold['reason']}"))  # type: ignore[arg-type]
    return notes


def _conditions(status: Object) -> dict[str, Object]:
    return {entry["type"]: entry for entry in status.get("conditions") or []}
