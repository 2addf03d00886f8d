"""How a container becomes a process: the contract of the two isolations, and what both are told.

Implementations: `bubblewrap` (mounts at the manifest's paths) and `plain` (paths rewritten). Neither starts anything:
they turn a `ContainerPlan` into a `Launch` for the supervisor. `plan` builds the plan from a pod.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from baton.cluster.node.supervised import Launch

POD_IP_VARIABLE = "BATON_POD_IP"
HOSTS_VARIABLE = "BATON_HOSTS_FILE"
PATHS_VARIABLE = "BATON_VOLUME_PATHS"
"""Plain mode: `HOST_PATH=MANIFEST_PATH` pairs joined by `:`. These names are read by `baton.protocol.pod` and `pyhook`."""
PYHOOK = Path(__file__).with_name("pyhook")


@dataclass(frozen=True, slots=True)
class Mount:
    """`source` on this machine appears at `target` (absolute, as the manifest has it)."""

    source: Path
    target: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class ContainerPlan:
    """Everything that a runtime needs to know of one container. Paths in `argv` and `env` are the manifest's."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    mounts: tuple[Mount, ...]
    share: tuple[str, ...]
    """Host directories that appear read-write at their own path."""
    keep: tuple[str, ...]
    """Host paths that must stay visible wherever they lie (our own code, programs of the image)."""
    hostname: str
    hosts: Path
    shm: Path
    scratch: Path
    """The container's own /tmp and home; emptied at each start."""


class Runtime(Protocol):
    name: str

    def launch(self, plan: ContainerPlan) -> Launch:
        """The container's main process."""
        ...

    def enter(self, launched: Launch, command: Sequence[str]) -> Launch:
        """Another process with the same view as a launched container (exec, probes, hooks). Run without a supervisor."""
        ...


class PlanError(Exception):
    """The container cannot be started in this isolation; the message says why."""
