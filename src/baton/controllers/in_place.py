"""Changing a pod's image without replacing the pod: when it is possible, the patch, and when it is done.

Possible when nothing but container images and pod metadata differ between two templates. Kubelet (or our node agent)
then restarts only that container: same pod, same node, same address.
"""

from __future__ import annotations

import copy
import json
from datetime import datetime, timedelta

from baton.api.labels import INPLACE_UPDATE_STATE, REVISION_HASH
from baton.api.resources import PODS, Object
from baton.controllers.plan import Patch, format_time, parse_time
from baton.controllers.pods import container_statuses

# A container that started this long after the patch runs the new image, even if the two images are one to the runtime.
_CLOCK_SLACK = timedelta(seconds=5)


def obstacle(old: Object, new: Object) -> str | None:
    """The first thing that forbids updating in place from template ``old`` to ``new``; None when it is possible."""
    old_spec, new_spec = _without_images(old), _without_images(new)
    if old_spec == new_spec:
        return None
    return _first_difference(old_spec, new_spec, "spec")


def _without_images(template: Object) -> Object:
    spec = copy.deepcopy(template.get("spec") or {})
    for container in spec.get("containers") or []:
        container.pop("image", None)
    return dict(spec)


def _first_difference(old: object, new: object, path: str) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{path}.{key}")
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            if left != right:
                return _first_difference(left, right, f"{path}[{index}]")
    return path


def update(pod: Object, old: Object, new: Object, revision: str, now: datetime) -> Patch:
    """The patch of a pod made from template ``old`` to what ``new`` wants."""
    images = {container["name"]: container.get("image") for container in new["spec"]["containers"]}
    running = container_statuses(pod)
    before = {container["name"]: container.get("image") for container in pod["spec"]["containers"]}
    changed = [name for name, image in images.items() if before.get(name) != image]
    state = {
        "revision": revision,
        "updateTimestamp": format_time(now),
        "lastContainerStatuses": {
            name: {key: running.get(name, {}).get(key, "") for key in ("containerID", "image", "imageID")}
            for name in changed
        },
    }
    meta: Object = {
        "labels": _metadata_change(old, new, "labels") | {REVISION_HASH: revision},
        "annotations": _metadata_change(old, new, "annotations")
        | {INPLACE_UPDATE_STATE: json.dumps(state, sort_keys=True)},
    }
    body: Object = {"metadata": meta}
    if changed:
        body["spec"] = {"containers": [{"name": name, "image": images[name]} for name in changed]}
    place = pod["metadata"]
    why = f"image of {', '.join(changed)} in place" if changed else "metadata in place"
    return Patch(PODS, place["namespace"], place["name"], body, kind="strategic", why=why)


def _metadata_change(old: Object, new: Object, field: str) -> Object:
    before = (old.get("metadata") or {}).get(field) or {}
    after = (new.get("metadata") or {}).get(field) or {}
    return {key: None for key in before if key not in after} | after


def is_done(pod: Object) -> bool:
    """False while a container whose image was changed has not been restarted yet."""
    text = (pod["metadata"].get("annotations") or {}).get(INPLACE_UPDATE_STATE)
    if not text:
        return True
    try:
        state = json.loads(text)
        recorded: Object = state["lastContainerStatuses"]
        since = parse_time(state["updateTimestamp"])
    except (ValueError, KeyError, TypeError):
        return True  # somebody else wrote it; readiness alone must do
    running = container_statuses(pod)
    return all(_restarted(running.get(name, {}), before, since) for name, before in recorded.items())


def _restarted(now: Object, before: Object, patched_at: datetime) -> bool:
    container_id = now.get("containerID") or ""
    if not container_id or container_id == before.get("containerID"):
        return False
    if now.get("image") != before.get("image") or now.get("imageID") != before.get("imageID"):
        return True
    # Same image to the runtime: only the start time tells this container from one that crashed before the patch.
    started = ((now.get("state") or {}).get("running") or {}).get("startedAt")
    return started is not None and parse_time(str(started)) >= patched_at + _CLOCK_SLACK
