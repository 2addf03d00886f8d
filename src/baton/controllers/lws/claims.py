"""Claims of a set's pods, by volumeClaimTemplates: made before their pod, kept or deleted as the retention policy says.

Unlike upstream, a worker's claim outlives its group being made again even with whenDeleted: Delete; it goes with the set.
"""

from __future__ import annotations

from baton.api import lws
from baton.api.resources import PERSISTENT_VOLUME_CLAIMS, Object
from baton.controllers.lws.pod_template import Blueprint
from baton.controllers.plan import Action, Create, Delete, owner_reference


def plan_claims(owner: Object, blueprint: Blueprint, pod: Object, existing: dict[str, Object]) -> list[Action]:
    """The claims that a pod about to be made lacks."""
    actions: list[Action] = []
    pod_meta = pod["metadata"]
    for template in blueprint.template.volume_claim_templates:
        meta = template["metadata"]
        name = f"{meta['name']}-{pod_meta['name']}"
        if name in existing:
            continue
        own = {key: pod_meta["labels"][key] for key in (lws.SET_NAME, lws.GROUP_INDEX, lws.WORKER_INDEX)}
        made: Object = {
            **{key: value for key, value in meta.items() if key != "creationTimestamp"},
            "name": name,
            "namespace": pod_meta["namespace"],
            "labels": {**(meta.get("labels") or {}), **own},
        }
        retention = blueprint.template.persistent_volume_claim_retention_policy
        if retention is not None and retention.when_deleted == "Delete":
            made["ownerReferences"] = [owner_reference(owner)]
        claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": made, "spec": template["spec"]}
        actions.append(Create(PERSISTENT_VOLUME_CLAIMS, claim))
    return actions


def plan_scaled_down(blueprint: Blueprint, kept: int, busy: set[int], existing: dict[str, Object]) -> list[Action]:
    """Delete the claims of groups from ``kept`` on that have no pods (those are ``busy``), when whenScaled says so."""
    retention = blueprint.template.persistent_volume_claim_retention_policy
    if retention is None or retention.when_scaled != "Delete":
        return []
    actions: list[Action] = []
    for name, claim in sorted(existing.items()):
        meta = claim["metadata"]
        text = (meta.get("labels") or {}).get(lws.GROUP_INDEX) or ""
        if text.isdigit() and int(text) >= kept and int(text) not in busy and not meta.get("deletionTimestamp"):
            actions.append(Delete(PERSISTENT_VOLUME_CLAIMS, meta["namespace"], name, meta["uid"], "scaled down"))
    return actions
