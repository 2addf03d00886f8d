"""What the controller must remember between passes: which revisions an update goes from and to, how far it is, and how
often groups had to be made again. Kept as one annotation of the newest ControllerRevision.

There and not in the set's status, because a cluster may have upstream's CRD, which drops fields it does not know.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import datetime

from baton.api import lws
from baton.api.resources import Object
from baton.controllers.lws.rollout import Progress
from baton.controllers.plan import format_time, parse_time

ANNOTATION = "baton.dev/rollout"


@dataclass(frozen=True, slots=True)
class Recreation:
    """How often a group was made again because its containers ended, and when last."""

    count: int
    last: datetime


@dataclass(frozen=True, slots=True)
class Memory:
    """``current``: the revision of groups that an update has not reached; ``update``: the newest one; equal at rest."""

    current: str
    update: str
    progress: Progress
    recreations: dict[int, Recreation] = field(default_factory=dict)

    def text(self) -> str:
        recreations = {str(g): {"count": r.count, "last": format_time(r.last)} for g, r in self.recreations.items()}
        found = {"current": self.current, "update": self.update, **asdict(self.progress)}
        return json.dumps(found | ({"recreations": recreations} if recreations else {}), sort_keys=True)


def newest(history: list[Object]) -> Object | None:
    return max(history, key=lambda entry: int(entry.get("revision") or 0), default=None)


def recall(history: list[Object]) -> Memory | None:
    """What the newest revision says; None when there is none or somebody else wrote it."""
    entry = newest(history)
    text = ((entry or {"metadata": {}})["metadata"].get("annotations") or {}).get(ANNOTATION)
    if not text:
        return None
    try:
        found = json.loads(text)
        return Memory(
            current=str(found["current"]),
            update=str(found["update"]),
            progress=Progress(int(found["partition"]), int(found["replicas"]), int(found["wanted"])),
            recreations={
                int(group): Recreation(int(one["count"]), parse_time(one["last"]))
                for group, one in (found.get("recreations") or {}).items()
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def key_of_revision(entry: Object) -> str:
    return str((entry["metadata"].get("labels") or {}).get(lws.REVISION) or "")
