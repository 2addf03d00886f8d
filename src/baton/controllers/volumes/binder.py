"""PersistentVolumeClaims find PersistentVolumes: by name, selector, access modes, class, mode and size.

One pass looks at a whole namespace-free world of claims and volumes, smallest fitting volume first, so its answer does
not depend on the order of events. A claim that nothing fits waits, with the reason as an event, unless the cluster has a
default: the embedded one gives such a claim a volume of its own (`default_source`).
Order of writes as in Kubernetes: volume's claimRef first, then the claim's volumeName; either alone is completed later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from baton.api.quantity import parse_quantity
from baton.api.resources import PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, Object
from baton.api.selectors import matches_selector
from baton.controllers.plan import Action, Controller, Create, Note, Patch, Plan, Trigger, World

DefaultSource = Callable[[Object], Object]
"""From a claim, the volume source (such as ``{"hostPath": {"path": ...}}``) of the volume made for it."""

_ALL = "all"
_BOUND_ANNOTATION = "pv.kubernetes.io/bound-by-controller"


@dataclass(frozen=True, slots=True)
class VolumesObserved:
    claims: list[Object]
    volumes: list[Object]


def observe(world: World, key: str) -> VolumesObserved | None:
    return VolumesObserved(world.all(PERSISTENT_VOLUME_CLAIMS), world.all(PERSISTENT_VOLUMES))


def reconcile(observed: VolumesObserved, default_source: DefaultSource | None = None) -> Plan:
    actions: list[Action] = []
    notes: list[Note] = []
    volumes = {volume["metadata"]["name"]: volume for volume in observed.volumes}
    taken: set[str] = set()
    for claim in observed.claims:
        if claim["metadata"].get("deletionTimestamp"):
            continue
        volume, problem = _volume_for(claim, volumes, taken)
        if volume is not None:
            taken.add(volume["metadata"]["name"])
            actions += _bind(claim, volume)
        elif problem and default_source is not None and not claim["spec"].get("volumeName"):
            actions.append(Create(PERSISTENT_VOLUMES, _default_volume(claim, default_source(claim))))
        elif problem:
            actions += _pending(claim)
            if (claim.get("status") or {}).get("phase") != "Pending":
                notes.append(Note("Normal", "FailedBinding", problem, claim))
    claims = {claim["metadata"]["uid"]: claim for claim in observed.claims}
    for volume in observed.volumes:
        if volume["metadata"]["name"] not in taken:
            actions += _settle_volume(volume, claims)
    return Plan(tuple(actions), notes=tuple(notes))


def _volume_for(claim: Object, volumes: dict[str, Object], taken: set[str]) -> tuple[Object | None, str]:
    """The volume a claim has or gets, or why there is none."""
    meta, spec = claim["metadata"], claim["spec"]
    reserved = next((v for v in volumes.values() if _claimed_by(v, claim)), None)
    if reserved is not None:
        return reserved, ""
    wanted = spec.get("volumeName")
    if wanted:
        volume = volumes.get(wanted)
        if volume is None:
            return None, f'volume "{wanted}" does not exist'
        if (volume["spec"].get("claimRef") or {}).get("name") or wanted in taken:
            return None, f'volume "{wanted}" is bound to another claim'
        return volume, ""
    fitting = [
        volume
        for name, volume in volumes.items()
        if name not in taken and not volume["spec"].get("claimRef") and mismatch(claim, volume) is None
    ]
    if fitting:
        return min(fitting, key=lambda v: (_capacity(v), v["metadata"]["name"])), ""
    reasons = sorted({reason for v in volumes.values() if (reason := mismatch(claim, v))})
    detail = f" ({'; '.join(reasons)})" if reasons else ""
    return None, f"no persistent volumes available for claim {meta['name']} and no storage class is set{detail}"


def _claimed_by(volume: Object, claim: Object) -> bool:
    ref = volume["spec"].get("claimRef") or {}
    same = (ref.get("namespace"), ref.get("name")) == (claim["metadata"]["namespace"], claim["metadata"]["name"])
    return bool(same) and ref.get("uid") in (None, "", claim["metadata"]["uid"])


def mismatch(claim: Object, volume: Object) -> str | None:
    """Why a volume does not fit a claim, or None. Sizes, modes and classes as Kubernetes compares them."""
    wanted, has = claim["spec"], volume["spec"]
    name = volume["metadata"]["name"]
    if volume["metadata"].get("deletionTimestamp") or (volume.get("status") or {}).get("phase") == "Released":
        return f"{name} is released or being deleted"
    if (wanted.get("storageClassName") or "") != (has.get("storageClassName") or ""):
        return f"{name} has another storage class"
    if wanted.get("volumeMode", "Filesystem") != has.get("volumeMode", "Filesystem"):
        return f"{name} has another volume mode"
    if not set(wanted.get("accessModes") or []) <= set(has.get("accessModes") or []):
        return f"{name} lacks an access mode"
    request = ((wanted.get("resources") or {}).get("requests") or {}).get("storage", "0")
    if parse_quantity(request) > _capacity(volume):
        return f"{name} is smaller than {request}"
    if wanted.get("selector") and not matches_selector(wanted["selector"], volume["metadata"].get("labels") or {}):
        return f"{name} does not match the selector"
    return None


def _capacity(volume: Object) -> Decimal:
    return parse_quantity((volume["spec"].get("capacity") or {}).get("storage", "0"))


def _bind(claim: Object, volume: Object) -> list[Action]:
    meta, volume_name = claim["metadata"], volume["metadata"]["name"]
    actions: list[Action] = []
    ref = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "namespace": meta["namespace"],
        "name": meta["name"],
        "uid": meta["uid"],
    }
    if (volume["spec"].get("claimRef") or {}).get("uid") != meta["uid"]:
        body: Object = {"metadata": {"annotations": {_BOUND_ANNOTATION: "yes"}}, "spec": {"claimRef": ref}}
        actions.append(Patch(PERSISTENT_VOLUMES, None, volume_name, body, why=f"bound to {meta['name']}"))
    actions += _phase(PERSISTENT_VOLUMES, volume, {"phase": "Bound"})
    if claim["spec"].get("volumeName") != volume_name:
        body = {"spec": {"volumeName": volume_name}}
        actions.append(
            Patch(PERSISTENT_VOLUME_CLAIMS, meta["namespace"], meta["name"], body, why=f"bound to {volume_name}")
        )
    bound = {
        "phase": "Bound",
        "accessModes": volume["spec"].get("accessModes") or [],
        "capacity": volume["spec"].get("capacity") or {},
    }
    return actions + _phase(PERSISTENT_VOLUME_CLAIMS, claim, bound)


def _pending(claim: Object) -> list[Action]:
    return _phase(PERSISTENT_VOLUME_CLAIMS, claim, {"phase": "Pending"})


def _phase(resource: object, obj: Object, status: Object) -> list[Action]:
    current = obj.get("status") or {}
    if all(current.get(key) == value for key, value in status.items()):
        return []
    meta = obj["metadata"]
    kind = PERSISTENT_VOLUMES if resource is PERSISTENT_VOLUMES else PERSISTENT_VOLUME_CLAIMS
    why = f"phase {status['phase']}"
    return [Patch(kind, meta.get("namespace"), meta["name"], {"status": status}, subresource="status", why=why)]


def _settle_volume(volume: Object, claims: dict[str, Object]) -> list[Action]:
    """The phase of a volume that no claim took in this pass. Reclaiming data is never done: Released volumes stay."""
    ref = volume["spec"].get("claimRef")
    if not ref:
        return _phase(PERSISTENT_VOLUMES, volume, {"phase": "Available"})
    if ref.get("uid") and ref["uid"] not in claims:
        return _phase(PERSISTENT_VOLUMES, volume, {"phase": "Released"})
    return []


def _default_volume(claim: Object, source: Object) -> Object:
    meta, spec = claim["metadata"], claim["spec"]
    request = ((spec.get("resources") or {}).get("requests") or {}).get("storage", "1Gi")
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"pvc-{meta['uid']}"},
        "spec": {
            "capacity": {"storage": request},
            "accessModes": spec.get("accessModes") or ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": spec.get("storageClassName") or "",
            "volumeMode": spec.get("volumeMode", "Filesystem"),
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": meta["namespace"],
                "name": meta["name"],
                "uid": meta["uid"],
            },
            **source,
        },
    }


def controller(default_source: DefaultSource | None = None) -> Controller[VolumesObserved]:
    """The binder; one key stands for all claims and volumes."""

    def one_key(_: Object, __: World) -> tuple[str, ...]:
        return (_ALL,)

    def run(observed: VolumesObserved, now: datetime) -> Plan:
        return reconcile(observed, default_source)

    return Controller(
        name="persistentvolume-binder",
        resource=PERSISTENT_VOLUME_CLAIMS,
        triggers=(Trigger(PERSISTENT_VOLUME_CLAIMS, one_key), Trigger(PERSISTENT_VOLUMES, one_key)),
        observe=observe,
        reconcile=run,
        primary=lambda observed: None,
    )
