"""Object metadata: what the server sets, what a client may change, what is checked.

Owns the metadata part of create and update, and deletion marks. Not here: managedFields (see `ownership`).
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

from baton.cluster.apiserver.errors import Cause
from baton.cluster.apiserver.names import check_annotations, check_labels, check_qualified

JSON = dict[str, Any]
# Set by the server; whatever a client sends is replaced by what is stored.
SERVER_FIELDS = (
    "uid",
    "creationTimestamp",
    "generation",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "selfLink",
)


def timestamp(moment: datetime | None = None) -> str:
    """A time as Kubernetes writes it, to the second."""
    return (moment or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")


def fresh(metadata: JSON, *, counts_generation: bool) -> JSON:
    """Metadata of a new object from what the client sent (name and namespace are set already)."""
    out = {k: v for k, v in metadata.items() if k not in SERVER_FIELDS and k != "resourceVersion"}
    out["uid"] = str(uuid.uuid4())
    out["creationTimestamp"] = timestamp()
    if counts_generation:
        out["generation"] = 1
    return out


def carried(new: JSON, old: JSON) -> JSON:
    """Metadata of an updated object: the client's, with the server's fields from the stored one."""
    out = {k: v for k, v in new.items() if k not in SERVER_FIELDS}
    for name in (*SERVER_FIELDS, "name", "namespace", "generateName"):
        if name in old:
            out[name] = old[name]
    out["resourceVersion"] = old["resourceVersion"]
    return out


def metadata_causes(metadata: JSON) -> list[Cause]:
    out = check_labels(metadata.get("labels") or {}, "metadata.labels")
    out += check_annotations(metadata.get("annotations") or {}, "metadata.annotations")
    for name in metadata.get("finalizers") or ():
        out += [Cause.invalid("metadata.finalizers", name, text) for text in check_qualified(name)]
    controllers = [o for o in metadata.get("ownerReferences") or () if o.get("controller")]
    if len(controllers) > 1:
        text = "Only one reference can have Controller set to true."
        out.append(Cause.invalid("metadata.ownerReferences", controllers[1].get("name"), text))
    for index, owner in enumerate(metadata.get("ownerReferences") or ()):
        for field in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(field):
                out.append(
                    Cause.invalid(f"metadata.ownerReferences[{index}].{field}", "", f"{field} must not be empty")
                )
    return out


def finalizer_causes(new: JSON, old: JSON) -> list[Cause]:
    """An object on its way out takes no new finalizers."""
    if not old.get("deletionTimestamp"):
        return []
    extra = [f for f in new.get("finalizers") or () if f not in (old.get("finalizers") or ())]
    if not extra:
        return []
    text = f"no new finalizers can be added if the object is being deleted, found new finalizers {extra!r}".replace(
        "'", '"'
    )
    return [Cause.forbidden("metadata.finalizers", text)]
