"""An ordered set of pods `{name}-0 .. {name}-(n-1)`: creation, scaling, rolling update. The heart of roles and StatefulSets.

:func:`plan_pod_set` decides one step from what is there. In its words: an ordinal is *unavailable* while its pod is missing,
ending, not ready for long enough, or still restarting after an in-place change. Invariant of every step: an update
never makes more ordinals unavailable than ``max_unavailable``; it may always act on ordinals that already are.
Not here: what a pod looks like (``make_pod``), who owns it, status.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from baton.api.names import ordinal_of
from baton.api.resources import PODS, Object
from baton.controllers import in_place
from baton.controllers.plan import Action, Create, Delete, Note
from baton.controllers.pods import (
    available_at,
    explain,
    is_available,
    is_ready,
    is_terminating,
    phase,
    revision_of,
)

UpdateType = Literal["OnDelete", "RecreatePod", "InPlaceIfPossible", "InPlaceOnly"]


@dataclass(frozen=True, slots=True)
class Hold:
    """The one thing a set of pods waits for: ``gate`` is a fixed word, ``reason`` a sentence for people."""

    gate: Literal["Rejected", "Dependency", "Conflict", "Paused", "InPlaceOnly", "Budget", "Order", "Ready"]
    reason: str


@dataclass(frozen=True, slots=True)
class PodSetSpec:
    """What is wanted. ``template_of(revision)`` gives the template of a known revision (None: forgotten).

    Ordinals below ``partition`` (counted from ``first``) are made at ``current_revision``, the rest at
    ``update_revision``. ``ordered``: one pod at a time, each after its predecessor is ready. ``replace_phases``: pods
    in these phases are deleted and made again.
    """

    name: str
    replicas: int
    update_revision: str
    current_revision: str
    make_pod: Callable[[int, str], Object]
    template_of: Callable[[str], Object | None]
    update_type: UpdateType = "RecreatePod"
    first: int = 0
    partition: int = 0
    max_unavailable: int = 1
    min_ready_s: int = 0
    ordered: bool = False
    paused: bool = False
    replace_phases: frozenset[str] = frozenset({"Failed"})
    closed: Hold | None = None
    """A hold that forbids creating pods (only that: running ones are left alone)."""

    def wanted_revision(self, ordinal: int) -> str:
        return self.update_revision if ordinal >= self.first + self.partition else self.current_revision

    @property
    def ordinals(self) -> range:
        return range(self.first, self.first + self.replicas)


@dataclass(frozen=True, slots=True)
class Counts:
    """Pods of the set by state; ``replicas`` counts every pod with an ordinal that is not ending."""

    replicas: int = 0
    ready: int = 0
    available: int = 0
    updated: int = 0
    current: int = 0
    updated_ready: int = 0


@dataclass(slots=True)
class PodSetPlan:
    actions: list[Action] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    hold: Hold | None = None
    requeue_after_s: float | None = None

    def hold_for(self, hold: Hold) -> None:
        """The first reason found is the one told."""
        if self.hold is None:
            self.hold = hold


def plan_pod_set(spec: PodSetSpec, pods: list[Object], now: datetime) -> PodSetPlan:
    """One step towards ``spec`` from ``pods`` (those of this set; pods with foreign names are ignored)."""
    plan = PodSetPlan()
    by_ordinal: dict[int, Object] = {}
    for pod in pods:
        ordinal = ordinal_of(pod["metadata"]["name"], spec.name)
        if ordinal is not None:
            by_ordinal[ordinal] = pod
    plan.counts = _count(spec, by_ordinal, now)
    _remove_surplus(spec, by_ordinal, plan, now)
    _replace_ended(spec, by_ordinal, plan)
    _create_missing(spec, by_ordinal, plan, now)
    _update(spec, by_ordinal, plan, now)
    _explain_unready(spec, by_ordinal, plan, now)
    _requeue_for_min_ready(spec, by_ordinal, plan, now)
    return plan


def _is_unavailable(spec: PodSetSpec, pod: Object | None, now: datetime) -> bool:
    return pod is None or not is_available(pod, spec.min_ready_s, now) or not in_place.is_done(pod)


def _count(spec: PodSetSpec, by_ordinal: dict[int, Object], now: datetime) -> Counts:
    alive = {ordinal: pod for ordinal, pod in by_ordinal.items() if not is_terminating(pod)}
    ready = [pod for pod in alive.values() if is_ready(pod) and in_place.is_done(pod)]
    updated = [pod for pod in alive.values() if revision_of(pod) == spec.update_revision]
    return Counts(
        replicas=len(alive),
        ready=len(ready),
        available=sum(not _is_unavailable(spec, pod, now) for pod in alive.values()),
        updated=len(updated),
        current=sum(revision_of(pod) == spec.current_revision for pod in alive.values()),
        updated_ready=sum(is_ready(pod) and in_place.is_done(pod) for pod in updated),
    )


def _delete(plan: PodSetPlan, pod: Object, why: str) -> None:
    meta = pod["metadata"]
    plan.actions.append(Delete(PODS, meta["namespace"], meta["name"], meta["uid"], why))
    plan.notes.append(Note("Normal", "SuccessfulDelete", f"delete pod {meta['name']}: {why}"))


def _remove_surplus(spec: PodSetSpec, by_ordinal: dict[int, Object], plan: PodSetPlan, now: datetime) -> None:
    """Scaling down: highest ordinal first; one at a time when ordered."""
    surplus = sorted((ordinal for ordinal in by_ordinal if ordinal not in spec.ordinals), reverse=True)
    for ordinal in surplus:
        if not is_terminating(by_ordinal[ordinal]):
            _delete(plan, by_ordinal[ordinal], f"scaled down to {spec.replicas}")
        if spec.ordered:
            if ordinal != surplus[-1] or is_terminating(by_ordinal[ordinal]):
                plan.hold_for(Hold("Order", f"pod {spec.name}-{ordinal} must end before the next one is touched"))
            return


def _replace_ended(spec: PodSetSpec, by_ordinal: dict[int, Object], plan: PodSetPlan) -> None:
    for ordinal in spec.ordinals:
        pod = by_ordinal.get(ordinal)
        if pod is not None and phase(pod) in spec.replace_phases and not is_terminating(pod):
            _delete(plan, pod, f"has ended ({phase(pod)}) and is replaced")


def _create_missing(spec: PodSetSpec, by_ordinal: dict[int, Object], plan: PodSetPlan, now: datetime) -> None:
    missing = [ordinal for ordinal in spec.ordinals if ordinal not in by_ordinal]
    if missing and spec.closed is not None:
        plan.hold_for(spec.closed)
        return
    for ordinal in missing:
        if spec.ordered:
            blocker = next(
                (o for o in range(spec.first, ordinal) if o not in by_ordinal or not is_ready(by_ordinal[o])), None
            )
            if blocker is not None or plan.actions:
                if blocker is not None and blocker in by_ordinal:
                    plan.hold_for(
                        Hold("Order", f"pod {spec.name}-{ordinal} starts after {explain(by_ordinal[blocker])}")
                    )
                return
        pod = spec.make_pod(ordinal, spec.wanted_revision(ordinal))
        plan.actions.append(Create(PODS, pod))
        plan.notes.append(Note("Normal", "SuccessfulCreate", f"create pod {pod['metadata']['name']}"))


def _update(spec: PodSetSpec, by_ordinal: dict[int, Object], plan: PodSetPlan, now: datetime) -> None:
    """Bring outdated pods to the update revision, highest ordinal first, within the budget."""
    touched = {action.name for action in plan.actions if isinstance(action, Delete)}
    outdated = [
        by_ordinal[ordinal]
        for ordinal in reversed(spec.ordinals)
        if ordinal >= spec.first + spec.partition
        and ordinal in by_ordinal
        and revision_of(by_ordinal[ordinal]) != spec.update_revision
        and not is_terminating(by_ordinal[ordinal])
        and by_ordinal[ordinal]["metadata"]["name"] not in touched
    ]
    if not outdated or spec.update_type == "OnDelete":
        return
    if spec.paused:
        plan.hold_for(Hold("Paused", f"{len(outdated)} pods wait for the new template: the rollout is paused"))
        return
    unavailable = [ordinal for ordinal in spec.ordinals if _is_unavailable(spec, by_ordinal.get(ordinal), now)]
    budget = spec.max_unavailable - len(unavailable)
    for pod in outdated:
        costs = not _is_unavailable(spec, pod, now)
        if costs and budget <= 0:
            plan.hold_for(_budget_hold(spec, pod, unavailable, by_ordinal))
            continue
        if _update_one(spec, pod, plan, now) and costs:
            budget -= 1
            unavailable.append(_ordinal(spec, pod))


def _ordinal(spec: PodSetSpec, pod: Object) -> int:
    ordinal = ordinal_of(pod["metadata"]["name"], spec.name)
    assert ordinal is not None, "only pods with an ordinal are in the set"
    return ordinal


def _budget_hold(spec: PodSetSpec, pod: Object, unavailable: list[int], by_ordinal: dict[int, Object]) -> Hold:
    blocker = unavailable[-1]
    cause = f"pod {spec.name}-{blocker} is missing"
    if blocker in by_ordinal:
        found = by_ordinal[blocker]
        cause = f"{spec.name}-{blocker} is being updated" if is_ready(found) else explain(found)
    return Hold(
        "Budget", f"pod {pod['metadata']['name']} is updated next (at most {spec.max_unavailable} down); {cause}"
    )


def _update_one(spec: PodSetSpec, pod: Object, plan: PodSetPlan, now: datetime) -> bool:
    """Update one pod, in place if allowed and possible; False when it may not be touched."""
    name = pod["metadata"]["name"]
    if spec.update_type != "RecreatePod":
        old, new = spec.template_of(revision_of(pod)), spec.template_of(spec.update_revision)
        hindrance = (
            in_place.obstacle(old, new) if old is not None and new is not None else "its old template is not known"
        )
        if hindrance is None and old is not None and new is not None:
            patch = in_place.update(pod, old, new, spec.update_revision, now)
            plan.actions.append(patch)
            plan.notes.append(Note("Normal", "SuccessfulUpdatePodInPlace", f"update pod {name}: {patch.why}"))
            return True
        if spec.update_type == "InPlaceOnly":
            reason = f"pod {name} cannot be updated in place: {hindrance} changed; use type InPlaceIfPossible"
            plan.hold_for(Hold("InPlaceOnly", reason))
            return False
    _delete(plan, pod, "its template changed")
    return True


def _explain_unready(spec: PodSetSpec, by_ordinal: dict[int, Object], plan: PodSetPlan, now: datetime) -> None:
    for ordinal in spec.ordinals:
        pod = by_ordinal.get(ordinal)
        if pod is None:
            plan.hold_for(Hold("Ready", f"pod {spec.name}-{ordinal} is being created"))
        elif not is_ready(pod):
            plan.hold_for(Hold("Ready", explain(pod)))
        elif not in_place.is_done(pod):
            plan.hold_for(Hold("Ready", f"pod {spec.name}-{ordinal} restarts its container with a new image"))
        elif _is_unavailable(spec, pod, now):
            plan.hold_for(Hold("Ready", f"pod {spec.name}-{ordinal} is ready for less than {spec.min_ready_s} s"))


def _requeue_for_min_ready(spec: PodSetSpec, by_ordinal: dict[int, Object], plan: PodSetPlan, now: datetime) -> None:
    waits = [
        (at - now).total_seconds()
        for pod in by_ordinal.values()
        if spec.min_ready_s and (at := available_at(pod, spec.min_ready_s)) is not None and at > now
    ]
    if waits:
        plan.requeue_after_s = min(waits)
