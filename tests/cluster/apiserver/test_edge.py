"""The HTTP edge: authentication, body limits, media types, paths, discovery forms; and a second client library."""

from __future__ import annotations

import json
from typing import Any

import kubernetes_asyncio
import pytest
from kubernetes_asyncio.client import ApiException
from tests.cluster.apiserver.conftest import APPS, NS, TOKEN, Cluster, config_map, deployment, pod

JSON = dict[str, Any]


def test_nothing_without_the_token(cluster: Cluster) -> None:
    for token, path in ((None, "/api"), ("wrong", NS + "/pods"), (None, "/token/wrong/api"), (None, "/openapi/v3")):
        answer = cluster.http("GET", path, token=token)
        assert (answer.code, answer.json["reason"]) == (401, "Unauthorized"), path
    assert cluster.http("GET", "/readyz", token=None).raw == b"ok"
    assert cluster.http("GET", f"/token/{TOKEN}{NS}/pods", token=None).code == 200


def test_bodies_are_bounded(cluster: Cluster) -> None:
    big = b'{"a":"' + b"x" * (3 * 1024 * 1024) + b'"}'
    answer = cluster.http("POST", f"{NS}/configmaps", big)
    assert (answer.code, answer.json["reason"]) == (413, "RequestEntityTooLarge")
    assert cluster.http("GET", f"{NS}/configmaps").code == 200


def test_bodies_without_a_length_are_bounded_too(cluster: Cluster) -> None:
    connection = cluster.connect()
    chunks = (b"x" * 65536 for _ in range(64))
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    connection.request("POST", f"{NS}/configmaps", chunks, headers, encode_chunked=True)
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["reason"]) == (413, "RequestEntityTooLarge")
    connection.close()


@pytest.mark.parametrize(
    ("body", "content_type", "code", "text"),
    [
        (b"{", "application/json", 400, "error decoding body"),
        (b"[]", "application/json", 400, "must be an object"),
        (b'{"kind":"Pod","apiVersion":"v1"}', "application/json", 400, "cannot be handled as a ConfigMap"),
        (b"{}", "text/plain", 415, "accepted media types include: application/json, application/yaml"),
        (b"a: &x [1]\nb: *x", "application/yaml", 400, "anchors and aliases are not accepted"),
        (b"\tbad: yaml", "application/yaml", 400, "line 1"),
        (
            b'{"kind":"ConfigMap","apiVersion":"v1","metadata":[]}',
            "application/json",
            400,
            "metadata must be an object",
        ),
        (b'{"kind":"ConfigMap","apiVersion":"v1"}', "application/json", 422, "name or generateName is required"),
        (
            b'{"kind":"ConfigMap","apiVersion":"v1","metadata":{"name":"a","namespace":"b"}}',
            "application/json",
            400,
            "namespace",
        ),
    ],
)
def test_bad_bodies(cluster: Cluster, body: bytes, content_type: str, code: int, text: str) -> None:
    answer = cluster.http("POST", f"{NS}/configmaps", body, content_type=content_type)
    assert answer.code == code
    assert text in answer.json["message"]
    assert answer.json["kind"] == "Status"


def test_yaml_is_accepted_and_missing_content_type_is_json(cluster: Cluster) -> None:
    body = b"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: yaml}\ndata: {day: '2026-01-01'}\n"
    assert cluster.http("POST", f"{NS}/configmaps", body, content_type="application/yaml").code == 201
    raw = json.dumps(config_map("untyped")).encode()
    assert cluster.http("POST", f"{NS}/configmaps", raw, content_type=None).code == 201


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/nope", 404),
        ("GET", "/apis/nosuch.io/v1/things", 404),
        ("GET", f"{NS}/nosuch", 404),
        ("GET", f"{NS}/pods/x/nosuch", 404),
        ("PUT", f"{NS}/pods", 405),
        ("POST", "/api/v1/pods", 405),
        ("POST", f"{NS}/configmaps/x", 405),
        ("GET", "/api/v1/namespaces/default/nodes", 404),
    ],
)
def test_paths_that_lead_nowhere(cluster: Cluster, method: str, path: str, code: int) -> None:
    assert cluster.http(method, path, {} if method != "GET" else None).code == code


