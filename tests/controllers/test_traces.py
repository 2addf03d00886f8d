"""Golden traces: `traces/*.yaml` say what happens to pods, step by step; this file only plays them.

A trace has a `group`, `stateful_set` or `leader_worker_set` (see builders) and steps. A step's `do` is a list of one-key maps (see `_do`);
controllers then run until they plan nothing, and the pod actions they took must be `then`, in that order. `holds` (role
-> gate, null for none), `status` and `events` may be checked beside it.
"""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.controllers import builders
from tests.fakes.kube_world import KubeWorld

from baton.api.resources import LEADER_WORKER_SETS, PODS, ROLE_BASED_GROUPS, STATEFUL_SETS, Object
from baton.controllers.lws import leader_worker_set
from baton.controllers.rbg import group as rbg
from baton.controllers.workloads import stateful_set

TRACES = sorted((Path(__file__).parent / "traces").glob("*.yaml"))
CASES = [
    pytest.param(case, id=f"{path.stem}: {case['name']}")
    for path in TRACES
    for case in yaml.safe_load(path.read_text())
]


class Player:
    def __init__(self, case: Object) -> None:
        self.world = KubeWorld([rbg.CONTROLLER, stateful_set.CONTROLLER, leader_worker_set.CONTROLLER])
        if "group" in case:
            self.obj = builders.group(*(builders.role(**role) for role in case["group"]))
            self.resource, self.name = ROLE_BASED_GROUPS, "g"
        elif "leader_worker_set" in case:
            self.obj = builders.leader_worker_set(**case["leader_worker_set"])
            self.resource, self.name = LEADER_WORKER_SETS, "x"
        else:
            self.obj = builders.stateful_set(**case["stateful_set"])
            self.resource, self.name = STATEFUL_SETS, "web"

    def apply(self) -> None:
        self.world.put(self.obj)

    def do(self, action: str, value: Any) -> None:
        if action == "apply":
            self.apply()
        elif action == "roles":
            self.obj["spec"]["roles"] = [builders.role(**role) for role in value]
            self.apply()
        elif action == "spec":
            build = builders.stateful_set if self.resource == STATEFUL_SETS else builders.leader_worker_set
            self.obj = build(**value)
            self.apply()
        elif action == "ready":
            self.ready(value)
        elif action == "terminated":
            self.world.terminate()
        elif action == "unready":
            self.world.make_unready(value)
        elif action == "restarted":
            self.world.restart(value)
        elif action == "lost":  # between two passes, nobody saw it go
            for _ in range(2):
                self.world.delete(PODS, "default", value)
        elif action == "failed":
            pod = self.pod(value)
            self.world.set_status(pod, {**pod.get("status", {}), "phase": "Failed", "reason": "Evicted"})
        elif action == "unschedulable":
            condition = {
                "type": "PodScheduled",
                "status": "False",
                "message": "0/1 nodes are available: 1 Insufficient cpu.",
            }
            self.world.set_status(self.pod(value), {"phase": "Pending", "conditions": [condition]})
        elif action == "delete":
            self.world.delete(PODS, "default", value)
        elif action == "wait_s":
            self.world.now += timedelta(seconds=value)
        else:
            raise AssertionError(f"no such action in a trace: {action}")

    def ready(self, which: Any) -> None:
        for pod in self.world.all(PODS):
            chosen = which == "all" or pod["metadata"]["name"] in which
            if chosen and not pod["metadata"].get("deletionTimestamp") and self.world.needs_kubelet(pod):
                self.world.make_ready(pod)

    def pod(self, name: str) -> Object:
        found = self.world.get(PODS, name, "default")
        assert found is not None, f"no pod {name}"
        return found

    def settle(self) -> list[str]:
        self.world.log.clear()
        for _ in range(20):
            if not self.world.reconcile():
                # a leader's list of its workers is written into it, which is nothing that happens to pods
                dull = "patch Pod" if self.resource == LEADER_WORKER_SETS else "-"
                told = [line for line in self.world.log if not line.startswith(dull)]
                return [line for line in told if " Pod " in line or " PersistentVolumeClaim " in line]
        raise AssertionError(f"controllers do not come to rest: {self.world.log[-6:]}")

    def holds(self) -> dict[str, str | None]:
        found = self.world.get(self.resource, self.name, "default")
        assert found is not None
        entries = (found.get("status") or {}).get("roleStatuses") or []
        return {entry["name"]: entry.get("hold", {}).get("gate") for entry in entries}

    def status(self) -> Object:
        found = self.world.get(self.resource, self.name, "default")
        assert found is not None
        status: Object = copy.deepcopy(found["status"])
        for entry in status.get("conditions") or []:
            status[entry["type"]] = entry["status"]
        for entry in status.get("roleStatuses") or []:
            status[entry["name"]] = entry
        return status


@pytest.mark.parametrize("case", CASES)
def test_trace(case: Object) -> None:
    player = Player(case)
    for number, step in enumerate(case["steps"]):
        seen = len(player.world.notes)
        for action in step["do"]:
            for verb, value in action.items():
                player.do(verb, value)
        where = f"step {number}: {step['do']}"
        assert player.settle() == step.get("then", []), where
        for role, gate in (step.get("holds") or {}).items():
            assert player.holds().get(role) == gate, where
        for field, value in (step.get("status") or {}).items():
            found: Any = player.status()
            for part in field.split("."):
                found = found.get(part)
            assert found == value, f"{where}: {field}"
        if "events" in step:
            assert [note.reason for _, note in player.world.notes[seen:]] == step["events"], where
