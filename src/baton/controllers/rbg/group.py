"""One pass over one RoleBasedGroup: everything it owns, in the order in which it must exist. The front door of this room."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from baton.api import labels
from baton.api.resources import (
    CONFIG_MAPS,
    CONTROLLER_REVISIONS,
    ENDPOINT_SLICES,
    PODS,
    ROLE_BASED_GROUPS,
    SERVICES,
    Object,
)
from baton.api.v1alpha2 import RoleBasedGroup, Spec
from baton.api.validation import validate
from baton.controllers import revisions
from baton.controllers.plan import (
    Action,
    Controller,
    Plan,
    Trigger,
    World,
    changed_status,
    controller_of,
    own_key,
    owner_key,
)
from baton.controllers.pod_set import Hold
from baton.controllers.rbg.discovery import plan_config_map
from baton.controllers.rbg.roles import RoleContext, RoleResult, by_role, plan_orphans, plan_roles, templates_of
from baton.controllers.rbg.services import plan_alias_slices, plan_services, service_names
from baton.controllers.rbg.status import group_status, notes_on_change, refused_status, rejected_status, role_statuses

_HISTORY_LIMIT = 5


@dataclass(frozen=True, slots=True)
class GroupObserved:
    """A group (v1alpha2, as stored) and what exists around it in its namespace."""

    group: Object
    pods: list[Object]
    services: list[Object]
    slices: list[Object]
    history: list[Object]
    config_map: Object | None = None


def observe(world: World, key: str) -> GroupObserved | None:
    namespace, _, name = key.partition("/")
    group = world.get(ROLE_BASED_GROUPS, name, namespace)
    if group is None:
        return None
    uid = group["metadata"]["uid"]
    services = {service["metadata"]["name"]: service for service in world.owned(SERVICES, uid)}
    for wanted in service_names(name, _role_names(group)):
        found = world.get(SERVICES, wanted, namespace)
        if found is not None:
            services[wanted] = found
    return GroupObserved(
        group=group,
        pods=[pod for pod in world.owned(PODS, uid) if _controls(group, pod)],
        services=list(services.values()),
        slices=world.owned(ENDPOINT_SLICES, uid),
        history=world.owned(CONTROLLER_REVISIONS, uid),
        config_map=world.get(CONFIG_MAPS, name, namespace),
    )


def _role_names(group: Object) -> list[str]:
    """As far as a spec that nobody has checked yet has any."""
    roles = (group.get("spec") or {}).get("roles") or []
    return [role["name"] for role in roles if isinstance(role, dict) and isinstance(role.get("name"), str)]


def _controls(group: Object, obj: Object) -> bool:
    owner = controller_of(obj)
    return owner is not None and owner.get("uid") == group["metadata"]["uid"]


def reconcile(observed: GroupObserved, now: datetime) -> Plan:
    """Actions, status and events of one pass. A group that is being deleted is left to the garbage collector."""
    group = observed.group
    if group["metadata"].get("deletionTimestamp"):
        return Plan()
    errors = validate(group)
    if errors:
        status = refused_status(group, errors, now)
        return Plan(status=changed_status(group, status), notes=tuple(notes_on_change(group, status)))
    spec = RoleBasedGroup.parse(group).spec
    pods = by_role(observed.pods)
    actions, conflict = plan_config_map(group, spec, observed.config_map)
    service_actions, service_notes = plan_services(group, spec, observed.services)
    actions += _plan_history(group, spec, observed.history)
    actions += service_actions
    context = RoleContext(
        group=group,
        spec=spec,
        old_status=role_statuses(group),
        old_templates=templates_of(observed.history),
        closed=Hold("Conflict", conflict) if conflict else None,
    )
    results = plan_roles(context, pods, now)
    orphan_actions, notes = plan_orphans(spec, pods)
    actions += orphan_actions
    for result in results.values():
        actions += result.plan.actions
        notes += result.plan.notes
    actions += plan_alias_slices(group, spec, pods, observed.slices)
    status = group_status(group, results, now)
    if _is_first_pass(group):
        notes = service_notes + notes
    return Plan(
        actions=tuple(actions),
        status=changed_status(group, status),
        notes=(*notes, *notes_on_change(group, status)),
        requeue_after_s=_soonest(results.values()),
    )


def _is_first_pass(group: Object) -> bool:
    """Warnings about lasting states are told once per generation."""
    return bool((group.get("status") or {}).get("observedGeneration") != group["metadata"].get("generation"))


def _soonest(results: Iterable[RoleResult]) -> float | None:
    waits = [result.plan.requeue_after_s for result in results if result.plan.requeue_after_s is not None]
    return min(waits, default=None)


def _plan_history(group: Object, spec: Spec, history: list[Object]) -> list[Action]:
    """One ControllerRevision per distinct spec, sizes left out; what pods still use is never forgotten."""
    roles = [{key: value for key, value in role.wire().items() if key != "replicas"} for role in spec.roles]
    data: Object = {"spec": {"roles": roles}}
    if spec.role_templates:
        data["spec"]["roleTemplates"] = [template.wire() for template in spec.role_templates]
    text = revisions.short_hash(data)
    name = group["metadata"]["name"]
    own = {labels.GROUP_NAME: name, labels.GROUP_REVISION: text}
    actions = revisions.record(
        group, history, name=f"{name}-{text}-{{n}}", labels=own, label=labels.GROUP_REVISION, data=data
    )
    in_use = {text} | _revisions_in_use(group, history)
    return actions + revisions.trim(history, labels.GROUP_REVISION, in_use, _HISTORY_LIMIT)


def _revisions_in_use(group: Object, history: list[Object]) -> set[str]:
    current = {(name, entry.get("currentRevision")) for name, entry in role_statuses(group).items()}
    used: set[str] = set()
    for entry in history:
        templates = templates_of([entry])
        if any((role, rev) in current for role, known in templates.items() for rev in known):
            used.add(revisions.hash_of(entry, labels.GROUP_REVISION))
    return used


def _config_map_key(obj: Object, world: World) -> Iterable[str]:
    """A ConfigMap concerns the group of its name, owned or in the way."""
    return own_key(obj, world)


CONTROLLER: Controller[GroupObserved] = Controller(
    name="rolebasedgroup",
    resource=ROLE_BASED_GROUPS,
    triggers=(
        Trigger(ROLE_BASED_GROUPS, own_key),
        Trigger(PODS, owner_key(ROLE_BASED_GROUPS)),
        Trigger(SERVICES, owner_key(ROLE_BASED_GROUPS)),
        Trigger(ENDPOINT_SLICES, owner_key(ROLE_BASED_GROUPS)),
        Trigger(CONTROLLER_REVISIONS, owner_key(ROLE_BASED_GROUPS)),
        Trigger(CONFIG_MAPS, _config_map_key),
    ),
    observe=observe,
    reconcile=reconcile,
    primary=lambda observed: observed.group,
    rejected=rejected_status,
)
