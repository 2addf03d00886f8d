"""What a claim without a volume is on this machine: the user's directory, the demo model, or an empty directory.

Pure choice; binding is the binder's (`baton.controllers.volumes`), mounting the node agent's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from baton.api.resources import Object

DEMO_DRIVER = "demo-model.baton.dev"
_SHARED_MODES = {"ReadOnlyMany", "ReadWriteMany"}


def default_source(claim: Object, directories: Mapping[str, Path], own: Path) -> Object:
    """The volume source for a claim that no volume fits.

    `directories` (from `--volume`) come first. A claim that many pods share is a model, and the demo model stands for it,
    read-only; one that a single pod writes (ReadWriteOnce) is data: an empty directory under `own`.
    """
    namespace, name = claim["metadata"]["namespace"], claim["metadata"]["name"]
    for key in (f"{namespace}/{name}", name):
        if key in directories:
            return {"hostPath": {"path": str(directories[key])}}
    if _SHARED_MODES & set(claim["spec"].get("accessModes") or []):
        # The node agent puts the demo model where a volume names no directory, and says so when there is none.
        return {"csi": {"driver": DEMO_DRIVER, "volumeHandle": name, "readOnly": True}}
    return {
        "hostPath": {
            "path": str(own / f"{namespace}-{name}-{claim['metadata']['uid'][:8]}"),
            "type": "DirectoryOrCreate",
        }
    }
