"""What a group's objects look like: labels, env and names of both eras, the discovery file, endpoints."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from tests.controllers.builders import group, role
from tests.fakes.kube_world import KubeWorld

from baton.api import convert
from baton.api.resources import CONFIG_MAPS, ENDPOINT_SLICES, PODS, SERVICES
from baton.controllers.network import endpoints
from baton.controllers.rbg import group as rbg

Object = dict[str, Any]
OLD = {
    "apiVersion": "workloads.x-k8s.io/v1alpha1",
    "kind": "RoleBasedGroup",
    "metadata": {"name": "sglang-pd", "namespace": "default"},
    "spec": {
        "roles": [
            {
                "name": "prefill",
                "replicas": 2,
                "servicePorts": [{"name": "Http-Api", "port": 8000}],
                "template": {
                    "metadata": {"labels": {"mine": "yes"}, "annotations": {"note": "n"}},
                    "spec": {
                        "containers": [{"name": "c", "image": "i", "env": [{"name": "ROLE_NAME", "value": "own"}]}]
                    },
                },
            }
        ]
    },
}


def settled(obj: Object) -> KubeWorld:
    world = KubeWorld([rbg.CONTROLLER, endpoints.CONTROLLER])
    world.put(convert(obj, "v1alpha2"))
    world.settle()
    return world


def get(world: KubeWorld, resource: Any, name: str) -> Object:
    found = world.get(resource, name, "default")
    assert found is not None, (
        f"no {resource.kind} {name}; there are {[o['metadata']['name'] for o in world.all(resource)]}"
    )
    return found


def test_a_pod_of_the_first_era() -> None:
    pod = get(settled(OLD), PODS, "sglang-pd-prefill-1")
    assert (pod["spec"]["hostname"], pod["spec"]["subdomain"]) == ("sglang-pd-prefill-1", "sglang-pd-prefill")
    found = pod["metadata"]["labels"]
    wanted = {
        "rolebasedgroup.workloads.x-k8s.io/name": "sglang-pd",
        "rolebasedgroup.workloads.x-k8s.io/role": "prefill",
        "rbg.workloads.x-k8s.io/group-name": "sglang-pd",
        "rbg.workloads.x-k8s.io/role-name": "prefill",
        "rbg.workloads.x-k8s.io/group-uid": "da7f1e6a10200091241a095d17aad3b3a8986e3f",
        "apps.kubernetes.io/pod-index": "1",
        "mine": "yes",
    }
    assert {key: found.get(key) for key in wanted} == wanted
    assert pod["metadata"]["annotations"] == {"note": "n"}
    env = pod["spec"]["containers"][0]["env"]
    assert [entry["name"] for entry in env] == [
        "RBG_GROUP_NAME",
        "RBG_ROLE_INDEX",
        "RBG_ROLE_NAME",
        "GROUP_NAME",
        "ROLE_INDEX",
        "ROLE_NAME",
    ]
    assert env[-1] == {"name": "ROLE_NAME", "value": "own"}, "the author's own value is kept"
    assert env[1]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['apps.kubernetes.io/pod-index']"
    assert pod["spec"]["containers"][0]["volumeMounts"] == [
        {"name": "rbg-cluster-config", "mountPath": "/etc/rbg", "readOnly": True}
    ]


def test_a_pod_of_the_second_era() -> None:
    pod = get(settled(group(role("a", 2))), PODS, "g-a-1")
    assert pod["spec"]["subdomain"] == "s-g-a"
    names = [entry["name"] for entry in pod["spec"]["containers"][0]["env"]]
    assert names[:6] == [
        "RBG_COMPONENT_INDEX",
        "RBG_COMPONENT_NAME",
        "RBG_GROUP_NAME",
        "RBG_ROLE_INDEX",
        "RBG_ROLE_INSTANCE_NAME",
        "RBG_ROLE_NAME",
    ]
    assert pod["metadata"]["labels"]["rbg.workloads.x-k8s.io/role-instance-index"] == "1"


@pytest.mark.parametrize("obj", [OLD, group(role("prefill", 2), name="sglang-pd")], ids=["v1alpha1", "v1alpha2"])
def test_every_pod_has_a_name_under_the_services_of_both_eras(obj: Object) -> None:
    world = settled(obj)
    for service in ("sglang-pd-prefill", "s-sglang-pd-prefill"):
        spec = get(world, SERVICES, service)["spec"]
        assert (spec["clusterIP"], spec["publishNotReadyAddresses"]) == ("None", True)
        slices = [
            s for s in world.all(ENDPOINT_SLICES) if s["metadata"]["labels"]["kubernetes.io/service-name"] == service
        ]
        hosts = {e["hostname"]: e["addresses"] for s in slices for e in s["endpoints"] if "hostname" in e}
        assert hosts == {
            f"sglang-pd-prefill-{i}": [get(world, PODS, f"sglang-pd-prefill-{i}")["status"]["podIP"]] for i in range(2)
        }


def test_the_discovery_file_has_upstreams_shape_and_follows_sizes() -> None:
    world = settled(OLD)
    text = get(world, CONFIG_MAPS, "sglang-pd")["data"]["config.yaml"]
    ports = {"ports": {"http_api": 8000}}
    assert yaml.safe_load(text) == {
        "group": {"name": "sglang-pd", "roles": ["prefill"], "size": 1},
        "roles": {
            "prefill": {
                "size": 2,
                "instances": [{"address": f"sglang-pd-prefill-{i}.sglang-pd-prefill", **ports} for i in range(2)],
            }
        },
    }
    pods = {pod["metadata"]["uid"] for pod in world.all(PODS)}
    bigger = convert(OLD, "v1alpha2")
    bigger["spec"]["roles"][0]["replicas"] = 3
    world.put(bigger)
    world.settle()
    assert yaml.safe_load(get(world, CONFIG_MAPS, "sglang-pd")["data"]["config.yaml"])["roles"]["prefill"]["size"] == 3
    assert pods < {pod["metadata"]["uid"] for pod in world.all(PODS)}, "scaling restarts nobody"


def test_shared_templates_are_patched_and_only_their_users_roll() -> None:
    def spec(image: str) -> Object:
        obj = group(
            {
                "name": "a",
                "standalonePattern": {
                    "templateRef": {"name": "t", "patch": {"spec": {"containers": [{"name": "c", "args": ["x"]}]}}}
                },
            },
            role("b"),
        )
        obj["spec"]["roleTemplates"] = [
            {"name": "t", "template": {"spec": {"containers": [{"name": "c", "image": image}]}}}
        ]
        return obj

    world = settled(spec("1"))
    container = get(world, PODS, "g-a-0")["spec"]["containers"][0]
    assert (container["image"], container["args"]) == ("1", ["x"])
    world.log.clear()
    world.put(spec("2"))
    world.settle()
    assert [line for line in world.log if " Pod " in line] == ["patch Pod g-a-0"]


def service(**spec: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "x"}, **spec},
    }


def pod(name: str, ip: str = "", *, ready: bool = True, ports: list[Object] | None = None) -> Object:
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "x"}},
        "spec": {"containers": [{"name": "c", "ports": ports or []}]},
        "status": {"phase": "Running", "conditions": conditions, **({"podIP": ip} if ip else {})},
    }


def slices_of(*objects: Object) -> list[tuple[list[Any], dict[str, bool]]]:
    world = KubeWorld([endpoints.CONTROLLER])
    for obj in objects:
        world.put(obj)
    while world.reconcile():
        pass
    return [
        ([p["port"] for p in s["ports"]], {e["addresses"][0]: e["conditions"]["ready"] for e in s["endpoints"]})
        for s in world.all(ENDPOINT_SLICES)
    ]


def test_endpoints_are_pods_with_addresses_and_their_readiness() -> None:
    ports = {"ports": [{"port": 80, "targetPort": 8000}]}
    pods = [pod("a", "127.0.0.1"), pod("b", "127.0.0.2", ready=False), pod("c")]
    assert slices_of(service(**ports), *pods) == [([8000], {"127.0.0.1": True, "127.0.0.2": False})]
    published = service(**ports, publishNotReadyAddresses=True)
    assert slices_of(published, *pods) == [([8000], {"127.0.0.1": True, "127.0.0.2": True})]
    assert slices_of(service(**ports)) == [([8000], {})]


def test_named_target_ports_may_differ_from_pod_to_pod() -> None:
    pods = [
        pod("a", "127.0.0.1", ports=[{"name": "http", "containerPort": 1000}]),
        pod("b", "127.0.0.2", ports=[{"name": "http", "containerPort": 2000}]),
        pod("c", "127.0.0.3"),
    ]
    found = slices_of(service(ports=[{"port": 80, "targetPort": "http"}]), *pods)
    assert sorted(found) == [([], {"127.0.0.3": True}), ([1000], {"127.0.0.1": True}), ([2000], {"127.0.0.2": True})]


def test_a_service_without_selector_is_left_alone() -> None:
    bare = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": {}}
    assert slices_of(bare, pod("a", "127.0.0.1")) == []
