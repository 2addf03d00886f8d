"""apps/v1 Deployment: rolls from old ReplicaSets to a new one within maxSurge and maxUnavailable, or by Recreate.

With S surge and U unavailable allowed of N wanted, at every step: total <= N + S, and available >= N - U as far as
this controller's own scaling goes. At rest one ReplicaSet has N and every other has 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from baton.api.labels import POD_TEMPLATE_HASH
from baton.api.quantity import resolve_count
from baton.api.resources import DEPLOYMENTS, PODS, REPLICA_SETS, Object
from baton.controllers.plan import (
    Action,
    Controller,
    Create,
    Delete,
    Note,
    Patch,
    Plan,
    Trigger,
    World,
    changed_status,
    controller_of,
    own_key,
    owner_key,
    owner_reference,
    parse_time,
    set_condition,
)
from baton.controllers.revisions import short_hash

_REVISION = "deployment.kubernetes.io/revision"


@dataclass(frozen=True, slots=True)
class DeploymentObserved:
    deployment: Object
    replica_sets: list[Object]
    pods: dict[str, int]
    """Pods still there, ending ones too, by name of their ReplicaSet."""


def observe(world: World, key: str) -> DeploymentObserved | None:
    namespace, _, name = key.partition("/")
    found = world.get(DEPLOYMENTS, name, namespace)
    if found is None:
        return None
    sets = world.owned(REPLICA_SETS, found["metadata"]["uid"])
    pods = {entry["metadata"]["name"]: len(world.owned(PODS, entry["metadata"]["uid"])) for entry in sets}
    return DeploymentObserved(found, sets, pods)


def reconcile(observed: DeploymentObserved, now: datetime) -> Plan:
    owner = observed.deployment
    if owner["metadata"].get("deletionTimestamp"):
        return Plan()
    text = short_hash(owner["spec"]["template"])
    alive = [entry for entry in observed.replica_sets if not entry["metadata"].get("deletionTimestamp")]
    new = next((entry for entry in alive if _hash_of(entry) == text), None)
    old = [entry for entry in alive if entry is not new]
    old_pods = any(observed.pods.get(entry["metadata"]["name"]) for entry in old)
    paused = bool(owner["spec"].get("paused"))
    newest = max((_revision(entry) for entry in alive), default=0)
    actions: list[Action] = []
    if new is None:
        if not paused:
            actions.append(Create(REPLICA_SETS, _make_replica_set(owner, text, newest + 1, _first_size(owner, old))))
        revision = newest
    else:
        revision = _revision(new)
        if revision < newest:
            revision = newest + 1
            actions.append(_annotate(REPLICA_SETS, new, revision))
        actions += _roll(owner, new, old, old_pods) if not paused else _scale_only(owner, new, old)
        actions += _trim(owner, old)
    if revision and str(revision) != (owner["metadata"].get("annotations") or {}).get(_REVISION):
        actions.append(_annotate(DEPLOYMENTS, owner, revision))
    notes = [
        Note("Normal", "ScalingReplicaSet", f"scale {action.name} to {action.body['spec']['replicas']}")
        for action in actions
        if isinstance(action, Patch) and "spec" in action.body
    ]
    status, requeue = _status(owner, new, old, now)
    return Plan(tuple(actions), changed_status(owner, status), tuple(notes), requeue)


def _hash_of(replica_set: Object) -> str:
    return str((replica_set["metadata"].get("labels") or {}).get(POD_TEMPLATE_HASH) or "")


def _revision(obj: Object) -> int:
    text = (obj["metadata"].get("annotations") or {}).get(_REVISION, "0")
    return int(text) if text.isdigit() else 0


def _size(replica_set: Object) -> int:
    return int(replica_set["spec"].get("replicas", 1))


def _count(replica_set: Object, field: str) -> int:
    return int((replica_set.get("status") or {}).get(field) or 0)


def _limits(owner: Object) -> tuple[int, int, int]:
    """Wanted replicas, surge, unavailable. As in Kubernetes, both zero after rounding means one unavailable."""
    replicas = int(owner["spec"].get("replicas", 1))
    rolling = (owner["spec"].get("strategy") or {}).get("rollingUpdate") or {}
    surge = resolve_count(rolling.get("maxSurge", "25%"), replicas, round_up=True)
    unavailable = resolve_count(rolling.get("maxUnavailable", "25%"), replicas, round_up=False)
    return replicas, surge, unavailable if surge or unavailable else 1


def _is_recreate(owner: Object) -> bool:
    return (owner["spec"].get("strategy") or {}).get("type") == "Recreate"


def _first_size(owner: Object, old: list[Object]) -> int:
    """How many pods the new ReplicaSet may start with, before anything old has gone."""
    replicas, surge, _ = _limits(owner)
    existing = sum(map(_size, old))
    if not old:
        return replicas
    return 0 if _is_recreate(owner) else max(0, min(replicas, replicas + surge - existing))


def _roll(owner: Object, new: Object, old: list[Object], old_pods: bool) -> list[Action]:
    """One step: the new one up as far as the surge allows, old ones down as far as availability allows."""
    replicas, surge, unavailable = _limits(owner)
    if _is_recreate(owner):
        down: list[Action] = [_scale(entry, 0) for entry in old if _size(entry)]
        may_start = not old_pods and _size(new) != replicas
        return down or ([_scale(new, replicas)] if may_start else [])
    actions: list[Action] = []
    total = _size(new) + sum(map(_size, old))
    size = _size(new)
    if size > replicas:
        size = replicas
    elif size < replicas and total < replicas + surge:
        size = min(replicas, size + replicas + surge - total)
    if size != _size(new):
        actions.append(_scale(new, size))
    # Pods of the new set that are not available yet must not be counted on, nor may they be made up for by old ones.
    new_unavailable = max(0, _size(new) - _count(new, "availableReplicas"))
    spare = total - (replicas - unavailable) - new_unavailable
    return actions + _scale_old_down(old, spare)


def _scale_old_down(old: list[Object], spare: int) -> list[Action]:
    """Take ``spare`` pods from the old sets: first those that are not available anyway, then the oldest set's."""
    if spare <= 0:
        return []
    sizes = {entry["metadata"]["name"]: _size(entry) for entry in old}
    ordered = sorted(old, key=lambda entry: (_revision(entry), entry["metadata"]["name"]))
    for only_broken in (True, False):
        for entry in ordered:
            name = entry["metadata"]["name"]
            removable = sizes[name]
            if only_broken:
                removable = min(removable, max(0, _size(entry) - _count(entry, "availableReplicas")))
            taken = min(spare, removable)
            sizes[name] -= taken
            spare -= taken
    return [
        _scale(entry, sizes[entry["metadata"]["name"]])
        for entry in ordered
        if sizes[entry["metadata"]["name"]] != _size(entry)
    ]


