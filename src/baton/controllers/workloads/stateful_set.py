"""apps/v1 StatefulSet: stable names, claims per pod, rolling updates. Built on `pod_set`.

Unlike Kubernetes, a rollout may always replace pods that are not ready: a broken image can be repaired by rolling forward.
Claims are always kept: `persistentVolumeClaimRetentionPolicy` other than Retain is
reported as an event.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from datetime import datetime

from baton.api import labels
from baton.api.names import ordinal_of
from baton.api.quantity import resolve_count
from baton.api.resources import CONTROLLER_REVISIONS, PERSISTENT_VOLUME_CLAIMS, PODS, STATEFUL_SETS, Object
from baton.controllers import revisions
from baton.controllers.plan import (
    Action,
    Controller,
    Create,
    Note,
    Plan,
    Trigger,
    World,
    changed_status,
    own_key,
    owner_key,
    owner_reference,
)
from baton.controllers.pod_set import PodSetPlan, PodSetSpec, UpdateType, plan_pod_set

_BOTH_ENDS = frozenset({"Failed", "Succeeded"})


@dataclass(frozen=True, slots=True)
class StatefulSetObserved:
    stateful_set: Object
    pods: list[Object]
    history: list[Object]
    claims: set[str]


def observe(world: World, key: str) -> StatefulSetObserved | None:
    namespace, _, name = key.partition("/")
    found = world.get(STATEFUL_SETS, name, namespace)
    if found is None:
        return None
    uid = found["metadata"]["uid"]
    return StatefulSetObserved(
        stateful_set=found,
        pods=world.owned(PODS, uid),
        history=world.owned(CONTROLLER_REVISIONS, uid),
        claims={claim["metadata"]["name"] for claim in world.all(PERSISTENT_VOLUME_CLAIMS, namespace)},
    )


def reconcile(observed: StatefulSetObserved, now: datetime) -> Plan:
    owner = observed.stateful_set
    if owner["metadata"].get("deletionTimestamp"):
        return Plan()
    spec, old = owner["spec"], owner.get("status") or {}
    template = spec["template"]
    wanted = revisions.short_hash(template)
    history_actions = _history(owner, observed.history, wanted)
    templates = _templates(observed.history) | {wanted: template}
    current = old.get("currentRevision", "").rpartition("-")[2]
    current = current if current in templates else wanted
    pod_spec = _pod_set_spec(owner, templates, wanted, current)
    step = plan_pod_set(pod_spec, observed.pods, now)
    actions = [*history_actions, *_claims(owner, step, observed.claims), *step.actions]
    finished = pod_spec.partition == 0 and step.counts.updated_ready == step.counts.replicas == pod_spec.replicas
    status = _status(owner, pod_spec, step, wanted if finished else current, wanted)
    return Plan(
        actions=tuple(actions),
        status=changed_status(owner, status),
        notes=tuple(step.notes + _warnings(owner)),
        requeue_after_s=step.requeue_after_s,
    )


def _pod_set_spec(owner: Object, templates: dict[str, Object], wanted: str, current: str) -> PodSetSpec:
    spec = owner["spec"]
    replicas = int(spec.get("replicas", 1))
    strategy = spec.get("updateStrategy") or {}
    rolling = strategy.get("rollingUpdate") or {}
    update_type: UpdateType = "OnDelete" if strategy.get("type") == "OnDelete" else "RecreatePod"
    max_unavailable = resolve_count(rolling.get("maxUnavailable") or 1, replicas, round_up=True)
    return PodSetSpec(
        name=owner["metadata"]["name"],
        replicas=replicas,
        first=int((spec.get("ordinals") or {}).get("start") or 0),
        update_revision=wanted,
        current_revision=current,
        make_pod=lambda ordinal, rev: _make_pod(owner, templates[rev], rev, ordinal),
        template_of=templates.get,
        update_type=update_type,
        partition=int(rolling.get("partition") or 0),
        max_unavailable=max(1, max_unavailable),
        min_ready_s=int(spec.get("minReadySeconds") or 0),
        ordered=spec.get("podManagementPolicy", "OrderedReady") != "Parallel",
        replace_phases=_BOTH_ENDS,
    )


def _make_pod(owner: Object, template: Object, revision: str, ordinal: int) -> Object:
    name = f"{owner['metadata']['name']}-{ordinal}"
    meta = copy.deepcopy(template.get("metadata") or {})
    pod_spec = copy.deepcopy(template["spec"])
    pod_spec["hostname"] = name
    if owner["spec"].get("serviceName"):
        pod_spec["subdomain"] = owner["spec"]["serviceName"]
    claims = [claim["metadata"]["name"] for claim in owner["spec"].get("volumeClaimTemplates") or []]
    volumes = [volume for volume in pod_spec.get("volumes") or [] if volume.get("name") not in claims]
    volumes += [{"name": claim, "persistentVolumeClaim": {"claimName": f"{claim}-{name}"}} for claim in claims]
    if volumes:
        pod_spec["volumes"] = volumes
    meta |= {
        "name": name,
        "namespace": owner["metadata"]["namespace"],
        "labels": {
            **(meta.get("labels") or {}),
            labels.STATEFUL_POD_NAME: name,
            labels.POD_INDEX: str(ordinal),
            labels.REVISION_HASH: revision,
        },
        "ownerReferences": [owner_reference(owner)],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": pod_spec}


def _claims(owner: Object, step: PodSetPlan, existing: set[str]) -> list[Action]:
    """The claims of every pod about to be made. They outlive the set: no owner reference."""
    actions: list[Action] = []
    for action in step.actions:
        if not isinstance(action, Create):
            continue
        for template in owner["spec"].get("volumeClaimTemplates") or []:
            name = f"{template['metadata']['name']}-{action.obj['metadata']['name']}"
            if name in existing:
                continue
            selector = (owner["spec"].get("selector") or {}).get("matchLabels") or {}
            meta = {
                **template["metadata"],
                "name": name,
                "namespace": owner["metadata"]["namespace"],
                "labels": {**(template["metadata"].get("labels") or {}), **selector},
            }
            meta.pop("creationTimestamp", None)
            claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": template["spec"]}
            actions.append(Create(PERSISTENT_VOLUME_CLAIMS, claim))
    return actions


def _history(owner: Object, history: list[Object], wanted: str) -> list[Action]:
    name = owner["metadata"]["name"]
    own = {
        **((owner["spec"].get("template", {}).get("metadata") or {}).get("labels") or {}),
        labels.REVISION_HASH: wanted,
    }
    # The shape that `kubectl rollout undo` applies as a strategic merge patch.
    data = {"spec": {"template": {**owner["spec"]["template"], "$patch": "replace"}}}
    actions = revisions.record(
        owner, history, name=f"{name}-{wanted}", labels=own, label=labels.REVISION_HASH, data=data
    )
    status = owner.get("status") or {}
    in_use = {wanted, str(status.get("currentRevision", "")).rpartition("-")[2]}
    keep = owner["spec"].get("revisionHistoryLimit")
    return actions + revisions.trim(history, labels.REVISION_HASH, in_use, 10 if keep is None else int(keep))


def _templates(history: list[Object]) -> dict[str, Object]:
    found = {}
    for entry in history:
        template = ((entry.get("data") or {}).get("spec") or {}).get("template")
        if isinstance(template, dict):
            plain = {key: value for key, value in template.items() if key != "$patch"}
            found[revisions.hash_of(entry, labels.REVISION_HASH)] = plain
    return found


def _status(owner: Object, spec: PodSetSpec, step: PodSetPlan, current: str, wanted: str) -> Object:
    name, counts = owner["metadata"]["name"], step.counts
    return {
        "observedGeneration": owner["metadata"].get("generation"),
        "replicas": counts.replicas,
        "readyReplicas": counts.ready,
        "availableReplicas": counts.available,
        "currentReplicas": counts.updated if current == wanted else counts.current,
        "updatedReplicas": counts.updated,
        "currentRevision": f"{name}-{current}",
        "updateRevision": f"{name}-{wanted}",
        "collisionCount": 0,
    }


def _warnings(owner: Object) -> list[Note]:
    """Once per generation: what this controller does not do."""
    if (owner.get("status") or {}).get("observedGeneration") == owner["metadata"].get("generation"):
        return []
    policy = owner["spec"].get("persistentVolumeClaimRetentionPolicy") or {}
    if any(value == "Delete" for value in policy.values()):
        text = "spec.persistentVolumeClaimRetentionPolicy: Delete is not supported here; claims are kept"
        return [Note("Warning", "FieldIgnored", text)]
    return []


def _claim_key(obj: Object, world: World) -> list[str]:
    """A claim concerns the set whose pod it is for, which its name ends with."""
    meta = obj["metadata"]
    return [
        f"{meta['namespace']}/{found['metadata']['name']}"
        for found in world.all(STATEFUL_SETS, meta["namespace"])
        for template in found["spec"].get("volumeClaimTemplates") or []
        if ordinal_of(meta["name"], f"{template['metadata']['name']}-{found['metadata']['name']}") is not None
    ]


CONTROLLER: Controller[StatefulSetObserved] = Controller(
    name="statefulset",
    resource=STATEFUL_SETS,
    triggers=(
        Trigger(STATEFUL_SETS, own_key),
        Trigger(PODS, owner_key(STATEFUL_SETS)),
        Trigger(CONTROLLER_REVISIONS, owner_key(STATEFUL_SETS)),
        Trigger(PERSISTENT_VOLUME_CLAIMS, _claim_key),
    ),
    observe=observe,
    reconcile=reconcile,
    primary=lambda observed: observed.stateful_set,
)
