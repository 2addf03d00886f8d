"""What must hold whatever happens: convergence, idempotence, and never more pods down than allowed."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.controllers.builders import deployment, group, role, stateful_set
from tests.fakes.kube_world import KubeWorld

from baton.api.quantity import resolve_count
from baton.api.resources import CONTROLLER_REVISIONS, DEPLOYMENTS, PODS, REPLICA_SETS
from baton.controllers import in_place
from baton.controllers.pods import is_ready
from baton.controllers.rbg import group as rbg
from baton.controllers.workloads import deployment as deployments
from baton.controllers.workloads import replica_set
from baton.controllers.workloads import stateful_set as stateful_sets

Object = dict[str, Any]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

rolling = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["RecreatePod", "InPlaceIfPossible"]),
        "maxUnavailable": st.sampled_from([1, 2, "50%"]),
        "paused": st.booleans(),
    },
)


def roles(names: str = "abc") -> st.SearchStrategy[list[Object]]:
    def build(picks: list[tuple[int, str, str, Object, str, int]]) -> list[Object]:
        made = []
        for index, (replicas, image, env, update, order, min_ready) in enumerate(picks):
            earlier = [names[i] for i in range(index)]
            made.append(
                role(
                    names[index],
                    replicas,
                    image,
                    env=env,
                    rolling=update,
                    podManagementPolicy=order,
                    minReadySeconds=min_ready,
                    dependencies=earlier[-1:],
                )
            )
        return made

    one = st.tuples(
        st.integers(0, 4),
        st.sampled_from(["img:1", "img:2", "img:3"]),
        st.sampled_from(["1", "2"]),
        rolling,
        st.sampled_from(["Parallel", "OrderedReady"]),
        st.sampled_from([0, 2]),
    )
    return st.lists(one, min_size=1, max_size=len(names)).map(build)


def unavailable(world: KubeWorld, found: Object) -> set[str]:
    """Ordinals of a role that are not serving now."""
    names = {f"g-{found['name']}-{ordinal}" for ordinal in range(found["replicas"])}
    pods = {pod["metadata"]["name"]: pod for pod in world.all(PODS)}
    return {name for name in names if name not in pods or not is_ready(pods[name]) or not in_place.is_done(pods[name])}


def assert_idle(world: KubeWorld) -> None:
    for controller in world.controllers:
        for key in world.keys(controller):
            plan, _ = world.plan(controller, key)
            assert plan.is_empty, f"{controller.name} {key} is at rest, yet plans {plan}"


@quick
@given(first=roles(), second=roles(), disturbances=st.lists(st.integers(0, 11), max_size=4))
def test_every_change_converges_and_then_nothing_is_planned(
    first: list[Object], second: list[Object], disturbances: list[int]
) -> None:
    world = KubeWorld([rbg.CONTROLLER])
    for spec in (first, second):
        world.put(group(*spec))
        for number in disturbances:  # lose pods in the middle of things
            world.reconcile()
            pods = world.all(PODS)
            if pods:
                meta = pods[number % len(pods)]["metadata"]
                world.delete(PODS, meta["namespace"], meta["name"])
            world.run_pods(limit=1)
        world.settle()
    assert_idle(world)
    expected = {f"g-{r['name']}-{i}" for r in second for i in range(r["replicas"])}
    assert set(world.pod_names()) == expected
    for found in second:
        paused = (found.get("rolloutStrategy") or {}).get("rollingUpdate", {}).get("paused")
        for ordinal in range(found["replicas"]):
            pod = world.get(PODS, f"g-{found['name']}-{ordinal}", "default")
            assert pod is not None and is_ready(pod)
            template = found["standalonePattern"]["template"]["spec"]["containers"][0]
            if not paused:
                container = pod["spec"]["containers"][0]
                assert container["image"] == template["image"]
                assert container["env"][-1] == template["env"][0]


@quick
@given(
    replicas=st.integers(1, 5),
    update=rolling.filter(lambda u: not u.get("paused")),
    changes=st.lists(
        st.tuples(st.sampled_from(["img:1", "img:2", "img:3"]), st.sampled_from(["1", "2"])), min_size=1, max_size=4
    ),
    speed=st.lists(st.integers(0, 2), min_size=1, max_size=8),
)
def test_an_update_never_takes_more_pods_down_than_allowed(
    replicas: int, update: Object, changes: list[tuple[str, str]], speed: list[int]
) -> None:
    world = KubeWorld([rbg.CONTROLLER])
    found = role("a", replicas, env="1", rolling=update)
    world.put(group(found))
    world.settle()
    allowed = max(1, resolve_count(update.get("maxUnavailable", 1), replicas, round_up=True))
    worst = 0

    def check() -> None:
        nonlocal worst
        worst = max(worst, len(unavailable(world, found)))

    world.after_action = check
    for image, env in changes:
        found = role("a", replicas, image, env=env, rolling=update)
        world.put(group(found))
        for ready in speed:
            world.reconcile()
            world.run_pods(limit=ready)
            world.now += timedelta(seconds=1)
    world.settle()
    assert worst <= allowed
    assert_idle(world)


@quick
@given(
    first=st.integers(0, 4),
    second=st.integers(0, 4),
    policy=st.sampled_from(["Parallel", "OrderedReady"]),
    partition=st.integers(0, 3),
    image=st.sampled_from(["img:1", "img:2"]),
)
def test_a_stateful_set_converges(first: int, second: int, policy: str, partition: int, image: str) -> None:
    world = KubeWorld([stateful_sets.CONTROLLER])
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"partition": partition}}
    world.put(stateful_set(first, podManagementPolicy=policy))
    world.settle()
    world.put(stateful_set(second, image, podManagementPolicy=policy, updateStrategy=strategy))
    world.settle()
    assert_idle(world)
    assert world.pod_names() == [f"web-{ordinal}" for ordinal in range(second)]
    for ordinal in range(second):
        pod = world.get(PODS, f"web-{ordinal}", "default")
        assert pod is not None
        assert pod["spec"]["containers"][0]["image"] == ("img:1" if ordinal < partition else image)


counts = st.sampled_from([0, 1, 2, "25%", "50%"])


@quick
@given(
    first=st.integers(0, 5),
    second=st.integers(0, 5),
    surge=counts,
    down=counts,
    recreate=st.booleans(),
    speed=st.lists(st.integers(0, 3), max_size=6),
)
def test_a_deployment_rolls_within_its_bounds(
    first: int, second: int, surge: Any, down: Any, recreate: bool, speed: list[int]
) -> None:
    strategy: Object = {"type": "Recreate"} if recreate else {
        "type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": down}
    }  # fmt: skip
    world = KubeWorld([deployments.CONTROLLER, replica_set.CONTROLLER])
    world.put(deployment(first, strategy=strategy))
    world.settle()
    world.put(deployment(first, "img:2", strategy=strategy))
    most = resolve_count(surge, first, round_up=True)
    least = resolve_count(down, first, round_up=False)
    least = least if most or least else 1

    def check() -> None:
        alive = [pod for pod in world.all(PODS) if not pod["metadata"].get("deletionTimestamp")]
        if recreate:
            assert len({pod["spec"]["containers"][0]["image"] for pod in world.all(PODS)}) <= 1
        else:
            assert len(alive) <= first + most
            assert sum(map(is_ready, alive)) >= first - least

    world.after_action = check
    for ready in speed:
        world.reconcile()
        world.run_pods(limit=ready)
    world.settle()
    world.after_action = lambda: None
    world.put(deployment(second, "img:2", strategy=strategy))
    world.settle()
    assert_idle(world)
    pods = world.all(PODS)
    assert len(pods) == second
    assert {pod["spec"]["containers"][0]["image"] for pod in pods} <= {"img:2"}
    found = world.get(DEPLOYMENTS, "web", "default")
    assert found is not None
    assert (found["status"]["updatedReplicas"], found["status"]["availableReplicas"]) == (second, second)
    assert sum(entry["spec"]["replicas"] for entry in world.all(REPLICA_SETS)) == second
    assert found["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "2"


def test_going_back_reuses_the_old_replica_set_and_its_revision_grows() -> None:
    world = KubeWorld([deployments.CONTROLLER, replica_set.CONTROLLER])
    for image in ("img:1", "img:2", "img:1"):
        world.put(deployment(2, image))
        world.settle()
    found = world.get(DEPLOYMENTS, "web", "default")
    assert found is not None and found["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "3"
    assert len(world.all(REPLICA_SETS)) == 2


def test_history_keeps_what_pods_use_and_five_more() -> None:
    world = KubeWorld([rbg.CONTROLLER])
    for number in range(12):
        world.put(group(role("a", 2, f"img:{number}")))
        world.settle()
    history = world.all(CONTROLLER_REVISIONS)
    assert len(history) == 6
    assert max(entry["revision"] for entry in history) == 12
    world.put(group(role("a", 2, "img:8")))
    world.settle()
    assert max(entry["revision"] for entry in world.all(CONTROLLER_REVISIONS)) == 13


def test_a_pass_does_not_depend_on_the_order_of_what_it_sees() -> None:
    world = KubeWorld([rbg.CONTROLLER])
    world.put(group(role("a", 3), role("b", 2, dependencies=["a"])))
    world.settle()
    world.put(group(role("a", 3, "img:2"), role("b", 4, dependencies=["a"])))
    observed = rbg.observe(world, "default/g")
    assert observed is not None
    turned = copy.deepcopy(observed)
    turned.pods.reverse()
    turned.services.reverse()
    assert rbg.reconcile(observed, world.now) == rbg.reconcile(turned, world.now)
