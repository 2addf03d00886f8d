"""The roles of a group, planned in dependency order. A dependency gates the *first* creation of a role's pods, no more:
an unready dependency never blocks scaling, updating or healing of a role that has started.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from baton.api import labels, names
from baton.api.common import normal_update_type
from baton.api.quantity import resolve_count
from baton.api.resources import PODS, Object
from baton.api.v1alpha2 import RoleSpec, Spec
from baton.api.wire import InvalidObjectError
from baton.controllers.plan import Action, Delete, Note
from baton.controllers.pod_set import Hold, PodSetPlan, PodSetSpec, plan_pod_set
from baton.controllers.pods import is_terminating
from baton.controllers.rbg.pod_template import make_pod, revision, user_template


@dataclass(frozen=True, slots=True)
class RoleResult:
    """A role's plan with what its status needs beside it."""

    role: RoleSpec
    plan: PodSetPlan
    current_revision: str
    update_revision: str
    started: bool

    @property
    def is_ready(self) -> bool:
        counts = self.plan.counts
        return counts.replicas == counts.ready == self.role.replicas

    @property
    def is_updating(self) -> bool:
        """Some pod has, or is only now being rid of, an older template. Scaling alone is no update."""
        counts = self.plan.counts
        return self.current_revision != self.update_revision or counts.updated < counts.replicas


@dataclass(frozen=True, slots=True)
class RoleContext:
    """What planning one role reads: the group, its spec and old status, old templates, and a hold on creating."""

    group: Object
    spec: Spec
    old_status: dict[str, Object]
    old_templates: dict[str, dict[str, Object]]
    closed: Hold | None


def plan_roles(context: RoleContext, pods: dict[str, list[Object]], now: datetime) -> dict[str, RoleResult]:
    """Results by role name, in spec order. ``pods`` are the group's, by role."""
    results: dict[str, RoleResult] = {}
    for role in in_dependency_order(context.spec):
        results[role.name] = _plan_role(context, role, pods.get(role.name, []), results, now)
    return {role.name: results[role.name] for role in context.spec.roles}


def in_dependency_order(spec: Spec) -> list[RoleSpec]:
    """Every role after its dependencies; spec order otherwise. The graph must have no cycle."""
    by_name = {role.name: role for role in spec.roles}
    ordered: dict[str, RoleSpec] = {}

    def visit(role: RoleSpec) -> None:
        if role.name not in ordered:
            for dependency in role.dependencies:
                visit(by_name[dependency])
            ordered[role.name] = role

    for role in spec.roles:
        visit(role)
    return list(ordered.values())


def _plan_role(
    context: RoleContext, role: RoleSpec, pods: list[Object], done: dict[str, RoleResult], now: datetime
) -> RoleResult:
    group = context.group
    old = context.old_status.get(role.name, {})
    template = user_template(context.spec, role)
    wanted = revision(template)
    templates = {**context.old_templates.get(role.name, {}), wanted: template}
    current = str(old.get("currentRevision") or wanted)
    if current not in templates:
        current = wanted
    started = bool(old.get("started")) or any(not is_terminating(pod) for pod in pods)
    waiting = None if started else _unmet_dependency(role, done)
    update = role.rollout_strategy.rolling_update
    spec = PodSetSpec(
        name=names.workload_name(group["metadata"]["name"], role.name),
        replicas=role.replicas,
        update_revision=wanted,
        current_revision=current,
        make_pod=lambda ordinal, rev: make_pod(group, role, templates[rev], rev, ordinal),
        template_of=templates.get,
        update_type=normal_update_type(update.type) or "InPlaceIfPossible",
        partition=resolve_count(update.partition, role.replicas, round_up=True),
        max_unavailable=max(1, resolve_count(update.max_unavailable, role.replicas, round_up=True)),
        min_ready_s=role.min_ready_seconds,
        ordered=role.pod_management_policy == "OrderedReady",
        paused=update.paused,
        closed=waiting or context.closed,
    )
    plan = plan_pod_set(spec, pods, now)
    counts = plan.counts
    finished = spec.partition == 0 and counts.updated_ready == counts.replicas == role.replicas
    return RoleResult(
        role=role,
        plan=plan,
        current_revision=wanted if finished else current,
        update_revision=wanted,
        started=started or waiting is None,
    )


def _unmet_dependency(role: RoleSpec, done: dict[str, RoleResult]) -> Hold | None:
    for name in role.dependencies:
        result = done[name]
        if not result.is_ready:
            counts = result.plan.counts
            return Hold(
                "Dependency", f"starts when role {name} is ready ({counts.ready} of {result.role.replicas} pods)"
            )
    return None


def plan_orphans(spec: Spec, pods: dict[str, list[Object]]) -> tuple[list[Action], list[Note]]:
    """Pods of roles that the spec no longer has."""
    wanted = {role.name for role in spec.roles}
    actions: list[Action] = []
    notes: list[Note] = []
    for role, members in pods.items():
        for pod in members:
            if role not in wanted and not is_terminating(pod):
                meta = pod["metadata"]
                actions.append(Delete(PODS, meta["namespace"], meta["name"], meta["uid"], "its role is gone"))
                notes.append(Note("Normal", "SuccessfulDelete", f"delete pod {meta['name']}: role {role} is gone"))
    return actions, notes


def templates_of(history: list[Object]) -> dict[str, dict[str, Object]]:
    """Old templates by role and revision, from the group's ControllerRevisions. Data that is not ours is skipped."""
    found: dict[str, dict[str, Object]] = {}
    for entry in history:
        try:
            spec = Spec.parse((entry.get("data") or {}).get("spec"))
        except InvalidObjectError:
            continue
        for role in spec.roles:
            if role.standalone_pattern is not None:
                template = user_template(spec, role)
                found.setdefault(role.name, {})[revision(template)] = template
    return found


def by_role(pods: list[Object]) -> dict[str, list[Object]]:
    """The group's pods by their role label, in order of their names."""
    grouped: dict[str, list[Object]] = {}
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
        grouped.setdefault((pod["metadata"].get("labels") or {}).get(labels.ROLE_NAME, ""), []).append(pod)
    return grouped
