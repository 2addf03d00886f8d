"""A set's status: counts of groups, conditions in upstream's words, what it waits for; and the events of their changes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from baton.api import lws
from baton.api.resources import Object
from baton.api.wire import FieldError
from baton.controllers.lws.rollout import GroupState
from baton.controllers.plan import Action, Note, set_condition

# type -> (reason, message)
_CONDITIONS = {
    "Available": ("AllGroupsReady", "All replicas are ready"),
    "Progressing": ("GroupsProgressing", "Replicas are progressing"),
    "UpdateInProgress": ("GroupsUpdating", "Rolling Upgrade is in progress"),
}


def set_status(
    owner: Object, spec: lws.Spec, states: Sequence[GroupState], num_groups: int, is_updating: bool, now: datetime
) -> Object:
    """The whole new status, without a hold. ``states`` are those of all groups there should be, surge ones too."""
    first = spec.rollout_strategy.rolling_update_configuration.partition
    wanted = states[: spec.replicas]
    true: tuple[str, ...]
    false: tuple[str, ...]
    if is_updating and not all(state.updated for state in wanted[first:]):
        true, false = ("UpdateInProgress", "Progressing"), ("Available",)
    elif all(state.ready for state in wanted) and all(state.done for state in wanted[first:]):
        true, false = ("Available",), ("Progressing", "UpdateInProgress")
    else:
        true, false = ("Progressing",), ("Available",)
    generation = owner["metadata"].get("generation")
    conditions = list((owner.get("status") or {}).get("conditions") or [])
    known = {entry.get("type") for entry in conditions}
    for kind in (*true, *(kind for kind in false if kind in known)):
        reason, message = _CONDITIONS[kind]
        conditions = set_condition(conditions, kind, kind in true, reason, message, now, generation)
    if "Accepted" in known:
        conditions = set_condition(conditions, "Accepted", True, "Valid", "The spec is valid", now, generation)
    return {
        "observedGeneration": generation,
        "conditions": conditions,
        "replicas": num_groups,
        "readyReplicas": sum(state.ready for state in states),
        "updatedReplicas": sum(state.updated for state in states),
        "hpaPodSelector": lws.pod_selector(owner["metadata"]["name"]),
    }


def refused_status(owner: Object, errors: list[FieldError], now: datetime) -> Object:
    """For a spec that only a server without our rules lets in: what runs is left alone, a condition says what to change."""
    old = owner.get("status") or {}
    generation = owner["metadata"].get("generation")
    message = "; ".join(map(str, errors))[:1024]
    conditions = list(old.get("conditions") or [])
    conditions = set_condition(conditions, "Accepted", False, "InvalidSpec", message, now, generation)
    return {**old, "observedGeneration": generation, "conditions": conditions, "hold": message}


def rejected_status(owner: Object, planned: Object, refusals: list[tuple[Action, str]], now: datetime) -> Object:
    """``planned`` with the server's refusal as what the set waits for."""
    return {**planned, "hold": refusals[0][1]}


def notes_on_change(owner: Object, status: Object) -> list[Note]:
    """One event for each condition that became true, none for a state that lasts."""
    before, after = _conditions(owner.get("status") or {}), _conditions(status)
    notes: list[Note] = []
    refused = after.get("Accepted", {})
    if refused.get("status") == "False" and refused.get("message") != before.get("Accepted", {}).get("message"):
        notes.append(Note("Warning", "InvalidSpec", str(refused.get("message"))))
    for kind, (reason, message) in _CONDITIONS.items():
        is_new = after.get(kind, {}).get("status") == "True" and before.get(kind, {}).get("status") != "True"
        if is_new and "replicas" in status:
            ready, total = status["readyReplicas"], owner["spec"].get("replicas", 1)
            notes.append(Note("Normal", reason, f"{message}, with {ready} groups ready of total {total} groups"))
    return notes


def _conditions(status: Object) -> dict[str, Object]:
    return {entry["type"]: entry for entry in status.get("conditions") or []}
