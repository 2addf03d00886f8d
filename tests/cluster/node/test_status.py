"""A pod's status as a table: from what its containers are to what kubectl prints."""

from __future__ import annotations

from typing import Any

import pytest

from baton.cluster.node.status import ContainerSnapshot, PodSnapshot, as_patch, build, conditions, differs, phase


def container(name: str = "main", kind: str = "ready", code: int = 0, *, done: bool = False) -> ContainerSnapshot:
    states: dict[str, dict[str, Any]] = {
        "new": {"waiting": {"reason": "ContainerCreating"}},
        "running": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
        "ready": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
        "ended": {"terminated": {"exitCode": code}},
        "backoff": {"waiting": {"reason": "CrashLoopBackOff"}},
    }
    return ContainerSnapshot(
        name=name, image="i", image_id="baton://i", container_id="baton://x", state=states[kind], last_state={},
        is_ready=kind == "ready", is_started=kind in ("ready", "running"), restart_count=0, has_run=kind != "new",
        exit_code=code if kind in ("ended", "backoff") else None, is_done=done or kind == "ended",
    )  # fmt: skip


def pod(
    *containers: ContainerSnapshot, init: Any = (), sidecars: Any = (), now: float = 100.0, **spec: Any
) -> PodSnapshot:
    status = spec.pop("status", {})
    return PodSnapshot(
        {"metadata": {"name": "p"}, "spec": spec, "status": status}, "127.1.0.1", init, frozenset(sidecars), containers,
        now, 50.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("snapshot", "expected"),
    [
        (pod(container(kind="new")), "Pending"),
        (pod(container(kind="running")), "Running"),
        (pod(container(kind="ready"), container("b", "new")), "Pending"),
        (pod(container(kind="backoff", code=1)), "Running"),
        (pod(container(kind="ended"), restartPolicy="Never"), "Succeeded"),
        (pod(container(kind="ended", code=1), restartPolicy="Never"), "Failed"),
        (pod(container(kind="ended"), container("b", "running"), restartPolicy="Never"), "Running"),
        (pod(container(kind="ended"), restartPolicy="OnFailure"), "Succeeded"),
        (pod(container(kind="new"), init=[container("i", "running")]), "Pending"),
        (pod(container(kind="new"), init=[container("i", "ended", 1)], restartPolicy="Never"), "Failed"),
        (pod(container(kind="new"), init=[container("i", "backoff", 1)]), "Pending"),
        (pod(container(kind="ready"), init=[container("i", "ended")]), "Running"),
        (pod(container(kind="ready"), init=[container("s", "running")], sidecars=["s"]), "Running"),
    ],
)
def test_phase(snapshot: PodSnapshot, expected: str) -> None:
    assert phase(snapshot) == expected


def of(snapshot: PodSnapshot) -> dict[str, tuple[str, str]]:
    return {one["type"]: (one["status"], one.get("message", "")) for one in conditions(snapshot)}


def test_a_pod_is_ready_when_all_containers_and_gates_are() -> None:
    assert of(pod(container()))["Ready"] == ("True", "")
    both = of(pod(container(), container("b", "running")))
    assert both["Ready"] == both["ContainersReady"] == ("False", "containers with unready status: [b]")
    gate = {"readinessGates": [{"conditionType": "InPlaceUpdateReady"}]}
    assert of(pod(container(), **gate))["ContainersReady"] == ("True", "")
    assert of(pod(container(), **gate))["Ready"][0] == "False"
    opened = {"conditions": [{"type": "InPlaceUpdateReady", "status": "True"}]}
    assert of(pod(container(), status=opened, **gate))["Ready"] == ("True", "")


def test_init_containers_are_told_of() -> None:
    waiting = of(pod(container(kind="new"), init=[container("i", "running"), container("j", "new")]))
    assert waiting["Initialized"] == ("False", "containers with incomplete status: [j]")


def test_a_transition_time_changes_only_with_the_status() -> None:
    first = build(pod(container(kind="running"), now=100.0))
    later = build(pod(container(kind="running"), now=200.0, status=first))
    assert later["conditions"] == first["conditions"]
    ready = build(pod(container(), now=300.0, status=later))
    times = {one["type"]: one["lastTransitionTime"] for one in ready["conditions"]}
    assert times["Initialized"] == "1970-01-01T00:01:40Z"
    assert times["Ready"] == "1970-01-01T00:05:00Z"


def test_a_status_that_is_there_already_is_not_written_again() -> None:
    snapshot = pod(container())
    status = build(snapshot)
    foreign = {"type": "PodScheduled", "status": "True"}
    stored = {
        **snapshot.pod,
        "status": {**status, "conditions": [foreign, *status["conditions"]], "nominatedNodeName": ""},
    }
    assert not differs(stored, status)
    assert differs(stored, build(pod(container(kind="running"))))
    assert differs({"metadata": {}, "spec": {}}, status)


def test_a_condition_that_holds_again_loses_the_reason_it_had_for_not_holding() -> None:
    unready, ready = (as_patch(build(pod(container(kind=kind)))) for kind in ("running", "ready"))
    found = [next(one for one in patch["conditions"] if one["type"] == "Ready") for patch in (unready, ready)]
    assert [(one["status"], one["reason"]) for one in found] == [("False", "ContainersNotReady"), ("True", None)]
