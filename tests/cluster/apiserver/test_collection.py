"""Cascading deletion, namespaces, adoption: what the garbage collector does."""

from __future__ import annotations

from typing import Any

from tests.cluster.apiserver.conftest import NS, Cluster, config_map, pod

JSON = dict[str, Any]
MAPS = f"{NS}/configmaps"


def owned(name: str, *owners: JSON, blocks: bool = False) -> JSON:
    body = config_map(name)
    body["metadata"]["ownerReferences"] = [
        {
            "apiVersion": "v1",
            "kind": o["kind"],
            "name": o["metadata"]["name"],
            "uid": o["metadata"]["uid"],
            "blockOwnerDeletion": blocks,
        }
        for o in owners
    ]
    return body


def exists(cluster: Cluster, name: str) -> bool:
    return cluster.http("GET", f"{MAPS}/{name}").code == 200


def delete(cluster: Cluster, name: str, policy: str) -> JSON:
    answer = cluster.http("DELETE", f"{MAPS}/{name}", {"propagationPolicy": policy})
    assert answer.code == 200
    return answer.json


def test_background_takes_children_and_grandchildren(cluster: Cluster) -> None:
    parent = cluster.create(MAPS, config_map("bg"))
    child = cluster.create(MAPS, owned("bg-child", parent))
    cluster.create(MAPS, owned("bg-grandchild", child))
    assert delete(cluster, "bg", "Background")["status"] == "Success"
    cluster.eventually(lambda: not exists(cluster, "bg-child") and not exists(cluster, "bg-grandchild"))


def test_foreground_owner_goes_last(cluster: Cluster) -> None:
    parent = cluster.create(MAPS, config_map("fg"))
    child = owned("fg-child", parent, blocks=True)
    child["metadata"]["finalizers"] = ["a.io/hold"]
    cluster.create(MAPS, child)
    marked = delete(cluster, "fg", "Foreground")
    assert marked["metadata"]["finalizers"] == ["foregroundDeletion"]
    cluster.eventually(
        lambda: cluster.http("GET", f"{MAPS}/fg-child").json["metadata"].get("deletionTimestamp"), "child marked"
    )
    cluster.settle()
    assert exists(cluster, "fg")
    body = {"metadata": {"finalizers": None}}
    cluster.http("PATCH", f"{MAPS}/fg-child", body, content_type="application/merge-patch+json")
    cluster.eventually(lambda: not exists(cluster, "fg"))


def test_orphans_stay_without_their_owner(cluster: Cluster) -> None:
    parent = cluster.create(MAPS, config_map("op"))
    cluster.create(MAPS, owned("op-child", parent))
    cluster.kubectl("delete", "cm", "op", "--cascade=orphan")
    child = cluster.http("GET", f"{MAPS}/op-child").json
    assert "ownerReferences" not in child["metadata"]


def test_a_child_of_two_stays_with_the_one_that_is_left(cluster: Cluster) -> None:
    one, two = cluster.create(MAPS, config_map("one")), cluster.create(MAPS, config_map("two"))
    cluster.create(MAPS, owned("both", one, two))
    delete(cluster, "one", "Background")
    cluster.eventually(lambda: len(cluster.http("GET", f"{MAPS}/both").json["metadata"]["ownerReferences"]) == 1)
    delete(cluster, "two", "Background")
    cluster.eventually(lambda: not exists(cluster, "both"))


def test_a_child_of_nobody_is_collected(cluster: Cluster) -> None:
    ghost = {"kind": "ConfigMap", "metadata": {"name": "ghost", "uid": "no-such-uid"}}
    cluster.create(MAPS, owned("lost", ghost))
    cluster.eventually(lambda: not exists(cluster, "lost"))


def test_pods_of_a_deleted_owner_get_their_grace(cluster: Cluster) -> None:
    parent = cluster.create(MAPS, config_map("po"))
    body = pod("po-0", nodeName="n0")
    body["metadata"]["ownerReferences"] = owned("x", parent)["metadata"]["ownerReferences"]
    cluster.create(f"{NS}/pods", body)
    delete(cluster, "po", "Background")
    cluster.eventually(lambda: cluster.get("pod", "po-0")["metadata"].get("deletionTimestamp"))
    assert cluster.get("pod", "po-0")["metadata"]["deletionGracePeriodSeconds"] == 30


def test_deleting_a_namespace_empties_it(cluster: Cluster) -> None:
    cluster.kubectl("create", "ns", "doomed")
    cluster.create("/api/v1/namespaces/doomed/configmaps", config_map("inside"))
    cluster.create("/api/v1/namespaces/doomed/pods", pod("running", nodeName="n0"))
    waiting = cluster.start_kubectl("delete", "ns", "doomed")
    cluster.eventually(lambda: cluster.get("ns", "doomed")["status"]["phase"] == "Terminating")
    refused = cluster.http("POST", "/api/v1/namespaces/doomed/configmaps", config_map("late"))
    assert refused.code == 403
    assert "because it is being terminated" in refused.json["message"]
    assert waiting.poll() is None  # the pod's node has not let it go
    cluster.kubectl("delete", "pod", "running", "-n", "doomed", "--grace-period=0", "--force")
    waiting.communicate(timeout=10)
    assert waiting.returncode == 0
    assert "not found" in cluster.kubectl("get", "ns", "doomed", fails=True)


def test_first_namespaces_and_accounts(cluster: Cluster) -> None:
    names = cluster.kubectl("get", "ns", "-o", "name").split()
    assert {f"namespace/{n}" for n in ("default", "kube-system", "kube-public", "kube-node-lease")} <= set(names)
    assert "serviceaccount/default" in cluster.kubectl("get", "sa", "-o", "name")
    assert "may not be deleted" in cluster.kubectl("delete", "ns", "default", fails=True)
    missing = cluster.http("POST", "/api/v1/namespaces/nons/configmaps", config_map("x"))
    assert (missing.code, missing.json["message"]) == (404, 'namespaces "nons" not found')


def test_preconditions_guard_a_delete(cluster: Cluster) -> None:
    cluster.create(MAPS, config_map("guarded"))
    answer = cluster.http("DELETE", f"{MAPS}/guarded", {"preconditions": {"uid": "other"}})
    assert answer.code == 409
    assert "Precondition failed: UID in precondition: other" in answer.json["message"]
    assert exists(cluster, "guarded")


def test_no_new_finalizer_on_the_way_out(cluster: Cluster) -> None:
    body = config_map("leaving")
    body["metadata"]["finalizers"] = ["a.io/hold"]
    cluster.create(MAPS, body)
    delete(cluster, "leaving", "Background")
    late = {"metadata": {"finalizers": ["a.io/hold", "b.io/more"]}}
    answer = cluster.http("PATCH", f"{MAPS}/leaving", late, content_type="application/merge-patch+json")
    assert answer.code == 422
    assert "no new finalizers can be added if the object is being deleted" in answer.json["message"]


def test_delete_collection_takes_what_the_selector_shows(cluster: Cluster) -> None:
    for name, tier in (("c1", "x"), ("c2", "x"), ("c3", "y")):
        body = config_map(name)
        body["metadata"]["labels"] = {"tier": tier}
        cluster.create(MAPS, body)
    answer = cluster.http("DELETE", f"{MAPS}?labelSelector=tier%3Dx")
    assert [o["metadata"]["name"] for o in answer.json["items"]] == ["c1", "c2"]
    assert [exists(cluster, n) for n in ("c1", "c2", "c3")] == [False, False, True]
