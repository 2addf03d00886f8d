"""What must hold whatever happens to a set: convergence, rest, whole groups, and never more groups down than allowed."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.controllers.builders import leader_worker_set
from tests.fakes.kube_world import KubeWorld

from baton.api.quantity import resolve_count
from baton.api.resources import CONTROLLER_REVISIONS, PODS
from baton.controllers.lws import leader_worker_set as room
from baton.controllers.pods import is_ready

Object = dict[str, Any]
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LWS = "leaderworkerset.sigs.k8s.io/"
bounds = st.sampled_from([(0, 1), (1, 0), (1, 1), (2, 2), ("50%", 0), ("25%", "50%"), (9, 9)])


class KilledError(Exception):
    """The controller's process is gone."""


def lives(world: KubeWorld) -> dict[str, list[Object]]:
    """Pods by group."""
    found: dict[str, list[Object]] = {}
    for pod in world.all(PODS):
        found.setdefault(pod["metadata"]["labels"][LWS + "group-index"], []).append(pod)
    return found


def is_whole(pods: list[Object]) -> bool:
    size = int(pods[0]["metadata"]["annotations"][LWS + "size"])
    return len(pods) == size and all(map(is_ready, pods))


def check_groups(world: KubeWorld) -> None:
    """No group mixes revisions, nor pods of two lives: every worker belongs to the leader that is there."""
    for index, pods in lives(world).items():
        assert len({pod["metadata"]["labels"][LWS + "template-revision-hash"] for pod in pods}) == 1, index
        leaders = [pod for pod in pods if pod["metadata"]["labels"][LWS + "worker-index"] == "0"]
        owners = {pod["metadata"]["ownerReferences"][0]["uid"] for pod in pods if pod not in leaders}
        assert len(owners) <= 1, index
        if leaders and owners:
            assert owners == {leaders[0]["metadata"]["uid"]}, index


def assert_idle(world: KubeWorld) -> None:
    for key in world.keys(room.CONTROLLER):
        plan, _ = world.plan(room.CONTROLLER, key)
        assert plan.is_empty, plan


disturbances = st.lists(
    st.tuples(st.sampled_from(["delete", "restart", "lose", "forget"]), st.integers(0, 11)), max_size=4
)


def disturb(world: KubeWorld, what: str, number: int) -> None:
    pods = world.all(PODS)
    if what == "forget":  # the controller's memory is gone
        for entry in world.all(CONTROLLER_REVISIONS)[:1]:
            world.delete(CONTROLLER_REVISIONS, "default", entry["metadata"]["name"])
    elif pods:
        pod = pods[number % len(pods)]
        name = pod["metadata"]["name"]
        if what != "restart":
            world.delete(PODS, "default", name)
            if what == "lose":
                world.delete(PODS, "default", name)
        elif (pod.get("status") or {}).get("containerStatuses"):
            world.restart(name)


