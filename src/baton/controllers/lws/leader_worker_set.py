"""One pass over one LeaderWorkerSet: revision, how far the rollout may go, each group, status. The front door of this room.

There are no StatefulSets in between, as upstream has: this controller owns the leaders, and each leader its workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from baton.api import lws
from baton.api.lws_validation import validate
from baton.api.resources import (
    CONTROLLER_REVISIONS,
    LEADER_WORKER_SETS,
    NODES,
    PERSISTENT_VOLUME_CLAIMS,
    PODS,
    SERVICES,
    Object,
)
from baton.controllers.lws import history as revisions
from baton.controllers.lws.claims import plan_scaled_down
from baton.controllers.lws.group_plan import GroupPlanner
from baton.controllers.lws.groups import Group, sort_into_groups
from baton.controllers.lws.memory import Memory, Recreation, recall
from baton.controllers.lws.pod_template import Blueprint
from baton.controllers.lws.restart import is_forgotten
from baton.controllers.lws.rollout import GroupState, Limits, Progress, advance
from baton.controllers.lws.services import plan_shared
from baton.controllers.lws.status import notes_on_change, refused_status, rejected_status, set_status
from baton.controllers.plan import Controller, Note, Plan, Trigger, World, changed_status, own_key, owner_key


@dataclass(frozen=True, slots=True)
class SetObserved:
    """A set and what exists around it in its namespace; ``pods`` and ``claims`` are those with its name label."""

    leader_worker_set: Object
    pods: list[Object]
    history: list[Object]
    services: dict[str, Object]
    claims: dict[str, Object]
    nodes: dict[str, Object]


def observe(world: World, key: str) -> SetObserved | None:
    namespace, _, name = key.partition("/")
    found = world.get(LEADER_WORKER_SETS, name, namespace)
    if found is None:
        return None
    pods = world.labelled(PODS, lws.SET_NAME, name, namespace)
    claims = world.labelled(PERSISTENT_VOLUME_CLAIMS, lws.SET_NAME, name, namespace)
    services = [world.get(SERVICES, each, namespace) for each in {name, *(p["metadata"]["name"] for p in pods)}]
    nodes = [world.get(NODES, each) for each in {pod["spec"].get("nodeName") or "" for pod in pods} if each]
    return SetObserved(
        leader_worker_set=found,
        pods=pods,
        history=world.owned(CONTROLLER_REVISIONS, found["metadata"]["uid"]),
        services={service["metadata"]["name"]: service for service in services if service is not None},
        claims={claim["metadata"]["name"]: claim for claim in claims},
        nodes={node["metadata"]["name"]: node for node in nodes if node is not None},
    )


def reconcile(observed: SetObserved, now: datetime) -> Plan:
    """Actions, status and events of one pass. A set that is being deleted is left to the garbage collector."""
    owner = observed.leader_worker_set
    if owner["metadata"].get("deletionTimestamp"):
        return Plan()
    errors = validate(owner)
    if errors:
        status = refused_status(owner, errors, now)
        return Plan(status=changed_status(owner, status), notes=tuple(notes_on_change(owner, status)))
    spec = lws.LeaderWorkerSet.parse(owner).spec
    newest = revisions.newest_blueprint(spec)
    blueprints = {**revisions.blueprints_of(observed.history), newest.revision: newest}
    groups = sort_into_groups(owner, observed.pods)
    before = _before(recall(observed.history), spec, blueprints, newest.revision, groups)
    states = _states(groups, newest.revision)
    limits = Limits.of(spec)
    is_new = before is not None and before.update != newest.revision
    progress = advance(limits, None if before is None else before.progress, is_new, states)
    planner = GroupPlanner(
        owner=owner,
        spec=spec,
        blueprints=blueprints,
        services=observed.services,
        claims=observed.claims,
        nodes=observed.nodes,
        recreations=_recent(before, progress, now),
        now=now,
    )
    current = _current(before, newest.revision, blueprints, progress, states)
    _plan_groups(planner, groups, limits, progress, current, newest.revision)
    remembered = Memory(current, newest.revision, progress, planner.recreations)
    status = set_status(
        owner, spec, _present(states, progress.replicas), len(_living(groups)), current != newest.revision, now
    )
    if planner.holds:
        status["hold"] = planner.holds[0]
    in_use = {group.revision for group in groups.values()}
    busy = {index for index, group in groups.items() if not group.is_empty}
    return Plan(
        actions=(
            *revisions.plan_history(owner, spec, observed.history, remembered, in_use),
            *plan_shared(owner, [blueprints[current], newest], observed.services),
            *planner.actions,
            *plan_scaled_down(newest, max(progress.replicas, spec.replicas), busy, observed.claims),
        ),
        status=changed_status(owner, status),
        notes=(*_rollout_notes(before, remembered), *planner.notes, *notes_on_change(owner, status)),
        requeue_after_s=min((wait.total_seconds() for wait in planner.waits), default=None),
    )


def _before(
    remembered: Memory | None,
    spec: lws.Spec,
    blueprints: dict[str, Blueprint],
    newest: str,
    groups: dict[int, Group],
) -> Memory | None:
    """What was remembered. When that is lost but groups live, the most careful guess: an update that has yet to begin."""
    living = _living(groups)
    if remembered is not None or not living:
        return remembered
    outdated = [group.revision for group in living if group.revision != newest]
    count = max(group.index for group in living) + 1
    if not outdated:
        return Memory(newest, newest, Progress(0, count, spec.replicas))
    known = [revision for revision in outdated if revision in blueprints]
    return Memory(known[0] if known else newest, "", Progress(spec.replicas, count, spec.replicas))


def _living(groups: dict[int, Group]) -> list[Group]:
    return [groups[index] for index in sorted(groups) if groups[index].is_alive]


def _states(groups: dict[int, Group], newest: str) -> list[GroupState]:
    count = max(groups, default=-1) + 1
    found = [groups.get(index, Group(index)) for index in range(count)]
    return [GroupState(group.is_ready, group.is_updated(newest)) for group in found]


def _present(states: list[GroupState], count: int) -> list[GroupState]:
    return [*states[:count], *[GroupState(False, False)] * (count - len(states))]


def _recent(before: Memory | None, progress: Progress, now: datetime) -> dict[int, Recreation]:
    found = before.recreations if before is not None else {}
    return {index: past for index, past in found.items() if index < progress.replicas and not is_forgotten(past, now)}


def _current(
    before: Memory | None, newest: str, blueprints: dict[str, Blueprint], progress: Progress, states: list[GroupState]
) -> str:
    """The revision of groups below the partition: the old one until every group has the new one and is ready."""
    wanted = _present(states, progress.wanted)
    is_finished = progress.partition == 0 and progress.replicas == progress.wanted and all(one.done for one in wanted)
    if before is None or is_finished or before.current not in blueprints:
        return newest
    return before.current


def _plan_groups(
    planner: GroupPlanner, groups: dict[int, Group], limits: Limits, progress: Progress, current: str, newest: str
) -> None:
    """Taken down from the highest group, built up from the lowest. A ready group is taken down for an update only while
    enough others are ready."""
    removed: set[int] = set()
    num_ready = sum(group.is_ready for index, group in groups.items() if index < progress.replicas)
    for index, group in sorted(groups.items(), reverse=True):
        is_outdated = index >= progress.partition and group.revision != newest
        if index >= progress.replicas:
            planner.scale_down(group, progress.replicas)
            removed.add(index)
        elif group.is_alive and is_outdated:
            if group.is_ready and num_ready <= limits.replicas - limits.unavailable:
                planner.holds.append(f"group {index} is updated next (at most {limits.unavailable} down)")
                continue
            num_ready -= group.is_ready
            planner.remove(group, "its template changed")
            removed.add(index)
    for index in sorted({*groups, *range(progress.replicas)} - removed):
        group = groups.get(index, Group(index))
        if not group.is_alive:
            planner.begin(group, newest if index >= progress.partition else current)
        elif not planner.make_again(group):
            planner.complete(group)


def _rollout_notes(before: Memory | None, after: Memory) -> list[Note]:
    notes: list[Note] = []
    if before is None or before.update != after.update:
        what = "a newly created" if before is None else "updated"
        notes.append(
            Note("Normal", "CreatingRevision", f"Creating revision with key {after.update} for {what} LeaderWorkerSet")
        )
    first, last = after.progress.partition, after.progress.replicas - 1
    if before is not None and before.update == after.update:
        last = min(last, before.progress.partition - 1)
    if after.current != after.update and first <= last:
        which = f"replica {first}" if first == last else f"replicas {first} to {last} (inclusive)"
        notes.append(Note("Normal", "GroupsUpdating", f"Updating {which}"))
    return notes


def _labelled_keys(obj: Object, _: World) -> Iterable[str]:
    """What carries a set's name label concerns that set."""
    name = (obj["metadata"].get("labels") or {}).get(lws.SET_NAME)
    return (f"{obj['metadata']['namespace']}/{name}",) if name else ()


def _node_keys(_: Object, world: World) -> Iterable[str]:
    """A node's labels matter to the sets that place groups by them."""
    for found in world.all(LEADER_WORKER_SETS):
        meta = found["metadata"]
        if lws.EXCLUSIVE_TOPOLOGY in (meta.get("annotations") or {}):
            yield f"{meta['namespace']}/{meta['name']}"


CONTROLLER: Controller[SetObserved] = Controller(
    name="leaderworkerset",
    resource=LEADER_WORKER_SETS,
    triggers=(
        Trigger(LEADER_WORKER_SETS, own_key),
        Trigger(PODS, _labelled_keys),
        Trigger(SERVICES, _labelled_keys),
        Trigger(PERSISTENT_VOLUME_CLAIMS, _labelled_keys),
        Trigger(CONTROLLER_REVISIONS, owner_key(LEADER_WORKER_SETS)),
        Trigger(NODES, _node_keys),
    ),
    observe=observe,
    reconcile=reconcile,
    primary=lambda observed: observed.leader_worker_set,
    labels={PODS: (lws.SET_NAME,), PERSISTENT_VOLUME_CLAIMS: (lws.SET_NAME,)},
    gather_s=0.05,
    rejected=rejected_status,
)
