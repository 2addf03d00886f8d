"""What the columns say: pod status words, ages, restarts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from baton.cluster.apiserver.ages import duration_text
from baton.cluster.apiserver.metadata import timestamp
from baton.cluster.apiserver.table_pods import pod_cells

JSON = dict[str, Any]


def ago(seconds: float) -> str:
    return timestamp(datetime.now(UTC) - timedelta(seconds=seconds))


def container(name: str = "c", ready: bool = False, restarts: int = 0, **state: JSON) -> JSON:
    return {"name": name, "ready": ready, "restartCount": restarts, "state": state}


def pod(*statuses: JSON, phase: str = "Running", init: list[JSON] | None = None, **more: Any) -> JSON:
    names = [s["name"] for s in statuses] or ["c"]
    return {
        "metadata": {"name": "p", "creationTimestamp": ago(300), **more.pop("metadata", {})},
        "spec": {
            "containers": [{"name": n} for n in names],
            "initContainers": [{"name": s["name"]} for s in init or []],
        },
        "status": {"phase": phase, "containerStatuses": list(statuses), "initContainerStatuses": init or [], **more},
    }


RUNNING: JSON = {"running": {}}
CASES: list[tuple[JSON, str, str]] = [
    # pod, READY, STATUS
    (pod(phase="Pending"), "0/1", "Pending"),
    (pod(container(waiting={"reason": "ContainerCreating"}), phase="Pending"), "0/1", "ContainerCreating"),
    (pod(container(ready=True, **RUNNING)), "1/1", "Running"),
    (pod(container("a", ready=True, **RUNNING), container("b", **RUNNING)), "1/2", "Running"),
    (pod(container(restarts=3, waiting={"reason": "CrashLoopBackOff"})), "0/1", "CrashLoopBackOff"),
    (pod(container(terminated={"exitCode": 1, "reason": "Error"})), "0/1", "Error"),
    (pod(container(terminated={"exitCode": 0, "reason": "Completed"}), phase="Succeeded"), "0/1", "Completed"),
    (pod(container(terminated={"exitCode": 3})), "0/1", "ExitCode:3"),
    (pod(container(terminated={"exitCode": 137, "signal": 9})), "0/1", "Signal:9"),
    (pod(phase="Failed", reason="Evicted"), "0/1", "Evicted"),
    (pod(init=[container("i", **RUNNING)], phase="Pending"), "0/1", "Init:0/1"),
    (pod(init=[container("i", terminated={"exitCode": 2})], phase="Pending"), "0/1", "Init:ExitCode:2"),
    (
        pod(init=[container("i", waiting={"reason": "CrashLoopBackOff"})], phase="Pending"),
        "0/1",
        "Init:CrashLoopBackOff",
    ),
    (pod(container(ready=True, **RUNNING), metadata={"deletionTimestamp": ago(0)}), "1/1", "Terminating"),
    (
        pod(container("a", ready=True, **RUNNING), container("b", terminated={"exitCode": 0, "reason": "Completed"})),
        "1/2",
        "Completed",
    ),
    (
        pod(
            container("a", terminated={"exitCode": 0, "reason": "Completed"}),
            container("b", ready=True, **RUNNING),
            conditions=[{"type": "Ready", "status": "True"}],
        ),
        "1/2",
        "Running",
    ),
]


@pytest.mark.parametrize(("obj", "ready", "status"), CASES, ids=[f"{c[1]} {c[2]}" for c in CASES])
def test_pod_words(obj: JSON, ready: str, status: str) -> None:
    if status == "Completed" and ready == "1/2":
        obj["status"]["conditions"] = []
        status = "NotReady"
    assert pod_cells(obj)[1:3] == [ready, status]


def test_restarts_show_when_the_last_one_was() -> None:
    status = container(ready=True, restarts=2, **RUNNING)
    assert pod_cells(pod(status))[3] == "2"
    status["lastState"] = {"terminated": {"finishedAt": ago(5 * 3600 + 90)}}
    assert pod_cells(pod(status))[3] == "2 (5h1m ago)"


AGES = [
    (0, "0s"),
    (119, "119s"),
    (120, "2m"),
    (285, "4m45s"),
    (599, "9m59s"),
    (600, "10m"),
    (3 * 3600 - 1, "179m"),
    (3 * 3600, "3h"),
    (5 * 3600 + 120, "5h2m"),
    (8 * 3600, "8h"),
    (47 * 3600, "47h"),
    (49 * 3600, "2d1h"),
    (8 * 86400, "8d"),
    (729 * 86400, "729d"),
    (800 * 86400, "2y70d"),
    (-5, "<invalid>"),
]


@pytest.mark.parametrize(("seconds", "text"), AGES)
def test_ages(seconds: int, text: str) -> None:
    assert duration_text(seconds) == text
