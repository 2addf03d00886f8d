"""A set over time: restarts and their evidence, revisions and undo, lost memory, pods of others, refused specs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.controllers.builders import leader_worker_set, pod_template
from tests.fakes.kube_world import KubeWorld

from baton.api.resources import CONTROLLER_REVISIONS, LEADER_WORKER_SETS, PODS, SERVICES
from baton.controllers.lws import leader_worker_set as room
from baton.controllers.lws.memory import ANNOTATION

Object = dict[str, Any]


def settled(obj: Object) -> KubeWorld:
    world = KubeWorld([room.CONTROLLER])
    world.put(obj)
    world.settle()
    return world


def images(world: KubeWorld) -> dict[str, str]:
    return {one["metadata"]["name"]: one["spec"]["containers"][0]["image"] for one in world.all(PODS)}


def status(world: KubeWorld) -> Object:
    found = world.get(LEADER_WORKER_SETS, "x", "default")
    assert found is not None
    return dict(found["status"])


def told(world: KubeWorld, reason: str) -> list[tuple[str, str]]:
    return [(note.type, note.message) for _, note in world.notes if note.reason == reason]


def test_the_event_of_a_lost_group_keeps_the_evidence() -> None:
    world = settled(leader_worker_set(2))
    world.restart("x-1-1", 137, "first line\ncuda error: out of memory\n")
    world.reconcile()
    assert told(world, "RecreateGroup") == [
        (
            "Warning",
            "Pod x-1-1 restarted: container main ended with exit code 137: first line cuda error: out of memory; "
            "deleted all pods to recreate group 1",
        )
    ]


def run_again(world: KubeWorld, name: str, ended: str, started: str) -> None:
    """The pod's container ended and runs again, at these seconds of one minute."""
    world.restart(name)
    found = world.get(PODS, name, "default")
    assert found is not None
    entry = found["status"]["containerStatuses"][0]
    entry["lastState"]["terminated"]["finishedAt"] = f"2026-01-01T00:00:{ended}Z"
    entry["state"] = {"running": {"startedAt": f"2026-01-01T00:00:{started}Z"}}
    world.set_status(found, {**found["status"], "containerStatuses": [entry]})


@pytest.mark.parametrize(
    ("leader", "worker", "is_lost"),
    [
        (("10", "14"), ("12", "13"), False),  # the machine was down from 12 to 13
        (("10", "12"), ("12", "13"), True),  # nobody knows
        (("10", "11"), ("12", "13"), True),  # the worker ended because the leader did
        (("10", "14"), None, True),  # the worker never ended
    ],
)
def test_a_group_that_was_down_as_a_whole_needs_not_be_made_again(
    leader: tuple[str, str], worker: tuple[str, str] | None, is_lost: bool
) -> None:
    world = settled(leader_worker_set(1))
    run_again(world, "x-0", *leader)
    if worker is not None:
        run_again(world, "x-0-1", *worker)
    world.reconcile()
    assert bool(told(world, "RecreateGroup")) is is_lost


def test_a_stopped_cluster_that_starts_again_makes_no_group_again() -> None:
    world = settled(leader_worker_set(1))
    stopped = {"type": "Ready", "status": "False", "reason": "NodeStopped"}
    for found in world.all(PODS):
        world.set_status(found, {**found["status"], "conditions": [stopped]})
    run_again(world, "x-0-1", "10", "14")
    worker = world.get(PODS, "x-0-1", "default")
    assert worker is not None
    world.set_status(worker, {**worker["status"], "conditions": [{**stopped, "status": "True"}]})
    world.reconcile()
    assert told(world, "RecreateGroup") == [], "the leader's status is of before the stop"


def test_status_says_what_autoscalers_and_kubectl_ask_for() -> None:
    world = settled(leader_worker_set(3))
    found = status(world)
    assert (found["replicas"], found["readyReplicas"], found["updatedReplicas"]) == (3, 3, 3)
    name = "leaderworkerset.sigs.k8s.io/name=x,leaderworkerset.sigs.k8s.io/worker-index=0"
    assert (found["hpaPodSelector"], found["observedGeneration"]) == (name, 1)
    assert told(world, "AllGroupsReady") == [
        ("Normal", "All replicas are ready, with 3 groups ready of total 3 groups")
    ]
    conditions = {entry["type"]: (entry["reason"], entry["message"]) for entry in found["conditions"]}
    assert conditions["Available"] == ("AllGroupsReady", "All replicas are ready")


def test_updates_are_told_by_range() -> None:
    world = settled(leader_worker_set(4, rolling={"maxUnavailable": 2}))
    world.put(leader_worker_set(4, image="img:2", rolling={"maxUnavailable": 2}))
    world.settle()
    messages = [message for _, message in told(world, "GroupsUpdating")]
    assert messages[:2] == [
        "Updating replicas 2 to 3 (inclusive)",
        "Rolling Upgrade is in progress, with 4 groups ready of total 4 groups",
    ]
    assert messages[-1].startswith("Updating replica")


