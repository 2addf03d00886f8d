"""Where pods go, and what a pod that fits nowhere is told, in Kubernetes' words."""

from __future__ import annotations

from typing import Any

import pytest
from tests.fakes.kube_world import KubeWorld

from baton.api.resources import PODS
from baton.controllers.placement import scheduler
from baton.controllers.placement.place import place

Object = dict[str, Any]


def node(
    name: str, *, labels: dict[str, str] | None = None, taints: list[Object] | None = None, **resources: str
) -> Object:
    found = {key.replace("gpu", "nvidia.com/gpu"): value for key, value in resources.items()}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
        "spec": {"taints": taints or []},
        "status": {"allocatable": {"cpu": "4", "memory": "16Gi", **found}},
    }


def pod(
    name: str, on: str = "", *, labels: dict[str, str] | None = None, limits: Object | None = None, **spec: Any
) -> Object:
    spec.setdefault("containers", [{"name": "c", "image": "i", "resources": {"limits": limits or {}}}])
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": labels or {}},
        "spec": {**spec, **({"nodeName": on} if on else {})},
    }


GPU2 = {"nvidia.com/gpu": "2"}


def term(key: str, **labels: str) -> Object:
    return {"topologyKey": key, "labelSelector": {"matchLabels": labels}}


def required(kind: str, *terms: Object) -> Object:
    return {kind: {"requiredDuringSchedulingIgnoredDuringExecution": list(terms)}}


def test_extended_resources_are_counted_over_what_runs() -> None:
    nodes = [node("a", gpu="4"), node("b", gpu="2")]
    running = [pod("x", "a", limits=GPU2), pod("y", "a", limits=GPU2)]
    assert place(pod("p", limits=GPU2), nodes, running).node == "b"
    full = [*running, pod("z", "b", limits=GPU2)]
    found = place(pod("p", limits=GPU2), nodes, full)
    assert (found.node, found.message) == (None, "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.")


def test_finished_pods_hold_nothing() -> None:
    done = {**pod("x", "a", limits=GPU2), "status": {"phase": "Succeeded"}}
    assert place(pod("p", limits=GPU2), [node("a", gpu="2")], [done]).node == "a"


def test_init_containers_count_by_their_maximum() -> None:
    wanted = pod("p", containers=[{"name": "c", "resources": {"requests": {"cpu": "1"}}}],
                 initContainers=[{"name": "i", "resources": {"requests": {"cpu": "5"}}}])  # fmt: skip
    assert "Insufficient cpu" in place(wanted, [node("a")], []).message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"nodeSelector": {"zone": "x"}}, "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."),
        ({"limits": {"cpu": "5", "memory": "20Gi"}}, "0/1 nodes are available: 1 Insufficient cpu, 1 Insufficient memory."),
        ({"affinity": required("podAffinity", term("kubernetes.io/hostname", app="db"))}, "0/1 nodes are available: 1 node(s) didn't match pod affinity rules."),
        ({"affinity": required("podAntiAffinity", term("kubernetes.io/hostname", app="web"))}, "0/1 nodes are available: 1 node(s) didn't match pod anti-affinity rules."),
        ({"labels": {"role": "loud"}}, "0/1 nodes are available: 1 node(s) didn't satisfy existing pods anti-affinity rules."),
    ],
)  # fmt: skip
def test_reasons(spec: Object, message: str) -> None:
    shy = pod(
        "s",
        "a",
        labels={"app": "web"},
        affinity=required("podAntiAffinity", term("kubernetes.io/hostname", role="loud")),
    )
    assert place(pod("p", **spec), [node("a")], [shy]).message == message


