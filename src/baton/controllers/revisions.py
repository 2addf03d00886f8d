"""Hashes of templates and the ControllerRevisions that keep old ones, for StatefulSets and role groups alike."""

from __future__ import annotations

import hashlib
import json

from baton.api.resources import CONTROLLER_REVISIONS, Object
from baton.controllers.plan import Action, Create, Delete, Patch, covers, owner_reference


def short_hash(value: object) -> str:
    """Ten hex characters of a canonical hash; safe in a name and in a label."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def record(
    owner: Object,
    history: list[Object],
    *,
    name: str,
    labels: dict[str, str],
    label: str,
    data: Object,
    annotations: dict[str, str] | None = None,
) -> list[Action]:
    """Actions that make ``data`` the newest revision of ``owner``; its hash is ``labels[label]``. ``annotations`` are kept
    up to date on it.

    Going back to earlier data renumbers its revision instead of storing it twice, as Kubernetes does.
    """
    newest = max((int(entry.get("revision") or 0) for entry in history), default=0)
    same = next((entry for entry in history if hash_of(entry, label) == labels[label]), None)
    if same is None:
        meta = {
            "name": name.replace("{n}", str(newest + 1)),
            "namespace": owner["metadata"]["namespace"],
            "labels": labels,
            "ownerReferences": [owner_reference(owner)],
        }
        if annotations:
            meta["annotations"] = annotations
        obj = {
            "apiVersion": CONTROLLER_REVISIONS.api_version,
            "kind": CONTROLLER_REVISIONS.kind,
            "metadata": meta,
            "data": data,
            "revision": newest + 1,
        }
        return [Create(CONTROLLER_REVISIONS, obj)]
    meta, why = same["metadata"], "annotations changed"
    body: Object = {}
    if annotations and not covers(meta.get("annotations"), annotations):
        body["metadata"] = {"annotations": annotations}
    if int(same.get("revision") or 0) < newest:
        body["revision"], why = newest + 1, "an earlier revision is back"
    return [Patch(CONTROLLER_REVISIONS, meta["namespace"], meta["name"], body, why=why)] if body else []


def trim(history: list[Object], label: str, in_use: set[str], keep: int) -> list[Action]:
    """Delete the oldest revisions beyond ``keep`` that nothing uses."""
    unused = sorted((e for e in history if hash_of(e, label) not in in_use), key=lambda e: int(e.get("revision") or 0))
    excess = len(unused) - keep
    return [
        Delete(
            CONTROLLER_REVISIONS,
            entry["metadata"]["namespace"],
            entry["metadata"]["name"],
            entry["metadata"]["uid"],
            "history limit",
        )
        for entry in unused[: max(excess, 0)]
    ]


def hash_of(revision: Object, label: str) -> str:
    return str((revision["metadata"].get("labels") or {}).get(label) or "")
