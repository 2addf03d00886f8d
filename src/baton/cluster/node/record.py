"""What is remembered of a container beyond the agent's life, and how its ends are written on the wire.

Owns `record.json` of one container. The attempts themselves are directories of `supervised`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.cluster.node.environment import Object
from baton.cluster.node.slots import read_json, write_json
from baton.cluster.node.status import rfc3339
from baton.cluster.node.supervised import Exit


@dataclass(slots=True)
class Record:
    """What survives the agent. `attempt` counts starts; `wait_s` is the back-off that the next failure costs."""

    attempt: int = 0
    definition: str = ""
    image: str = ""
    image_id: str = ""
    wait_s: float = 0.0
    previous: dict[str, Any] | None = None
    was_started: bool = False

    @classmethod
    def load(cls, directory: Path) -> Record:
        return cls(**read_json(directory / "record.json"))

    def save(self, directory: Path) -> None:
        write_json(directory / "record.json", asdict(self))


def definition_of(spec: Object) -> str:
    """A hash of what makes a running container another one; resources are not enforced, so they do not count."""
    relevant = {key: value for key, value in spec.items() if key not in ("resources", "resizePolicy")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def terminated(end: Exit, message: str) -> dict[str, Any]:
    """`state.terminated` of a container status."""
    return {
        "exitCode": end.code,
        **({"signal": end.signal} if end.signal else {}),
        "reason": end.reason,
        **({"message": message} if message else {}),
        "startedAt": rfc3339(end.started_at),
        "finishedAt": rfc3339(end.finished_at),
    }


def go_duration(seconds: float) -> str:
    """As Go prints it: 10s, 1m20s, 5m0s."""
    whole = int(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"
