"""How an object leaves: grace periods, finalizers, cascading policies.

Owns `DeleteOptions` and `decide_deletion`, a pure decision. Not here: writing it (see `operations`), deleting
dependents (see `gc`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from baton.cluster.apiserver.errors import Cause, StatusError, conflict, invalid
from baton.cluster.apiserver.metadata import timestamp
from baton.cluster.apiserver.resources import Resource

JSON = dict[str, Any]
FOREGROUND, ORPHAN = "foregroundDeletion", "orphan"
_POLICIES = ("Orphan", "Background", "Foreground")


@dataclass(slots=True)
class DeleteOptions:
    """Body and query of a DELETE. `grace_s` None: the object's own default."""

    grace_s: int | None = None
    propagation: str | None = None
    uid: str | None = None
    resource_version: str | None = None
    dry_run: bool = False

    @classmethod
    def parse(cls, body: JSON, query: dict[str, str]) -> DeleteOptions:
        """Raises 422 for a policy that does not exist, or given twice."""
        preconditions = body.get("preconditions") or {}
        grace = body.get("gracePeriodSeconds", query.get("gracePeriodSeconds"))
        policy = body.get("propagationPolicy") or query.get("propagationPolicy")
        orphan = body.get("orphanDependents")
        if policy is not None and policy not in _POLICIES:
            raise _options_error(Cause.not_supported("propagationPolicy", policy, (*_POLICIES, "nil")))
        if policy is not None and orphan is not None:
            raise _options_error(
                Cause.invalid(
                    "propagationPolicy", policy, "orphanDependents and deletionPropagation cannot be both set"
                )
            )
        if orphan is not None:
            policy = "Orphan" if orphan else "Background"
        try:
            grace_s = None if grace is None else int(grace)
        except (TypeError, ValueError):
            raise _options_error(Cause.invalid("gracePeriodSeconds", grace, "must be an integer")) from None
        dry_run = bool(body.get("dryRun")) or "dryRun" in query
        return cls(grace_s, policy, preconditions.get("uid"), preconditions.get("resourceVersion"), dry_run)

    def check_preconditions(self, resource: Resource, name: str, obj: JSON) -> None:
        for what, wanted, found in (
            ("UID", self.uid, obj["metadata"]["uid"]),
            ("ResourceVersion", self.resource_version, obj["metadata"]["resourceVersion"]),
        ):
            if wanted is not None and wanted != found:
                why = f"Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {found}"
                raise conflict(resource.plural, resource.group, name, why)


def _options_error(cause: Cause) -> StatusError:
    return invalid("DeleteOptions", "meta.k8s.io", "", [cause])


def decide_deletion(resource: Resource, obj: JSON, options: DeleteOptions) -> tuple[JSON, bool]:
    """The object to write (marked, or its last state) and whether it goes at once."""
    meta = dict(obj["metadata"])
    finalizers = [
        f for f in meta.get("finalizers") or () if f not in (FOREGROUND, ORPHAN) or options.propagation is None
    ]
    if options.propagation == "Foreground":
        finalizers.append(FOREGROUND)
    elif options.propagation == "Orphan":
        finalizers.append(ORPHAN)
    grace_s = _grace(resource, obj, options)
    spec_holds = resource.kind == "Namespace" and bool((obj.get("spec") or {}).get("finalizers"))
    if not finalizers and not grace_s and not spec_holds:
        return obj, True
    if finalizers:
        meta["finalizers"] = finalizers
    else:
        meta.pop("finalizers", None)
    out = {**obj, "metadata": meta}
    shorter = grace_s < (meta.get("deletionGracePeriodSeconds") or 0)
    if not meta.get("deletionTimestamp") or shorter:
        meta["deletionTimestamp"] = timestamp(datetime.now(UTC) + timedelta(seconds=grace_s))
        meta["deletionGracePeriodSeconds"] = grace_s
        if "generation" in meta and not shorter:
            meta["generation"] += 1
    if resource.kind == "Namespace":
        out["status"] = {**(obj.get("status") or {}), "phase": "Terminating"}
    return out, False


def _grace(resource: Resource, obj: JSON, options: DeleteOptions) -> int:
    """Seconds the node agent gets to stop a pod; other kinds have none."""
    if resource.kind != "Pod" or not resource.builtin:
        return 0
    spec, status = obj.get("spec") or {}, obj.get("status") or {}
    if not spec.get("nodeName") or status.get("phase") in ("Succeeded", "Failed"):
        return 0
    running_out = obj["metadata"].get("deletionGracePeriodSeconds")
    if options.grace_s is None:
        return int(running_out if running_out is not None else spec.get("terminationGracePeriodSeconds", 30))
    wanted = max(0, options.grace_s)
    return min(wanted, running_out) if running_out is not None else wanted