def test_an_old_revision_brings_the_old_groups_back() -> None:
    world = settled(leader_worker_set(2))
    first = world.all(CONTROLLER_REVISIONS)[0]["data"]
    world.put(leader_worker_set(2, image="img:2", size=3))
    world.settle()
    assert len(world.all(CONTROLLER_REVISIONS)) == 2
    found = world.get(LEADER_WORKER_SETS, "x", "default")
    assert found is not None
    spec = found["spec"] | {"leaderWorkerTemplate": first["spec"]["leaderWorkerTemplate"]}
    world.put({**found, "spec": spec})
    world.settle()
    assert images(world) == dict.fromkeys(("x-0", "x-0-1", "x-1", "x-1-1"), "img:1")
    assert [
        entry["revision"] for entry in sorted(world.all(CONTROLLER_REVISIONS), key=lambda e: int(e["revision"]))
    ] == [2, 3]


def test_history_keeps_ten_revisions_and_what_groups_use() -> None:
    world = settled(leader_worker_set(1))
    for number in range(15):
        world.put(leader_worker_set(1, image=f"v:{number}"))
        world.settle()
    assert len(world.all(CONTROLLER_REVISIONS)) == 11


def test_a_set_that_leaves_defaults_out_has_the_revision_of_one_that_writes_them() -> None:
    short = leader_worker_set(1, size=1)
    del short["spec"]["leaderWorkerTemplate"]["size"], short["spec"]["rolloutStrategy"]
    world = settled(short)
    full = leader_worker_set(1, size=1, startupPolicy="LeaderCreated", networkConfig={"subdomainPolicy": "Shared"})
    full["spec"]["leaderWorkerTemplate"]["restartPolicy"] = "RecreateGroupOnPodRestart"
    world.log.clear()
    world.put(full)
    world.settle()
    assert world.log == []


def test_what_is_not_in_a_revision_changes_no_pod() -> None:
    world = settled(leader_worker_set(2))
    world.log.clear()
    world.put(leader_worker_set(2, rolling={"maxUnavailable": 2}, startupPolicy="LeaderReady"))
    world.settle()
    assert [line for line in world.log if " Pod " in line] == []


def test_lost_memory_makes_nobody_roll_too_fast() -> None:
    world = settled(leader_worker_set(4))
    for entry in world.all(CONTROLLER_REVISIONS):
        world.delete(CONTROLLER_REVISIONS, "default", entry["metadata"]["name"])
    world.put(leader_worker_set(4, image="img:2"))
    world.reconcile()
    leaving = [one["metadata"]["name"] for one in world.all(PODS) if one["metadata"].get("deletionTimestamp")]
    assert leaving == ["x-3", "x-3-1"]
    world.settle()
    assert set(images(world).values()) == {"img:2"}


class KilledError(Exception):
    """The controller's process is gone."""


def test_an_update_that_was_decided_but_not_done_minds_what_happened_since() -> None:
    world = settled(leader_worker_set(4, rolling={"maxUnavailable": 2}))
    world.put(leader_worker_set(4, image="img:2", rolling={"maxUnavailable": 2}))

    def killed() -> None:
        raise KilledError

    world.after_action = killed  # after writing that groups 2 and 3 may go, before deleting any
    with pytest.raises(KilledError):
        world.reconcile()
    world.after_action = lambda: None
    world.make_unready("x-0")
    world.reconcile()
    leaving = [one["metadata"]["name"] for one in world.all(PODS) if one["metadata"].get("deletionTimestamp")]
    assert leaving == ["x-3", "x-3-1"], "two groups down are all that is allowed"
    assert "group 2 is updated next (at most 2 down)" in status(world)["hold"]


def test_lost_notes_of_how_far_a_rollout_is_do_not_stop_it() -> None:
    rolling = {"maxUnavailable": 0, "maxSurge": 1}
    world = settled(leader_worker_set(2, rolling=rolling))
    (entry,) = world.all(CONTROLLER_REVISIONS)
    world.patch(
        CONTROLLER_REVISIONS, "default", entry["metadata"]["name"], {"metadata": {"annotations": {ANNOTATION: "{"}}}
    )
    world.put(leader_worker_set(2, image="img:2", rolling=rolling))
    world.settle()
    assert images(world) == dict.fromkeys(("x-0", "x-0-1", "x-1", "x-1-1"), "img:2")


