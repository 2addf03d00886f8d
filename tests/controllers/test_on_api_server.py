"""The controllers and their runner against the embedded API server, as they run in a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.controllers.conftest import Bench

from baton.api.resources import (
    CONFIG_MAPS,
    CUSTOM_RESOURCE_DEFINITIONS,
    DEPLOYMENTS,
    ENDPOINT_SLICES,
    EVENTS,
    LEADER_WORKER_SETS,
    PERSISTENT_VOLUME_CLAIMS,
    PODS,
    ROLE_BASED_GROUPS,
    ROLE_BASED_GROUPS_V1ALPHA1,
    SERVICES,
    STATEFUL_SETS,
    resource_of,
)

SHARED = Path(__file__).parents[3] / "shared" / "manifests"


def documents(name: str) -> list[dict[str, Any]]:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return [doc for doc in yaml.safe_load_all(path.read_text()) if doc]


async def create(bench: Bench, docs: list[dict[str, Any]]) -> None:
    for doc in docs:
        await bench.client.create(resource_of(doc), doc, doc["metadata"].get("namespace", "default"))


def pod_names(bench: Bench) -> list[str]:
    return [pod["metadata"]["name"] for pod in bench.pods.list()]


async def endpoint_addresses(bench: Bench, service: str) -> list[str]:
    wanted = f"kubernetes.io/service-name={service}"
    slices = await bench.client.list(ENDPOINT_SLICES, "default", label_selector=wanted)
    return [address for one in slices.items for e in one["endpoints"] for address in e["addresses"]]


def address_of(bench: Bench, pod: str) -> str:
    found = bench.pods.get(pod, "default")
    assert found is not None
    return str(found["status"]["podIP"])


async def test_the_pd_manifest_runs_scales_updates_in_place_and_goes(bench: Bench) -> None:
    await create(bench, documents("llm-model.yaml") + documents("sglang_pd.yaml"))
    await bench.until(lambda: bench.is_settled("sglang-pd"))
    names = ["sglang-pd-decode-0", "sglang-pd-prefill-0", "sglang-pd-prefill-1", "sglang-pd-scheduler-0"]
    assert pod_names(bench) == names
    claim = await bench.client.get(PERSISTENT_VOLUME_CLAIMS, "llm-model", "default")
    assert (claim["status"]["phase"], claim["spec"]["volumeName"]) == ("Bound", "llm-model")
    old = await bench.client.get(ROLE_BASED_GROUPS_V1ALPHA1, "sglang-pd", "default")
    assert old["spec"]["roles"][1]["template"]["spec"]["containers"][0]["name"] == "sglang-prefill"
    assert old["status"]["pods"] == "4/4"
    while await endpoint_addresses(bench, "sglang-pd") != [address_of(bench, "sglang-pd-scheduler-0")]:
        await bench.runner_turn()

    uids = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in bench.pods.list()}
    # the two edits people make, through the version they wrote
    patch: Any = [
        {"op": "replace", "path": "/spec/roles/1/replicas", "value": 3},
        {"op": "replace", "path": "/spec/roles/1/template/spec/containers/0/image", "value": "new"},
    ]
    await bench.client.patch(ROLE_BASED_GROUPS_V1ALPHA1, "sglang-pd", "default", patch, kind="json")
    await bench.until(lambda: len(pod_names(bench)) == 5 and bench.is_settled("sglang-pd"))
    for name in names:
        pod = bench.pods.get(name, "default")
        assert pod is not None and pod["metadata"]["uid"] == uids[name]
    prefill = bench.pods.get("sglang-pd-prefill-0", "default")
    assert prefill is not None
    assert (prefill["spec"]["containers"][0]["image"], prefill["status"]["containerStatuses"][0]["restartCount"]) == (
        "new",
        1,
    )

    await bench.client.delete(ROLE_BASED_GROUPS, "sglang-pd", "default")
    await bench.until(lambda: not pod_names(bench))
    await bench.until(lambda: bench.groups.get("sglang-pd", "default") is None)


async def test_etcd_and_nats_become_ready(bench: Bench) -> None:
    await create(bench, documents("etcd.yaml") + documents("nats.yaml"))
    await bench.until(
        lambda: (
            len(bench.pods.list()) == 2
            and all("status" in pod and pod["status"].get("podIP") for pod in bench.pods.list())
        )
    )
    assert pod_names(bench)[0] == "etcd-0"

    async def ready() -> tuple[Any, Any]:
        etcd = await bench.client.get(STATEFUL_SETS, "etcd", "default")
        nats = await bench.client.get(DEPLOYMENTS, "nats", "default")
        return etcd.get("status", {}).get("readyReplicas"), nats.get("status", {}).get("availableReplicas")

    while await ready() != (1, 1):
        await bench.runner_turn()


@pytest.mark.parametrize("name", ["sglang-multi-nodes", "vllm-multi-nodes"])
async def test_multi_node_manifests_come_up_behind_their_service_restart_and_go(bench: Bench, name: str) -> None:
    documents_of = documents(f"{name.partition('-')[0]}_multi.yaml")
    await create(bench, documents("llm-model.yaml") + documents_of)

    async def conditions() -> dict[str, str]:
        found = await bench.client.get(LEADER_WORKER_SETS, name, "default")
        return {entry["type"]: entry["status"] for entry in (found.get("status") or {}).get("conditions") or []}

    while (await conditions()).get("Available") != "True":
        await bench.runner_turn()
    assert pod_names(bench) == [f"{name}-0", f"{name}-0-1"]
    leader = bench.pods.get(f"{name}-0", "default")
    assert leader is not None
    env = {entry["name"]: entry["value"] for entry in leader["spec"]["containers"][0]["env"]}
    assert env == {"LWS_LEADER_ADDRESS": f"{name}-0.{name}.default", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0"}
    label = "kubernetes.io/service-name=multi-nodes-service"
    while not [
        s for s in (await bench.client.list(ENDPOINT_SLICES, "default", label_selector=label)).items if s["endpoints"]
    ]:
        await bench.runner_turn()

    before = {pod["metadata"]["uid"] for pod in bench.pods.list()}
    await bench.client.delete(PODS, f"{name}-0-1", "default")
    await bench.until(
        lambda: len(pod_names(bench)) == 2 and not before & {pod["metadata"]["uid"] for pod in bench.pods.list()}
    )
    await bench.client.delete(LEADER_WORKER_SETS, name, "default")
    await bench.until(lambda: not pod_names(bench))


async def test_a_crd_without_our_status_field_is_no_reason_to_write_for_ever(bench: Bench) -> None:
    """Upstream's CRD may be the installed one: its schema drops `status.hold`."""
    crd = "leaderworkersets.leaderworkerset.x-k8s.io"
    closed = {"type": "object", "properties": {
        "observedGeneration": {"type": "integer"}, "replicas": {"type": "integer"}, "hpaPodSelector": {"type": "string"},
        "readyReplicas": {"type": "integer"}, "updatedReplicas": {"type": "integer"},
        "conditions": {"type": "array", "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
    }}  # fmt: skip
    path = "/spec/versions/0/schema/openAPIV3Schema/properties/status"
    await bench.client.patch(
        CUSTOM_RESOURCE_DEFINITIONS, crd, None, [{"op": "replace", "path": path, "value": closed}], kind="json"
    )
    bench.ready_pods = False
    template = {"spec": {"containers": [{"name": "c", "image": "i"}]}}
    await create(bench, [{
        "apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "metadata": {"name": "x"},
        "spec": {"leaderWorkerTemplate": {"size": 2, "workerTemplate": template}},
    }])  # fmt: skip
    await bench.until(lambda: len(bench.pods.list()) == 2 and all(p["spec"].get("nodeName") for p in bench.pods.list()))
    quiet = 0
    for _ in range(200):
        before = bench.client.num_requests
        await bench.runner_turn()
        quiet = quiet + 1 if bench.runner.is_idle and bench.client.num_requests == before + 1 else 0
        if quiet > 5:
            break
    assert quiet > 5
    found = await bench.client.get(LEADER_WORKER_SETS, "x", "default")
    assert "hold" not in found["status"] and found["status"]["replicas"] == 1


GROUP: dict[str, Any] = {
    "apiVersion": "workloads.x-k8s.io/v1alpha2",
    "kind": "RoleBasedGroup",
    "metadata": {"name": "g"},
    "spec": {
        "roles": [
            {
                "name": "a",
                "replicas": 2,
                "standalonePattern": {"template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}},
            }
        ]
    },
}


async def test_a_deleted_pod_comes_back_and_a_changed_service_is_put_right(bench: Bench) -> None:
    await create(bench, [GROUP])
    await bench.until(lambda: bench.is_settled("g"))
    before = bench.pods.get("g-a-1", "default")
    assert before is not None
    await bench.client.patch(
        SERVICES, "s-g-a", "default", {"spec": {"selector": {"rbg.workloads.x-k8s.io/role-name": "x"}}}
    )
    await bench.client.delete(PODS, "g-a-1", "default")
    await bench.until(
        lambda: (bench.pods.get("g-a-1", "default") or before)["metadata"]["uid"] != before["metadata"]["uid"]
    )
    await bench.until(lambda: bench.is_settled("g"))
    while (await bench.client.get(SERVICES, "s-g-a", "default"))["spec"]["selector"].get(
        "rbg.workloads.x-k8s.io/role-name"
    ) != "a":
        await bench.runner_turn()


async def test_a_pod_the_server_refuses_is_told_in_status_and_as_an_event(bench: Bench) -> None:
    bad = {**GROUP, "metadata": {"name": "bad"}, "spec": {"roles": [{
        "name": "a",
        "standalonePattern": {"template": {"spec": {"containers": [{"name": "c", "image": "i", "imagePullPolicy": "Sometimes"}]}}},
    }]}}  # fmt: skip
    await create(bench, [bad])
    await bench.until(lambda: "hold" in ((bench.groups.get("bad", "default") or {}).get("status") or {}))
    group = bench.groups.get("bad", "default")
    assert group is not None
    assert "imagePullPolicy" in group["status"]["hold"]
    assert group["status"]["roleStatuses"][0]["hold"]["gate"] == "Rejected"
    while not (events := (await bench.client.list(EVENTS, "default", field_selector="reason=FailedCreate")).items):
        await bench.runner_turn()
    assert "imagePullPolicy" in events[0]["message"]


async def test_what_is_not_supported_is_refused_with_its_path(bench: Bench) -> None:
    multi = {**GROUP, "metadata": {"name": "multi"}, "spec": {"roles": [{
        "name": "a",
        "leaderWorkerPattern": {"size": 2, "template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}},
    }]}}  # fmt: skip
    await create(bench, [multi])
    await bench.until(lambda: bench.group_condition("multi", "Accepted"))
    condition = bench.group_condition("multi", "Accepted")
    assert (condition["status"], condition["reason"]) == ("False", "InvalidSpec")
    assert "spec.roles[0].leaderWorkerPattern" in condition["message"]
    assert pod_names(bench) == []


async def test_somebody_elses_config_map_is_neither_changed_nor_waited_for_in_silence(bench: Bench) -> None:
    theirs = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "g"}, "data": {"mine": "1"}}
    await bench.client.create(CONFIG_MAPS, theirs, "default")
    await create(bench, [GROUP])
    await bench.until(lambda: "hold" in ((bench.groups.get("g", "default") or {}).get("status") or {}))
    group = bench.groups.get("g", "default")
    assert group is not None and "ConfigMap g exists" in group["status"]["hold"]
    await bench.client.delete(CONFIG_MAPS, "g", "default")
    await bench.until(lambda: bench.is_settled("g"))
