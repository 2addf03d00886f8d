"""JSON merge patches (RFC 7386) and strategic merges of pod templates, as pure functions on plain data.

The merge keys of lists are those of core/v1 PodSpec. Directives other than `$patch: delete|replace` in lists and maps
are refused, not ignored.
"""

from __future__ import annotations

import copy
from typing import Any

# Where a path of field names (without indexes) ends in a list that merges by key.
_MERGE_KEYS: dict[str, str] = {
    "containers": "name",
    "initContainers": "name",
    "ephemeralContainers": "name",
    "volumes": "name",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "env": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ownerReferences": "uid",
}


def merge_patch(base: Any, patch: Any) -> Any:
    """RFC 7386: maps merge, null removes, anything else replaces. Neither argument is changed."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(base) if isinstance(base, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def diff(base: Any, target: Any) -> Any:
    """The merge patch that turns ``base`` into ``target`` (both maps without nulls); ``{}`` when they are equal."""
    patch: dict[str, Any] = {key: None for key in base if key not in target}
    for key, value in target.items():
        old = base.get(key)
        if key in base and old == value:
            continue
        patch[key] = diff(old, value) if isinstance(old, dict) and isinstance(value, dict) else copy.deepcopy(value)
    return patch


def edits(base: dict[str, Any], target: dict[str, Any], path: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """What turns ``base`` into ``target``, as ``{"at": [keys...], "to": value}`` (no "to": remove). Unlike a merge
    patch it can carry nulls, which mean something inside template patches."""
    found: list[dict[str, Any]] = [{"at": [*path, key]} for key in sorted(base) if key not in target]
    for key, value in sorted(target.items()):
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            found += edits(old, value, (*path, key))
        elif key not in base or old != value:
            found.append({"at": [*path, key], "to": copy.deepcopy(value)})
    return found


def apply_edits(base: dict[str, Any], changes: list[Any]) -> dict[str, Any]:
    """Apply :func:`edits`; one whose place no longer exists (somebody removed it) or that makes no sense is dropped."""
    result = base
    for change in changes:
        if isinstance(change, dict) and isinstance(change.get("at"), list) and change["at"]:
            result = _edited(result, [str(key) for key in change["at"]], change)
    return result


def _edited(tree: dict[str, Any], path: list[str], change: dict[str, Any]) -> dict[str, Any]:
    # Rebuilt along the path, never changed: one map may stand in several places (a YAML anchor).
    key, rest = path[0], path[1:]
    if rest:
        inner = tree.get(key)
        return {**tree, key: _edited(inner, rest, change)} if isinstance(inner, dict) else tree
    if "to" in change:
        return {**tree, key: copy.deepcopy(change["to"])}
    return {name: value for name, value in tree.items() if name != key}


def strategic_merge(base: Any, patch: Any, field: str = "") -> Any:
    """Merge a pod template patch: lists in the table merge by key, other lists replace, null removes a field."""
    if isinstance(patch, dict):
        if patch.get("$patch") == "replace":
            return {key: copy.deepcopy(value) for key, value in patch.items() if key != "$patch"}
        return _merge_map(base if isinstance(base, dict) else {}, patch)
    key = _MERGE_KEYS.get(field)
    if isinstance(patch, list) and key and all(isinstance(item, dict) for item in patch):
        return _merge_list(base if isinstance(base, list) else [], patch, key)
    return copy.deepcopy(patch)


def _merge_map(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in patch.items():
        if name.startswith("$"):
            raise ValueError(f"the directive {name!r} is not supported in a template patch")
        if value is None or (isinstance(value, dict) and value.get("$patch") == "delete"):
            result.pop(name, None)
        else:
            result[name] = strategic_merge(result.get(name), value, name)
    return result


def _merge_list(base: list[Any], patch: list[dict[str, Any]], key: str) -> list[Any]:
    if any(item.get("$patch") == "replace" for item in patch):
        return [copy.deepcopy(item) for item in patch if "$patch" not in item]
    result = list(base)
    for item in patch:
        if key not in item:
            raise ValueError(f"a list entry of a template patch lacks its merge key {key!r}")
        at = next((index for index, old in enumerate(result) if old.get(key) == item[key]), None)
        if item.get("$patch") == "delete":
            if at is not None:
                del result[at]
        elif at is None:
            result.append(copy.deepcopy(item))
        else:
            result[at] = strategic_merge(result[at], item)
    return result