def left_behind(name: str, kind: str, **labels: str) -> Object:
    """An object of a leader that is gone, which no garbage collector has found yet."""
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "x-0", "uid": "gone", "controller": True}
    prefix = "leaderworkerset.sigs.k8s.io/"
    meta = {"name": name, "labels": {prefix + "name": "x"} | {prefix + key: value for key, value in labels.items()}}
    spec = pod_template()["spec"] if kind == "Pod" else {"clusterIP": "None"}
    return {"apiVersion": "v1", "kind": kind, "metadata": {**meta, "ownerReferences": [owner]}, "spec": spec}


@pytest.mark.parametrize("late", [False, True])
def test_a_worker_of_a_former_leader_is_replaced(late: bool) -> None:
    world = KubeWorld([room.CONTROLLER])
    worker = left_behind("x-0-1", "Pod", **{"worker-index": "1"})
    if not late:
        world.put(worker)
    world.put(leader_worker_set(1, startupPolicy="LeaderReady"))
    world.reconcile()
    assert late == ("x-0" in world.pod_names()), "a leader is made when nothing is left of the former life"
    if late:
        world.put(worker)
    world.settle()
    leader, found = world.get(PODS, "x-0", "default"), world.get(PODS, "x-0-1", "default")
    assert leader is not None and found is not None
    assert found["metadata"]["ownerReferences"][0]["uid"] == leader["metadata"]["uid"]


def test_a_service_of_a_former_leader_is_replaced() -> None:
    world = KubeWorld([room.CONTROLLER])
    world.put(left_behind("x-0", "Service"))
    world.put(leader_worker_set(1, networkConfig={"subdomainPolicy": "UniquePerReplica"}))
    world.settle()
    leader, found = world.get(PODS, "x-0", "default"), world.get(SERVICES, "x-0", "default")
    assert leader is not None and found is not None
    assert found["metadata"]["ownerReferences"][0]["uid"] == leader["metadata"]["uid"]


def test_a_lost_revision_is_written_again() -> None:
    world = settled(leader_worker_set(2))
    (entry,) = world.all(CONTROLLER_REVISIONS)
    world.delete(CONTROLLER_REVISIONS, "default", entry["metadata"]["name"])
    world.log.clear()
    world.settle()
    assert world.log == [f"create ControllerRevision {entry['metadata']['name']}"]
    assert json.loads(world.all(CONTROLLER_REVISIONS)[0]["metadata"]["annotations"][ANNOTATION])["partition"] == 0


def test_pods_of_somebody_else_are_waited_for_not_deleted() -> None:
    world = KubeWorld([room.CONTROLLER])
    label = "leaderworkerset.sigs.k8s.io/"
    owner = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "x", "uid": "other", "controller": True}
    theirs = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "x-0",
            "labels": {label + "name": "x", label + "worker-index": "0"},
            "ownerReferences": [owner],
        },
        "spec": pod_template()["spec"],
    }
    world.put(theirs)
    world.put(leader_worker_set(1))
    world.settle()
    assert world.pod_names() == ["x-0"]
    assert status(world)["hold"] == "group 0 starts when pod x-0 is gone"


def test_leaders_left_behind_without_an_owner_are_adopted() -> None:
    world = settled(leader_worker_set(1))
    uid = world.objects["pods", "default", "x-0"]["metadata"]["uid"]
    world.patch(PODS, "default", "x-0", {"metadata": {"ownerReferences": None}})
    world.settle()
    leader = world.get(PODS, "x-0", "default")
    assert leader is not None and leader["metadata"]["uid"] == uid
    assert leader["metadata"]["ownerReferences"][0]["kind"] == "LeaderWorkerSet"
    assert world.pod_names() == ["x-0", "x-0-1"]


def test_a_set_of_the_same_name_waits_for_the_pods_of_the_former_one() -> None:
    world = settled(leader_worker_set(1))
    world.delete(LEADER_WORKER_SETS, "default", "x")
    world.put(leader_worker_set(1, image="img:2"))
    world.reconcile()
    assert images(world) == {"x-0": "img:1", "x-0-1": "img:1"}
    world.settle()
    assert images(world) == {"x-0": "img:2", "x-0-1": "img:2"}


@pytest.mark.parametrize(
    ("change", "field"),
    [({"replicas": -1}, "spec.replicas"), ({"startupPolicy": "Never"}, "spec.startupPolicy")],
)
def test_a_spec_that_slipped_through_is_refused_and_running_groups_stay(change: Object, field: str) -> None:
    world = settled(leader_worker_set(1))
    bad = leader_worker_set(1)
    bad["spec"] |= change
    world.put(bad)
    world.settle()
    assert world.pod_names() == ["x-0", "x-0-1"]
    assert field in status(world)["hold"]
    assert [kind for kind, _ in told(world, "InvalidSpec")] == ["Warning"]
    world.put(leader_worker_set(1))
    world.settle()
    conditions = {entry["type"]: entry["status"] for entry in status(world)["conditions"]}
    assert (conditions["Accepted"], conditions["Available"]) == ("True", "True")
    assert "hold" not in status(world)
