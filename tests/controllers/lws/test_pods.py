"""What users and their programs see of a set's objects: names, owners, labels, annotations, environment, placement."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from tests.controllers.builders import leader_worker_set, pod_template
from tests.fakes.kube_world import KubeWorld

from baton.api.resources import CONTROLLER_REVISIONS, LEADER_WORKER_SETS, PERSISTENT_VOLUME_CLAIMS, PODS, SERVICES
from baton.controllers.lws import leader_worker_set as room
from baton.controllers.placement import scheduler

Object = dict[str, Any]
LWS = "leaderworkerset.sigs.k8s.io/"


def settled(obj: Object, *nodes: Object) -> KubeWorld:
    world = KubeWorld([room.CONTROLLER])
    for node in nodes:
        world.put(node)
    world.put(obj)
    world.settle()
    return world


def pod(world: KubeWorld, name: str) -> Object:
    found = world.get(PODS, name, "default")
    assert found is not None, world.pod_names()
    return found


def env(found: Object, container: int = 0) -> list[tuple[str, str]]:
    return [(entry["name"], entry["value"]) for entry in found["spec"]["containers"][container]["env"]]


def sha1(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def test_names_owners_and_host_names() -> None:
    world = settled(leader_worker_set(2, 3))
    assert world.pod_names() == ["x-0", "x-0-1", "x-0-2", "x-1", "x-1-1", "x-1-2"]
    (owner,) = pod(world, "x-1")["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["controller"]) == ("LeaderWorkerSet", "x", True)
    (owner,) = pod(world, "x-1-2")["metadata"]["ownerReferences"]
    assert (owner["apiVersion"], owner["kind"], owner["name"]) == ("v1", "Pod", "x-1")
    assert owner["uid"] == pod(world, "x-1")["metadata"]["uid"]
    spec = pod(world, "x-1-2")["spec"]
    assert (spec["hostname"], spec["subdomain"]) == ("x-1-2", "x")


def test_labels_and_annotations() -> None:
    world = settled(leader_worker_set(1, 2))
    (revision,) = world.all(CONTROLLER_REVISIONS)
    key = revision["metadata"]["labels"][LWS + "template-revision-hash"]
    leader, worker = pod(world, "x-0")["metadata"], pod(world, "x-0-1")["metadata"]
    shared = {
        LWS + "name": "x",
        LWS + "group-index": "0",
        LWS + "group-key": sha1("default/x-0"),
        LWS + "template-revision-hash": key,
        "app": "x",
    }
    assert leader["labels"] | shared | {LWS + "worker-index": "0"} == leader["labels"]
    assert worker["labels"] | shared | {LWS + "worker-index": "1"} == worker["labels"]
    assert leader["labels"]["apps.kubernetes.io/pod-index"] == "0"
    assert worker["labels"]["statefulset.kubernetes.io/pod-name"] == "x-0-1"
    assert (leader["annotations"][LWS + "size"], worker["annotations"][LWS + "size"]) == ("2", "2")
    assert worker["annotations"][LWS + "leader-name"] == "x-0"
    assert LWS + "leader-name" not in leader["annotations"]


def test_environment_comes_first_in_every_container_and_wins() -> None:
    template = pod_template()
    template["spec"]["containers"] += [
        {"name": "side", "image": "i", "env": [{"name": "A", "value": "$(LWS_GROUP_SIZE)"}]}
    ]
    template["spec"]["initContainers"] = [{"name": "init", "image": "i"}]
    template["spec"]["containers"][0]["env"] = [{"name": "LWS_WORKER_INDEX", "value": "7"}, {"name": "B", "value": "b"}]
    world = settled(leader_worker_set(2, 2, template={"workerTemplate": template}))
    own = [("LWS_LEADER_ADDRESS", "x-1.x.default"), ("LWS_GROUP_SIZE", "2")]
    assert env(pod(world, "x-1-1")) == [*own, ("LWS_WORKER_INDEX", "1"), ("B", "b")]
    assert env(pod(world, "x-1")) == [*own, ("LWS_WORKER_INDEX", "0"), ("B", "b")]
    assert env(pod(world, "x-1"), 1) == [*own, ("LWS_WORKER_INDEX", "0"), ("A", "$(LWS_GROUP_SIZE)")]
    init = pod(world, "x-1-1")["spec"]["initContainers"][0]
    assert [entry["name"] for entry in init["env"]] == ["LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX"]


def test_the_leader_has_its_own_template() -> None:
    leader = pod_template("leader:1")
    leader["metadata"]["labels"] = {"role": "leader"}
    world = settled(leader_worker_set(template={"leaderTemplate": leader}))
    assert pod(world, "x-0")["spec"]["containers"][0]["image"] == "leader:1"
    assert pod(world, "x-0")["metadata"]["labels"]["role"] == "leader"
    assert pod(world, "x-0-1")["spec"]["containers"][0]["image"] == "img:1"


def test_one_service_for_all_groups() -> None:
    world = settled(leader_worker_set(2))
    (service,) = world.all(SERVICES)
    assert service["metadata"]["name"] == "x"
    assert service["metadata"]["ownerReferences"][0]["kind"] == "LeaderWorkerSet"
    assert service["spec"] == {
        "clusterIP": "None", "publishNotReadyAddresses": True, "selector": {LWS + "name": "x"},
    }  # fmt: skip


def test_a_service_per_group_goes_with_its_leader() -> None:
    world = settled(leader_worker_set(2, networkConfig={"subdomainPolicy": "UniquePerReplica"}))
    services = {service["metadata"]["name"]: service for service in world.all(SERVICES)}
    assert sorted(services) == ["x-0", "x-1"]
    assert services["x-1"]["spec"]["selector"] == {LWS + "name": "x", LWS + "group-index": "1"}
    assert services["x-1"]["metadata"]["ownerReferences"][0]["uid"] == pod(world, "x-1")["metadata"]["uid"]
    worker = pod(world, "x-1-1")
    assert worker["spec"]["subdomain"] == "x-1"
    assert env(worker)[0] == ("LWS_LEADER_ADDRESS", "x-1.x-1.default")
    assert pod(world, "x-1")["metadata"]["annotations"][LWS + "subdomainPolicy"] == "UniquePerReplica"
    world.delete(PODS, "default", "x-1")
    world.settle()
    (again,) = [service for service in world.all(SERVICES) if service["metadata"]["name"] == "x-1"]
    assert again["metadata"]["ownerReferences"][0]["uid"] == pod(world, "x-1")["metadata"]["uid"]


def test_a_changed_subdomain_policy_rolls() -> None:
    world = settled(leader_worker_set(1))
    world.put(leader_worker_set(1, networkConfig={"subdomainPolicy": "UniquePerReplica"}))
    world.settle()
    assert pod(world, "x-0")["spec"]["subdomain"] == "x-0"
    assert [service["metadata"]["name"] for service in world.all(SERVICES)] == ["x", "x-0"]


def test_somebody_elses_service_of_that_name_is_left_alone() -> None:
    theirs = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"selector": {"a": "b"}}}
    world = KubeWorld([room.CONTROLLER])
    world.put(theirs)
    world.put(leader_worker_set(1))
    world.settle()
    (service,) = world.all(SERVICES)
    assert service["spec"] == {"selector": {"a": "b"}}
    assert len(world.pod_names()) == 2


@pytest.mark.parametrize(
    ("size", "subgroup", "policy", "expected"),
    [
        (4, 2, "LeaderWorker", ["0", "0", "1", "1"]),
        (5, 2, "LeaderWorker", ["0", "0", "0", "1", "1"]),
        (3, 1, "LeaderWorker", ["0", "1", "2"]),
        (5, 4, "LeaderWorker", ["0", "0", "0", "0", "0"]),
        (5, 2, "LeaderExcluded", [None, "0", "0", "1", "1"]),
    ],
)
def test_subgroups(size: int, subgroup: int, policy: str, expected: list[str | None]) -> None:
    parts = {"subGroupPolicy": {"subGroupSize": subgroup, "subGroupPolicyType": policy}}
    world = settled(leader_worker_set(1, size, template=parts))
    pods = [pod(world, "x-0"), *(pod(world, f"x-0-{index}") for index in range(1, size))]
    assert [one["metadata"]["labels"].get(LWS + "subgroup-index") for one in pods] == expected
    keys = [sha1(f"x-0/{index}") if index is not None else None for index in expected]
    assert [one["metadata"]["labels"].get(LWS + "subgroup-key") for one in pods] == keys
    assert {one["metadata"]["annotations"][LWS + "subgroup-size"] for one in pods} == {str(subgroup)}
    assert pods[0]["metadata"]["annotations"][LWS + "subgroup-policy-type"] == policy


def terms(found: Object, kind: str) -> list[Object]:
    return list(found["spec"]["affinity"][kind]["requiredDuringSchedulingIgnoredDuringExecution"])


def node(name: str, **labels: str) -> Object:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}


def placed(world: KubeWorld, name: str, where: str) -> None:
    world.patch(PODS, "default", name, {"spec": {"nodeName": where}})


def test_exclusive_topology_draws_a_group_to_its_leader() -> None:
    world = KubeWorld([room.CONTROLLER])
    world.put(node("n1", rack="r1"))
    world.put(leader_worker_set(1, annotations={LWS + "exclusive-topology": "rack"}))
    world.settle()
    assert world.pod_names() == ["x-0"], "workers wait until it is known where the leader is"
    key = sha1("default/x-0")
    mine = {"key": LWS + "group-key", "operator": "In", "values": [key]}
    others = [{"key": LWS + "group-key", "operator": "Exists"}, {**mine, "operator": "NotIn"}]
    assert terms(pod(world, "x-0"), "podAffinity") == [
        {"labelSelector": {"matchExpressions": [mine]}, "topologyKey": "rack"}
    ]
    assert terms(pod(world, "x-0"), "podAntiAffinity") == [
        {"labelSelector": {"matchExpressions": others}, "topologyKey": "rack"}
    ]
    placed(world, "x-0", "n1")
    world.settle()
    assert pod(world, "x-0-1")["spec"]["nodeSelector"] == {"rack": "r1"}
    assert "affinity" not in pod(world, "x-0-1")["spec"]
    assert pod(world, "x-0-1")["metadata"]["annotations"][LWS + "exclusive-topology"] == "rack"


def test_a_node_without_the_topology_label_is_named() -> None:
    world = KubeWorld([room.CONTROLLER])
    world.put(node("n1"))
    world.put(leader_worker_set(1, annotations={LWS + "exclusive-topology": "rack"}))
    world.settle()
    placed(world, "x-0", "n1")
    world.settle()
    found = world.get(LEADER_WORKER_SETS, "x", "default")
    assert found is not None and "node n1 has no label rack" in found["status"]["hold"]


def test_subgroup_topology_is_for_workers_too_and_other_terms_stay() -> None:
    mine = {"labelSelector": {"matchLabels": {"a": "b"}}, "topologyKey": "rack"}
    template = pod_template(affinity={"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [mine]}})
    world = settled(
        leader_worker_set(
            1,
            4,
            annotations={LWS + "subgroup-exclusive-topology": "rack"},
            template={"subGroupPolicy": {"subGroupSize": 2}, "workerTemplate": template},
        )
    )
    found = terms(pod(world, "x-0-3"), "podAffinity")
    assert found[0] == mine
    assert found[1]["labelSelector"]["matchExpressions"][0]["values"] == [sha1("x-0/1")]
    assert len(terms(pod(world, "x-0"), "podAntiAffinity")) == 1


def test_claims_follow_the_retention_policy() -> None:
    claims = {
        "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"]}}],
        "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete", "whenScaled": "Retain"},
    }
    world = settled(leader_worker_set(1, template=claims))
    assert pod(world, "x-0-1")["spec"]["volumes"] == [
        {"name": "data", "persistentVolumeClaim": {"claimName": "data-x-0-1"}}
    ]
    assert len(world.all(PERSISTENT_VOLUME_CLAIMS)) == 2
    world.delete(LEADER_WORKER_SETS, "default", "x")
    assert world.all(PERSISTENT_VOLUME_CLAIMS) == []


def tpu_template(*ports: str) -> Object:
    wants = {"limits": {"google.com/tpu": "4"}}
    containers = [
        {"name": f"c{index}", "image": "i", "resources": wants, "env": [{"name": "TPU_PROCESS_PORT", "value": port}] if port else []}
        for index, port in enumerate(ports)
    ]  # fmt: skip
    return {"spec": {"containers": containers}}


@pytest.mark.parametrize(
    ("parts", "size", "name", "expected"),
    [
        ({"workerTemplate": tpu_template("")}, 3, "x-0-2", ("x-0.x,x-0-1.x,x-0-2.x", "2", "x-0.x:8476,x-0-1.x:8476,x-0-2.x:8476")),
        ({"workerTemplate": tpu_template("")}, 2, "x-0", ("x-0.x,x-0-1.x", "0", "x-0.x:8476,x-0-1.x:8476")),
        ({"workerTemplate": tpu_template(""), "leaderTemplate": pod_template()}, 3, "x-0-1", ("x-0-1.x,x-0-2.x", "0", "x-0-1.x:8476,x-0-2.x:8476")),
        ({"workerTemplate": tpu_template("", "9")}, 2, "x-0-1", ("x-0.x,x-0.x,x-0-1.x,x-0-1.x", "2", "x-0.x:8476,x-0.x:9,x-0-1.x:8476,x-0-1.x:9")),
        ({"workerTemplate": tpu_template(""), "subGroupPolicy": {"subGroupSize": 2}}, 4, "x-0-3", ("x-0-2.x,x-0-3.x", "1", "x-0-2.x:8476,x-0-3.x:8476")),
        ({"workerTemplate": tpu_template(""), "leaderTemplate": pod_template(), "subGroupPolicy": {"subGroupSize": 2}}, 5, "x-0-3", ("x-0-3.x,x-0-4.x", "0", "x-0-3.x:8476,x-0-4.x:8476")),
    ],
)  # fmt: skip
def test_tpu_processes_find_each_other(parts: Object, size: int, name: str, expected: tuple[str, str, str]) -> None:
    found = pod(settled(leader_worker_set(1, size, template=parts)), name)
    values = dict(env(found))
    assert (values["TPU_WORKER_HOSTNAMES"], values["TPU_WORKER_ID"], values["TPU_PROCESS_ADDRESSES"]) == expected
    assert (values["TPU_NAME"], values["TPU_PROCESS_PORT"]) == ("x-0", "8476")
    assert env(found)[0][0] == "LWS_LEADER_ADDRESS"


def test_who_needs_no_tpu_variables_gets_none() -> None:
    world = settled(
        leader_worker_set(1, 2, template={"workerTemplate": tpu_template(""), "leaderTemplate": pod_template()})
    )
    assert "TPU_WORKER_ID" not in dict(env(pod(world, "x-0")))
    own = tpu_template("")
    own["spec"]["containers"][0]["env"] = [{"name": "TPU_WORKER_ID", "value": "5"}]
    world = settled(leader_worker_set(1, 2, template={"workerTemplate": own}))
    assert dict(env(pod(world, "x-0-1")))["TPU_WORKER_ID"] == "5"
    assert "TPU_NAME" not in dict(env(pod(world, "x-0-1")))
    assert pod(world, "x-0-1")["metadata"]["annotations"][LWS + "leader-requests-tpus"] == "true"


def test_exclusive_groups_share_no_domain_and_one_too_many_says_so() -> None:
    world = KubeWorld([room.CONTROLLER, scheduler.CONTROLLER])
    for number in range(4):
        ready = {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": {"cpu": "8", "pods": "9"}}
        world.put({**node(f"n{number}", rack=f"r{number % 2}"), "status": ready})
    world.put(leader_worker_set(3, 3, annotations={LWS + "exclusive-topology": "rack"}))
    for _ in range(12):
        world.reconcile()
        for one in world.all(PODS):
            if one["spec"].get("nodeName") and world.needs_kubelet(one):
                world.make_ready(one)
    racks: dict[str, set[int]] = {}
    for one in world.all(PODS):
        where = one["spec"].get("nodeName")
        racks.setdefault(one["metadata"]["labels"][LWS + "group-index"], set()).update(
            {int(where[1:]) % 2} if where else ()
        )
    assert sorted(map(len, racks.values())) == [0, 1, 1], racks
    assert len(set().union(*racks.values())) == 2
    found = world.get(LEADER_WORKER_SETS, "x", "default")
    assert found is not None and found["status"]["readyReplicas"] == 2
    assert "cannot be scheduled: 0/4 nodes are available" in found["status"]["hold"]
