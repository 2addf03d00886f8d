"""Revisions of a set: what is in one, which are known, which are kept. Upstream deletes old ones after a rollout; here
the last ones stay, so that an undo is possible.
"""

from __future__ import annotations

from baton.api import lws
from baton.api.resources import Object
from baton.api.wire import InvalidObjectError
from baton.controllers import revisions
from baton.controllers.lws import memory
from baton.controllers.lws.memory import Memory
from baton.controllers.lws.pod_template import Blueprint
from baton.controllers.plan import Action

HISTORY_LIMIT = 10


def newest_blueprint(spec: lws.Spec) -> Blueprint:
    return Blueprint(revisions.short_hash(_data(spec)), spec.leader_worker_template, spec.network_config)


def _data(spec: lws.Spec) -> Object:
    """All that a group is made from, defaults written out, so that a default that was left out is no change.

    Its shape is that of the set's spec: `kubectl patch` can put it back.
    """
    template = spec.leader_worker_template
    found: Object = {
        "size": template.size,
        "restartPolicy": "None" if template.restart_policy == "Default" else template.restart_policy,
        "workerTemplate": template.worker_template,
    }
    if template.leader_template is not None:
        found["leaderTemplate"] = template.leader_template
    if template.sub_group_policy is not None:
        found["subGroupPolicy"] = template.sub_group_policy.model_dump(by_alias=True)
    if template.volume_claim_templates:
        found["volumeClaimTemplates"] = template.volume_claim_templates
    if template.persistent_volume_claim_retention_policy is not None:
        policy = template.persistent_volume_claim_retention_policy
        found["persistentVolumeClaimRetentionPolicy"] = policy.model_dump(by_alias=True)
    network = {"subdomainPolicy": spec.network_config.subdomain_policy}
    return {"spec": {"leaderWorkerTemplate": found, "networkConfig": network}}


def blueprints_of(history: list[Object]) -> dict[str, Blueprint]:
    """What can be made again, by revision. Data that is not ours is skipped."""
    found: dict[str, Blueprint] = {}
    for entry in history:
        spec = (entry.get("data") or {}).get("spec")
        if not isinstance(spec, dict):
            continue
        key = memory.key_of_revision(entry)
        try:
            template = lws.LeaderWorkerTemplate.parse(spec.get("leaderWorkerTemplate"))
            found[key] = Blueprint(key, template, lws.NetworkConfig.parse(spec.get("networkConfig") or {}))
        except InvalidObjectError:
            continue
    return found


def plan_history(
    owner: Object, spec: lws.Spec, history: list[Object], remembered: Memory, in_use: set[str]
) -> list[Action]:
    """Make the newest revision the one of the spec, with what is to be remembered; forget the oldest unused ones."""
    name = owner["metadata"]["name"]
    actions = revisions.record(
        owner,
        history,
        name=f"{name}-{remembered.update}",
        labels={lws.SET_NAME: name, lws.REVISION: remembered.update},
        label=lws.REVISION,
        data=_data(spec),
        annotations={memory.ANNOTATION: remembered.text()},
    )
    kept = in_use | {remembered.current, remembered.update}
    return actions + revisions.trim(history, lws.REVISION, kept, HISTORY_LIMIT)