def test_discovery_in_both_forms(cluster: Cluster) -> None:
    accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json"
    answer = cluster.http("GET", "/apis", accept=accept)
    assert answer.headers["content-type"] == "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
    assert {i["metadata"]["name"] for i in answer.json["items"]} >= {"apps", "apiextensions.k8s.io", "events.k8s.io"}
    again = cluster.http("GET", "/apis", accept=accept, **{"If-None-Match": answer.headers["etag"]})
    assert (again.code, again.raw) == (304, b"")
    assert cluster.http("GET", "/api").json["versions"] == ["v1"]
    listed = {r["name"]: r for r in cluster.http("GET", "/api/v1").json["resources"]}
    assert listed["pods/log"]["verbs"] == ["get"]
    assert listed["nodes"]["namespaced"] is False
    assert cluster.http("GET", "/apis/apps").json["preferredVersion"]["groupVersion"] == "apps/v1"


def test_generate_name_and_metadata_of_the_server(cluster: Cluster) -> None:
    body = pod("x")
    body["metadata"] = {"generateName": "web-", "uid": "mine", "creationTimestamp": "2000-01-01T00:00:00Z"}
    body["status"] = {"phase": "Running"}
    made = cluster.create(f"{NS}/pods", body)
    assert made["metadata"]["name"].startswith("web-") and len(made["metadata"]["name"]) == 9
    assert made["metadata"]["uid"] != "mine"
    assert made["metadata"]["creationTimestamp"] > "2020"
    assert made["metadata"]["generation"] == 1
    assert made["status"] == {"phase": "Pending", "qosClass": "BestEffort"}


def test_binding_puts_a_pod_on_a_node_once(cluster: Cluster) -> None:
    cluster.create(f"{NS}/pods", pod("bound"))
    body = {
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": "bound"},
        "target": {"kind": "Node", "name": "n1"},
    }
    assert cluster.http("POST", f"{NS}/pods/bound/binding", body).code == 201
    found = cluster.http("GET", f"{NS}/pods/bound").json
    assert found["spec"]["nodeName"] == "n1"
    assert found["status"]["conditions"][0]["type"] == "PodScheduled"
    body["target"]["name"] = "n2"
    assert cluster.http("POST", f"{NS}/pods/bound/binding", body).code == 409
    assert cluster.http("GET", f"{NS}/pods?fieldSelector=spec.nodeName%3Dn1").json["items"]


def test_services_get_addresses_of_their_own(cluster: Cluster) -> None:
    def service(name: str, **spec: Any) -> JSON:
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"ports": [{"port": 80}], **spec},
        }

    one, two = cluster.create(f"{NS}/services", service("one")), cluster.create(f"{NS}/services", service("two"))
    assert one["spec"]["clusterIP"].startswith("127.96.")
    assert one["spec"]["clusterIP"] != two["spec"]["clusterIP"]
    taken = cluster.http("POST", f"{NS}/services", service("three", clusterIP=one["spec"]["clusterIP"]))
    assert "provided IP is already allocated" in taken.json["message"]
    headless = cluster.create(f"{NS}/services", service("four", clusterIP="None"))
    assert headless["spec"]["clusterIPs"] == ["None"]
    cluster.http("DELETE", f"{NS}/services/one")
    cluster.create(f"{NS}/services", service("five", clusterIP=one["spec"]["clusterIP"]))
    replaced = cluster.http("PUT", f"{NS}/services/two", service("two"))
    assert replaced.json["spec"]["clusterIP"] == two["spec"]["clusterIP"]


def test_events_are_one_object_in_two_groups(cluster: Cluster) -> None:
    body = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": "e1"},
        "involvedObject": {"kind": "Pod", "name": "web", "namespace": "default", "uid": "u"},
        "reason": "Started",
        "message": "Started container",
        "type": "Normal",
        "firstTimestamp": "2026-01-01T00:00:00Z",
        "lastTimestamp": "2026-01-01T00:00:00Z",
        "count": 2,
    }
    cluster.create(f"{NS}/events", body)
    other = cluster.http("GET", "/apis/events.k8s.io/v1/namespaces/default/events/e1").json
    assert (other["regarding"]["name"], other["note"], other["deprecatedCount"]) == ("web", "Started container", 2)
    selector = "involvedObject.name%3Dweb,involvedObject.kind%3DPod"
    assert len(cluster.http("GET", f"{NS}/events?fieldSelector={selector}").json["items"]) == 1
    assert "Started container" in cluster.kubectl("events")
    assert "Pod/web" in cluster.kubectl("events")