def _scale_only(owner: Object, new: Object, old: list[Object]) -> list[Action]:
    """A paused deployment does not roll, but when only one ReplicaSet has pods, its size still follows."""
    replicas = _limits(owner)[0]
    active = [entry for entry in [new, *old] if _size(entry)] or [new]
    return [_scale(active[0], replicas)] if len(active) == 1 and _size(active[0]) != replicas else []


def _scale(replica_set: Object, size: int) -> Patch:
    meta = replica_set["metadata"]
    return Patch(
        REPLICA_SETS,
        meta["namespace"],
        meta["name"],
        {"spec": {"replicas": size}},
        why=f"{_size(replica_set)} -> {size}",
    )


def _annotate(resource: object, obj: Object, revision: int) -> Patch:
    meta = obj["metadata"]
    body = {"metadata": {"annotations": {_REVISION: str(revision)}}}
    kind = DEPLOYMENTS if resource is DEPLOYMENTS else REPLICA_SETS
    return Patch(kind, meta["namespace"], meta["name"], body, why=f"revision {revision}")


def _trim(owner: Object, old: list[Object]) -> list[Action]:
    limit = owner["spec"].get("revisionHistoryLimit")
    empty = sorted((e for e in old if not _size(e) and not _count(e, "replicas")), key=_revision)
    excess = len(empty) - (10 if limit is None else int(limit))
    return [
        Delete(REPLICA_SETS, e["metadata"]["namespace"], e["metadata"]["name"], e["metadata"]["uid"], "history limit")
        for e in empty[: max(0, excess)]
    ]


