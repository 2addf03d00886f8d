"""get -w, wait, rollout, describe and events with the real kubectl."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.cluster.apiserver.conftest import APPS, NS, Cluster, deployment, pod, stateful_set

JSON = dict[str, Any]


def set_status(cluster: Cluster, what: str, status: JSON) -> None:
    cluster.kubectl("patch", what, "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))


READY = {
    "phase": "Running",
    "podIP": "127.0.3.4",
    "conditions": [{"type": "Ready", "status": "True"}],
    "containerStatuses": [
        {"name": "c", "ready": True, "restartCount": 1, "image": "busybox:1", "imageID": "", "state": {"running": {}}}
    ],
}


def test_get_watch_prints_each_change(cluster: Cluster) -> None:
    cluster.create(f"{NS}/pods", pod("watched", nodeName="n0"))
    watching = cluster.start_kubectl("get", "pods", "-w")
    assert watching.stdout
    assert watching.stdout.readline().split()[:3] == ["NAME", "READY", "STATUS"]
    assert watching.stdout.readline().split()[:3] == ["watched", "0/1", "Pending"]
    set_status(cluster, "pod/watched", READY)
    assert watching.stdout.readline().split()[:4] == ["watched", "1/1", "Running", "1"]
    cluster.kubectl("delete", "pod", "watched", "--now", "--wait=false")
    assert "Terminating" in watching.stdout.readline()
    watching.terminate()
    watching.communicate(timeout=10)
    wide = cluster.kubectl("get", "pod", "watched", "-o", "wide").splitlines()[1].split()
    assert wide[5:7] == ["127.0.3.4", "n0"]


def test_wait_for_condition_deletion_and_creation(cluster: Cluster) -> None:
    cluster.create(f"{NS}/pods", pod("waited", nodeName="n0"))
    ready = cluster.start_kubectl("wait", "--for=condition=Ready", "pod/waited", "--timeout=20s")
    set_status(cluster, "pod/waited", READY)
    assert "condition met" in ready.communicate(timeout=15)[0]
    gone = cluster.start_kubectl("wait", "--for=delete", "pod/waited", "--timeout=20s")
    cluster.kubectl("delete", "pod", "waited", "--grace-period=0", "--force")
    gone.communicate(timeout=15)
    assert gone.returncode == 0
    created = cluster.start_kubectl("wait", "--for=create", "pod/later", "--timeout=20s")
    cluster.create(f"{NS}/pods", pod("later"))
    assert "condition met" in created.communicate(timeout=15)[0]


def test_rollout_status_follows_a_deployment_to_its_end(cluster: Cluster) -> None:
    cluster.create(f"{APPS}/deployments", deployment("rolled", 2))
    following = cluster.start_kubectl("rollout", "status", "deploy/rolled", "--timeout=20s")
    assert following.stdout
    assert "Waiting for deployment" in following.stdout.readline()
    counts = {"replicas": 2, "updatedReplicas": 2, "readyReplicas": 1, "availableReplicas": 1}
    set_status(cluster, "deploy/rolled", {"observedGeneration": 1, **counts})
    assert "1 of 2 updated replicas are available" in following.stdout.readline()
    set_status(cluster, "deploy/rolled", {"readyReplicas": 2, "availableReplicas": 2})
    assert "successfully rolled out" in following.communicate(timeout=15)[0]


def test_rollout_restart_history_and_undo_of_a_stateful_set(cluster: Cluster) -> None:
    made = cluster.create(f"{APPS}/statefulsets", stateful_set("ring"))
    for number, image in ((1, "busybox:1"), (2, "busybox:2")):
        template = {"spec": {"containers": [{"name": "c", "image": image}]}, "$patch": "replace"}
        template["metadata"] = {"labels": {"app": "ring"}}
        body = {
            "apiVersion": "apps/v1",
            "kind": "ControllerRevision",
            "metadata": {
                "name": f"ring-{number}",
                "labels": {"app": "ring"},
                "ownerReferences": [
                    {
                        "apiVersion": "apps/v1",
                        "kind": "StatefulSet",
                        "name": "ring",
                        "uid": made["metadata"]["uid"],
                        "controller": True,
                    }
                ],
            },
            "revision": number,
            "data": {"spec": {"template": template}},
        }
        cluster.create(f"{APPS}/controllerrevisions", body)
    cluster.kubectl("rollout", "restart", "sts/ring")
    template = cluster.get("sts", "ring")["spec"]["template"]
    assert "kubectl.kubernetes.io/restartedAt" in template["metadata"]["annotations"]
    assert cluster.kubectl("rollout", "history", "sts/ring").split()[-4:] == ["1", "<none>", "2", "<none>"]
    cluster.kubectl("rollout", "undo", "sts/ring", "--to-revision=2")
    template = cluster.get("sts", "ring")["spec"]["template"]
    assert template["spec"]["containers"][0]["image"] == "busybox:2"
    assert "annotations" not in template["metadata"]


def test_describe_shows_the_object_and_its_events(cluster: Cluster) -> None:
    made = cluster.create(f"{NS}/pods", pod("described", nodeName="n0"))
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": "described."},
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Pod",
            "name": "described",
            "namespace": "default",
            "uid": made["metadata"]["uid"],
        },
        "reason": "Pulled",
        "message": "Container image mapped to the host's python",
        "type": "Normal",
        "source": {"component": "node-agent"},
        "firstTimestamp": made["metadata"]["creationTimestamp"],
        "lastTimestamp": made["metadata"]["creationTimestamp"],
        "count": 1,
    }
    cluster.create(f"{NS}/events", event)
    text = cluster.kubectl("describe", "pod", "described")
    assert re.search(r"Node:\s+n0/", text)
    assert re.search(r"Image:\s+busybox:1", text)
    assert "node-agent  Container image mapped to the host's python" in text
    listed = cluster.kubectl("get", "events").splitlines()
    assert listed[0].split() == ["LAST", "SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE"]
    assert "pod/described" in listed[1]


def test_describe_of_workloads_services_and_nodes(cluster: Cluster) -> None:
    cluster.create(f"{APPS}/deployments", deployment("shown"))
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "shown"}}
    cluster.create(f"{NS}/services", {**service, "spec": {"selector": {"app": "shown"}, "ports": [{"port": 80}]}})
    slice_ = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "shown-1", "labels": {"kubernetes.io/service-name": "shown"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["127.0.5.5"], "conditions": {"ready": True}}],
        "ports": [{"port": 80}],
    }
    cluster.create("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", slice_)
    assert "127.0.5.5:80" in cluster.kubectl("describe", "svc", "shown")
    assert "1 desired" in cluster.kubectl("describe", "deploy", "shown")
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n7"}, "status": {"capacity": {"cpu": 4}}}
    node["status"]["conditions"] = [{"type": "Ready", "status": "True"}]
    cluster.create("/api/v1/nodes", node)
    assert "Ready" in cluster.kubectl("get", "node", "n7")
    assert "cpu:  4" in cluster.kubectl("describe", "node", "n7")