async def test_a_client_library_that_is_not_ours(cluster: Cluster) -> None:
    await kubernetes_asyncio.config.load_kube_config(str(cluster.kubeconfig))
    async with kubernetes_asyncio.client.ApiClient() as api:
        core, apps = kubernetes_asyncio.client.CoreV1Api(api), kubernetes_asyncio.client.AppsV1Api(api)
        made = await apps.create_namespaced_deployment("default", deployment("library"))
        assert made.spec.replicas == 1
        patch = [{"op": "replace", "path": "/spec/replicas", "value": 4}]
        changed = await apps.patch_namespaced_deployment("library", "default", patch)
        assert changed.metadata.generation == 2
        with pytest.raises(ApiException) as refused:
            await apps.patch_namespaced_deployment(
                "library", "default", {"spec": {}}, _content_type="application/json-patch+json"
            )
        assert refused.value.status == 400
        assert "cannot unmarshal object into Go value of type []handlers.jsonPatchOp" in refused.value.body
        await core.create_namespaced_pod("default", pod("library"))
        watch = kubernetes_asyncio.watch.Watch()
        async with watch.stream(core.list_namespaced_pod, "default", timeout_seconds=5) as stream:
            async for event in stream:
                if event["object"].metadata.name == "library":
                    assert event["type"] == "ADDED"
                    break
        scale = await apps.read_namespaced_deployment_scale("library", "default")
        assert scale.spec.replicas == 4
        gone = await core.delete_namespaced_pod("library", "default")
        assert gone.metadata.name == "library"
        with pytest.raises(ApiException) as missing:
            await core.read_namespaced_pod("library", "default")
        assert missing.value.status == 404


def test_a_built_in_body_may_leave_its_type_to_the_url(cluster: Cluster) -> None:
    """As typed client libraries send it."""
    made = cluster.http("POST", f"{NS}/configmaps", {"metadata": {"name": "plain"}, "data": {"a": "1"}})
    assert (made.code, made.json["kind"], made.json["apiVersion"]) == (201, "ConfigMap", "v1")
    put = cluster.http("PUT", f"{NS}/configmaps/plain", {"metadata": {"name": "plain"}, "data": {"a": "2"}})
    assert (put.code, put.json["data"]) == (200, {"a": "2"})


async def test_exec_with_the_other_library(cluster: Cluster) -> None:
    cluster.create(f"{NS}/pods", pod("shell", nodeName="n0"))
    await kubernetes_asyncio.config.load_kube_config(str(cluster.kubeconfig))
    async with kubernetes_asyncio.stream.WsApiClient() as api:
        core = kubernetes_asyncio.client.CoreV1Api(api)
        out = await core.connect_get_namespaced_pod_exec(
            "shell", "default", command=["echo", "hi"], stdout=True, stderr=True, stdin=False, tty=False
        )
        assert out == "hi\n"


def test_selectors_in_every_form(cluster: Cluster) -> None:
    for name, tier in (("s1", "gold"), ("s2", "tin")):
        body = deployment(name)
        body["metadata"]["labels"] = {"tier": tier, "set": "sel"}
        cluster.create(f"{APPS}/deployments", body)
    table = {
        "tier=gold,set=sel": ["s1"],
        "tier!=gold,set=sel": ["s2"],
        "tier in (gold, tin),set": ["s1", "s2"],
        "tier notin (gold),set": ["s2"],
        "!tier,set=sel": [],
    }
    for selector, names in table.items():
        found = cluster.kubectl("get", "deploy", "-l", selector, "-o", "jsonpath={.items[*].metadata.name}")
        assert found.split("\n")[0].split() == names, selector