@quick
@given(
    first=st.tuples(st.integers(0, 3), st.integers(1, 3)),
    second=st.tuples(st.integers(0, 3), st.integers(1, 3), st.sampled_from(["img:1", "img:2"])),
    bound=bounds,
    policy=st.sampled_from(["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]),
    startup=st.sampled_from(["LeaderCreated", "LeaderReady"]),
    network=st.sampled_from(["Shared", "UniquePerReplica"]),
    troubles=disturbances,
    speed=st.integers(0, 3),
)
def test_every_change_converges_to_whole_groups_and_then_nothing_is_planned(
    first: tuple[int, int],
    second: tuple[int, int, str],
    bound: tuple[Any, Any],
    policy: str,
    startup: str,
    network: str,
    troubles: list[tuple[str, int]],
    speed: int,
) -> None:
    world = KubeWorld([room.CONTROLLER])
    world.after_action = lambda: check_groups(world)
    rolling = {"maxUnavailable": bound[0], "maxSurge": bound[1]}
    common: Object = {
        "rolling": rolling,
        "template": {"restartPolicy": policy},
        "startupPolicy": startup,
        "networkConfig": {"subdomainPolicy": network},
    }
    for replicas, size, image in ((*first, "img:1"), second):
        world.put(leader_worker_set(replicas, size, image, **common))
        for what, number in troubles:
            world.reconcile()
            disturb(world, what, number)
            world.run_pods(limit=speed)
            world.now += timedelta(seconds=1)
        world.settle(400)
    assert_idle(world)
    replicas, size, image = second
    expected = {f"x-{g}" + (f"-{w}" if w else "") for g in range(replicas) for w in range(size)}
    assert set(world.pod_names()) == expected
    assert {pod["spec"]["containers"][0]["image"] for pod in world.all(PODS)} <= {image}
    assert all(map(is_whole, lives(world).values()))


@quick
@given(
    replicas=st.integers(1, 5),
    size=st.integers(1, 3),
    bound=bounds,
    partition=st.sampled_from([0, 0, 1, 9]),
    changes=st.lists(
        st.tuples(st.sampled_from(["img:1", "img:2", "img:3"]), st.integers(1, 3)), min_size=1, max_size=3
    ),
    speed=st.lists(st.integers(0, 4), min_size=1, max_size=8),
)
def test_an_update_never_takes_more_groups_down_than_allowed(
    replicas: int,
    size: int,
    bound: tuple[Any, Any],
    partition: int,
    changes: list[tuple[str, int]],
    speed: list[int],
) -> None:
    world = KubeWorld([room.CONTROLLER])
    rolling = {"maxUnavailable": bound[0], "maxSurge": bound[1], "partition": partition}
    world.put(leader_worker_set(replicas, size, rolling=rolling))
    world.settle()
    surge = min(resolve_count(bound[1], replicas, round_up=True), replicas)
    down = resolve_count(bound[0], replicas, round_up=False) or (0 if surge else 1)

    def check() -> None:
        check_groups(world)
        alive = lives(world)
        assert sum(map(is_whole, alive.values())) >= replicas - down
        assert len(alive) <= replicas + surge

    world.after_action = check
    for image, new_size in changes:
        world.put(leader_worker_set(replicas, new_size, image, rolling=rolling))
        for limit in speed:
            world.reconcile()
            world.run_pods(limit=limit)
            world.now += timedelta(seconds=1)
    world.settle(400)
    assert_idle(world)
    image, new_size = changes[-1]
    updated = {f"x-{group}" for group in range(partition, replicas)}
    for pod in world.all(PODS):
        if pod["metadata"]["name"] in updated:
            assert pod["spec"]["containers"][0]["image"] == image
            assert pod["metadata"]["annotations"][LWS + "size"] == str(new_size)


@quick
@given(replicas=st.integers(1, 4), bound=bounds, stop=st.integers(1, 20))
def test_a_controller_that_is_killed_anywhere_in_a_rollout_finishes_it_later(
    replicas: int, bound: tuple[Any, Any], stop: int
) -> None:
    """Killed after any single action of a plan: the rest of that plan never happens, the next pass sees what is there."""
    rolling = {"maxUnavailable": bound[0], "maxSurge": bound[1]}
    world = KubeWorld([room.CONTROLLER])
    world.put(leader_worker_set(replicas, rolling=rolling))
    world.settle()
    world.put(leader_worker_set(replicas, image="img:2", rolling=rolling))
    left = stop

    def count() -> None:
        nonlocal left
        check_groups(world)
        left -= 1
        if left == 0:
            raise KilledError

    world.after_action = count
    for _ in range(2):
        try:
            world.settle(400)
            break
        except KilledError:
            continue
    assert_idle(world)
    assert {pod["spec"]["containers"][0]["image"] for pod in world.all(PODS)} == {"img:2"}
    assert len(world.pod_names()) == 2 * replicas