def test_no_nodes_taints_and_cordons() -> None:
    assert place(pod("p"), [], []).message == "no nodes available to schedule pods"
    tainted = node("a", taints=[{"key": "gpu", "value": "yes", "effect": "NoSchedule"}])
    assert (
        place(pod("p"), [tainted], []).message == "0/1 nodes are available: 1 node(s) had untolerated taint {gpu: yes}."
    )
    assert place(pod("p", tolerations=[{"key": "gpu", "operator": "Exists"}]), [tainted], []).node == "a"
    cordoned = {**node("b"), "spec": {"unschedulable": True}}
    assert place(pod("p"), [tainted, cordoned], []).message == (
        "0/2 nodes are available: 1 node(s) had untolerated taint {gpu: yes}, 1 node(s) were unschedulable."
    )


def test_topology_keys_reach_over_nodes() -> None:
    nodes = [node("a1", labels={"rack": "a"}), node("a2", labels={"rack": "a"}), node("b1", labels={"rack": "b"})]
    web = pod("w", "a1", labels={"app": "web"})
    near = pod("n", affinity=required("podAffinity", term("rack", app="web")))
    far = pod("f", affinity=required("podAntiAffinity", term("rack", app="web")))
    full = [web, pod("big", "a1", limits={"cpu": "4"})]
    assert (
        place(
            {**near, "spec": {**near["spec"], "containers": [{"name": "c", "resources": {"limits": {"cpu": "2"}}}]}},
            nodes,
            full,
        ).node
        == "a2"
    )
    assert place(far, nodes, [web]).node == "b1"


def test_the_first_of_a_self_affine_group_may_go_anywhere() -> None:
    affine = pod("p", labels={"app": "x"}, affinity=required("podAffinity", term("rack", app="x")))
    assert place(affine, [node("a", labels={"rack": "1"})], []).node == "a"
    assert place(affine, [node("a")], []).node is None  # a node without the key is no place at all


def test_node_affinity_expressions() -> None:
    nodes = [node("a", labels={"gen": "3"}), node("b", labels={"gen": "5"})]
    expression = {"key": "gen", "operator": "Gt", "values": ["4"]}
    affinity = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [expression]}]
            }
        }
    }
    assert place(pod("p", affinity=affinity), nodes, []).node == "b"
    preferred = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": 1, "preference": {"matchExpressions": [{"key": "gen", "operator": "In", "values": ["5"]}]}}]}}  # fmt: skip
    assert place(pod("p", affinity=preferred), nodes, []).node == "b"


def test_pods_spread() -> None:
    nodes = [node("a"), node("b")]
    assert place(pod("p", limits={"cpu": "1"}), nodes, [pod("x", "a", limits={"cpu": "1"})]).node == "b"


def test_a_pass_never_overbooks_and_says_why_once() -> None:
    world = KubeWorld([scheduler.CONTROLLER])
    world.put(node("a", gpu="4"))
    for index in range(3):
        world.put(pod(f"p{index}", limits=GPU2))
    assert world.reconcile()
    assert [p["spec"].get("nodeName") for p in world.all(PODS)] == ["a", "a", None]
    assert [note.reason for _, note in world.notes] == ["Scheduled", "Scheduled", "FailedScheduling"]
    assert not world.reconcile()
    world.terminate()
    world.delete(PODS, "default", "p0")
    world.terminate()
    assert world.reconcile()
    assert world.get(PODS, "p2", "default")["spec"]["nodeName"] == "a"  # type: ignore[index]


def test_a_pod_waits_for_its_claim() -> None:
    world = KubeWorld([scheduler.CONTROLLER])
    world.put(node("a"))
    world.put(pod("p", volumes=[{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]))
    world.reconcile()
    assert [note.message for _, note in world.notes] == ['persistentvolumeclaim "c" not found']
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "c"}, "spec": {}}
    world.put({**claim, "status": {"phase": "Pending"}})
    world.reconcile()
    assert world.notes[-1][1].message == 'pod has unbound immediate PersistentVolumeClaims: "c"'
    world.set_status(world.put(claim), {"phase": "Bound"})
    world.reconcile()
    assert world.get(PODS, "p", "default")["spec"]["nodeName"] == "a"  # type: ignore[index]