def _make_replica_set(owner: Object, text: str, revision: int, size: int) -> Object:
    spec, meta = owner["spec"], owner["metadata"]
    template = spec["template"]
    template_meta = template.get("metadata") or {}
    pod_labels = {**(template_meta.get("labels") or {}), POD_TEMPLATE_HASH: text}
    selector = spec.get("selector") or {}
    return {
        "apiVersion": REPLICA_SETS.api_version,
        "kind": REPLICA_SETS.kind,
        "metadata": {
            "name": f"{meta['name']}-{text}",
            "namespace": meta["namespace"],
            "labels": pod_labels,
            "annotations": {_REVISION: str(revision)},
            "ownerReferences": [owner_reference(owner)],
        },
        "spec": {
            "replicas": size,
            "minReadySeconds": int(spec.get("minReadySeconds") or 0),
            "selector": {**selector, "matchLabels": {**(selector.get("matchLabels") or {}), POD_TEMPLATE_HASH: text}},
            "template": {**template, "metadata": {**template_meta, "labels": pod_labels}},
        },
    }


def _status(owner: Object, new: Object | None, old: list[Object], now: datetime) -> tuple[Object, float | None]:
    everything = [*old, *([new] if new else [])]
    replicas, _, unavailable = _limits(owner)
    available = sum(_count(entry, "availableReplicas") for entry in everything)
    total = sum(_count(entry, "replicas") for entry in everything)
    updated = _count(new, "replicas") if new else 0
    status: Object = {
        "observedGeneration": owner["metadata"].get("generation"),
        "replicas": total,
        "updatedReplicas": updated,
        "readyReplicas": sum(_count(entry, "readyReplicas") for entry in everything),
        "availableReplicas": available,
        "unavailableReplicas": max(0, max(total, replicas) - available),
    }
    before = owner.get("status") or {}
    conditions = list(before.get("conditions") or [])
    enough = available >= replicas - unavailable
    reason = "MinimumReplicasAvailable" if enough else "MinimumReplicasUnavailable"
    text = f"Deployment {'has' if enough else 'does not have'} minimum availability."
    conditions = set_condition(conditions, "Available", enough, reason, text, now, None)
    name = new["metadata"]["name"] if new else owner["metadata"]["name"]
    requeue = None
    if updated == replicas == total and available >= replicas:
        text = f'ReplicaSet "{name}" has successfully progressed.'
        conditions = set_condition(conditions, "Progressing", True, "NewReplicaSetAvailable", text, now, None)
    else:
        conditions, requeue = _progress(owner, status, conditions, name, now)
    return {**status, "conditions": conditions}, requeue


def _progress(
    owner: Object, status: Object, conditions: list[Object], name: str, now: datetime
) -> tuple[list[Object], float | None]:
    """The Progressing condition of a rollout under way, False once nothing moved for progressDeadlineSeconds."""
    before = owner.get("status") or {}
    moved = any(
        before.get(field) != status[field] for field in ("observedGeneration", "updatedReplicas", "availableReplicas")
    )
    old = next((entry for entry in before.get("conditions") or [] if entry["type"] == "Progressing"), None)
    deadline_s = int(owner["spec"].get("progressDeadlineSeconds") or 600)
    if old is None or moved or old.get("reason") == "NewReplicaSetAvailable":
        text = f'ReplicaSet "{name}" is progressing.'
        changed = set_condition(conditions, "Progressing", True, "ReplicaSetUpdated", text, now, None)
        stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
        changed = [{**e, "lastUpdateTime": stamp} if e["type"] == "Progressing" else e for e in changed]
        return changed, float(deadline_s)
    left = deadline_s - (now - parse_time(str(old.get("lastUpdateTime") or old["lastTransitionTime"]))).total_seconds()
    if left > 0 or old.get("status") == "False":
        return conditions, left if left > 0 else None
    text = f'ReplicaSet "{name}" has timed out progressing.'
    return set_condition(conditions, "Progressing", False, "ProgressDeadlineExceeded", text, now, None), None


def _pod_keys(pod: Object, world: World) -> Iterable[str]:
    """A pod concerns the Deployment above its ReplicaSet."""
    owner = controller_of(pod)
    if owner is None or owner["kind"] != REPLICA_SETS.kind:
        return ()
    replica_set = world.get(REPLICA_SETS, owner["name"], pod["metadata"]["namespace"])
    return owner_key(DEPLOYMENTS)(replica_set, world) if replica_set else ()


CONTROLLER: Controller[DeploymentObserved] = Controller(
    name="deployment",
    resource=DEPLOYMENTS,
    triggers=(Trigger(DEPLOYMENTS, own_key), Trigger(REPLICA_SETS, owner_key(DEPLOYMENTS)), Trigger(PODS, _pod_keys)),
    observe=observe,
    reconcile=reconcile,
    primary=lambda observed: observed.deployment,
)
