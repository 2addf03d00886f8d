"""RoleBasedGroup v1alpha1 <-> v1alpha2, on plain wire objects, losing nothing in either direction.

Each direction first says what it can in the other version's words (:func:`_up`, :func:`_down`). What the other
version cannot say is kept as a list of edits in an annotation (the residue) and put back on the way home; an edit in
between wins wherever the other version has a word for the field. Roles are matched by name, which validation keeps unique.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from baton.api import labels, v1alpha1, v1alpha2
from baton.api.merge import apply_edits, edits
from baton.api.resources import Object

_DEFAULT_V1ALPHA1_WORKLOAD = {"apiVersion": "apps/v1", "kind": "StatefulSet"}
_DEFAULT_V1ALPHA2_WORKLOAD = {"apiVersion": v1alpha2.API_VERSION, "kind": "RoleInstanceSet"}
_SAME_IN_BOTH = (
    "name",
    "labels",
    "annotations",
    "replicas",
    "dependencies",
    "rolloutStrategy",
    "servicePorts",
    "engineRuntimes",
    "minReadySeconds",
)


def convert(obj: Object, to_version: str) -> Object:
    """The same group as ``to_version`` ("v1alpha1" or "v1alpha2"); a new object. Raises ``ValueError`` for other kinds."""
    target = f"{labels.GROUP}/{to_version}"
    source = obj.get("apiVersion")
    if obj.get("kind") != "RoleBasedGroup" or {source, target} - {v1alpha1.API_VERSION, v1alpha2.API_VERSION}:
        raise ValueError(f"cannot convert {obj.get('kind')} {source} to {target}")
    if source == target:
        return copy.deepcopy(obj)
    if target == v1alpha2.API_VERSION:
        return _convert(_with_workloads(obj), _up, _down, labels.V1ALPHA1_RESIDUE, labels.V1ALPHA2_RESIDUE)
    return _convert(obj, _down, _up, labels.V1ALPHA2_RESIDUE, labels.V1ALPHA1_RESIDUE)


Direction = Callable[[Object], Object]


def _convert(obj: Object, there: Direction, back: Direction, own_residue: str, other_residue: str) -> Object:
    source = copy.deepcopy(obj)
    kept = _take_annotation(source, other_residue)
    result = there(source)
    if kept is not None:
        result = _restored(result, apply_edits(_covered(result), kept))
    residue = edits(_covered(back(result)), _covered(source))
    if residue:
        text = json.dumps(residue, sort_keys=True, separators=(",", ":"))
        result["metadata"].setdefault("annotations", {})[own_residue] = text
    return result


def _covered(obj: Object) -> Object:
    """What a residue speaks about: annotations and spec, with the list of roles as a map by name."""
    spec = dict(obj.get("spec") or {})
    roles = {role["name"]: role for role in spec.pop("roles", None) or []}
    return {"annotations": obj["metadata"].get("annotations") or {}, "spec": spec, "roles": roles}


def _restored(obj: Object, covered: Object) -> Object:
    """``obj`` with its annotations and spec replaced by ``covered``; roles keep the order they have in ``obj``."""
    meta = {**obj["metadata"], "annotations": covered["annotations"]}
    names = [role["name"] for role in (obj.get("spec") or {}).get("roles") or []]
    spec = {**covered["spec"], "roles": [covered["roles"][name] for name in names if name in covered["roles"]]}
    return {**obj, "metadata": _without_empty_annotations(meta), "spec": spec}


def _without_empty_annotations(meta: Object) -> Object:
    return meta if meta.get("annotations") else {key: value for key, value in meta.items() if key != "annotations"}


def _take_annotation(obj: Object, key: str) -> Any:
    """Remove and decode a residue. Text that is not ours (edited by hand) is dropped: it cannot be applied."""
    annotations = obj["metadata"].get("annotations") or {}
    text = annotations.pop(key, None)
    obj["metadata"] = _without_empty_annotations(obj["metadata"])
    try:
        kept = json.loads(text) if text is not None else None
    except ValueError:
        return None
    return kept if isinstance(kept, list) else None


def _with_workloads(obj: Object) -> Object:
    """A v1alpha1 group whose default workload is written out, since the default of v1alpha2 is another one."""
    result = copy.deepcopy(obj)
    for role in (result.get("spec") or {}).get("roles") or []:
        workload = role.get("workload") or {}
        role["workload"] = {**_DEFAULT_V1ALPHA1_WORKLOAD, **workload}
    return result


def _up(obj: Object) -> Object:
    """v1alpha1 -> v1alpha2, without what v1alpha2 has no word for."""
    spec = obj.get("spec") or {}
    annotations = dict(obj["metadata"].get("annotations") or {})
    _rename(annotations, labels.OLD_EXCLUSIVE_TOPOLOGY, labels.EXCLUSIVE_TOPOLOGY)
    for field, key in (("podGroupPolicy", labels.KEPT_POD_GROUP_POLICY), ("coordination", labels.KEPT_COORDINATION)):
        if field in spec:
            annotations[key] = json.dumps(spec[field], sort_keys=True, separators=(",", ":"))
    new_spec: Object = {"roles": [_role_up(role) for role in spec.get("roles") or []]}
    if "roleTemplates" in spec:
        new_spec["roleTemplates"] = spec["roleTemplates"]
    return _built(obj, v1alpha2.API_VERSION, annotations, new_spec)


def _down(obj: Object) -> Object:
    """v1alpha2 -> v1alpha1, without what v1alpha1 has no word for."""
    spec = obj.get("spec") or {}
    annotations = dict(obj["metadata"].get("annotations") or {})
    _rename(annotations, labels.EXCLUSIVE_TOPOLOGY, labels.OLD_EXCLUSIVE_TOPOLOGY)
    new_spec: Object = {"roles": [_role_down(role) for role in spec.get("roles") or []]}
    for field, key in (("podGroupPolicy", labels.KEPT_POD_GROUP_POLICY), ("coordination", labels.KEPT_COORDINATION)):
        try:
            new_spec[field] = json.loads(annotations[key])
        except (KeyError, ValueError):
            continue
        del annotations[key]
    if "roleTemplates" in spec:
        new_spec["roleTemplates"] = spec["roleTemplates"]
    return _built(obj, v1alpha1.API_VERSION, annotations, new_spec)


def _built(obj: Object, api_version: str, annotations: Object, spec: Object) -> Object:
    meta = _without_empty_annotations({**obj["metadata"], "annotations": annotations})
    return {**obj, "apiVersion": api_version, "metadata": meta, "spec": spec}


def _rename(annotations: Object, old: str, new: str) -> None:
    if old in annotations and new not in annotations:
        annotations[new] = annotations.pop(old)


def _role_up(role: Object) -> Object:
    new: Object = {key: role[key] for key in _SAME_IN_BOTH if key in role}
    workload = role.get("workload") or _DEFAULT_V1ALPHA1_WORKLOAD
    if workload != _DEFAULT_V1ALPHA2_WORKLOAD:
        kind = f"{workload.get('apiVersion')}/{workload.get('kind')}"
        new["annotations"] = {**(new.get("annotations") or {}), labels.ROLE_WORKLOAD_TYPE: kind}
    if "scalingAdapter" in role:
        new["scalingAdapter"] = {key: value for key, value in role["scalingAdapter"].items() if key == "enable"}
    source: Object = {"template": role["template"]} if "template" in role else {}
    if "templateRef" in role:
        source["templateRef"] = {"name": role["templateRef"].get("name", "")}
        if "templatePatch" in role:
            source["templateRef"]["patch"] = role["templatePatch"]
    restart = {"restartPolicy": role["restartPolicy"]} if "restartPolicy" in role else {}
    if role.get("components"):
        new["customComponentsPattern"] = {"components": role["components"], **restart}
    elif "leaderWorkerSet" in role or workload.get("kind") == "LeaderWorkerSet":
        multi = role.get("leaderWorkerSet") or {}
        renamed = {"patchLeaderTemplate": "leaderTemplatePatch", "patchWorkerTemplate": "workerTemplatePatch"}
        known = {renamed.get(key, key): value for key, value in multi.items() if key == "size" or key in renamed}
        new["leaderWorkerPattern"] = {**known, **source, **restart}
    else:
        new["standalonePattern"] = source
    return new


def _role_down(role: Object) -> Object:
    new: Object = {key: role[key] for key in _SAME_IN_BOTH if key in role}
    annotations = dict(new.get("annotations") or {})
    kind = annotations.pop(labels.ROLE_WORKLOAD_TYPE, "")
    api_version, _, name = kind.rpartition("/")
    if api_version and name:
        new["workload"] = {"apiVersion": api_version, "kind": name}
        new["annotations"] = annotations
        if not annotations:
            del new["annotations"]
    else:
        new["workload"] = dict(_DEFAULT_V1ALPHA2_WORKLOAD)
    if "scalingAdapter" in role:
        new["scalingAdapter"] = {key: value for key, value in role["scalingAdapter"].items() if key == "enable"}
    multi = role.get("leaderWorkerPattern")
    custom = role.get("customComponentsPattern")
    source = role.get("standalonePattern") or multi or {}
    if "template" in source:
        new["template"] = source["template"]
    if "templateRef" in source:
        new["templateRef"] = {"name": source["templateRef"].get("name", "")}
        if "patch" in source["templateRef"]:
            new["templatePatch"] = source["templateRef"]["patch"]
    if multi is not None:
        renamed = {"leaderTemplatePatch": "patchLeaderTemplate", "workerTemplatePatch": "patchWorkerTemplate"}
        known = {renamed.get(key, key): value for key, value in multi.items() if key == "size" or key in renamed}
        new["leaderWorkerSet"] = known
    if custom is not None:
        new["components"] = custom.get("components") or []
    for pattern in (multi, custom):
        if pattern and "restartPolicy" in pattern:
            new["restartPolicy"] = pattern["restartPolicy"]
    return new
