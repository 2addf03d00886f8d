"""Server-side apply: who owns what, on the wire. Cases follow Kubernetes' documented rules."""

from __future__ import annotations

from typing import Any

import pytest
from tests.cluster.apiserver.conftest import APPS, NS, Answer, Cluster, deployment

from baton.cluster.apiserver import fieldset
from baton.cluster.apiserver.schema_text import builtin_types

JSON = dict[str, Any]
APPLY = "application/apply-patch+yaml"


def apply(cluster: Cluster, path: str, body: JSON, manager: str, *, force: bool = False) -> Answer:
    query = f"fieldManager={manager}" + ("&force=true" if force else "")
    return cluster.http("PATCH", f"{path}?{query}", body, content_type=APPLY)


def applied(cluster: Cluster, path: str, body: JSON, manager: str, *, force: bool = False) -> JSON:
    answer = apply(cluster, path, body, manager, force=force)
    assert answer.code in (200, 201), answer.raw
    return answer.json


def config(name: str, **data: str) -> JSON:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def owners(obj: JSON) -> dict[tuple[str, str], JSON]:
    return {(e["manager"], e["operation"]): e["fieldsV1"] for e in obj["metadata"].get("managedFields", [])}


def test_apply_creates_and_owns_exactly_what_it_names(cluster: Cluster) -> None:
    answer = apply(cluster, f"{NS}/configmaps/made", config("made", a="1"), "alice")
    assert answer.code == 201
    assert owners(answer.json) == {("alice", "Apply"): {"f:data": {"f:a": {}}}}
    again = applied(cluster, f"{NS}/configmaps/made", config("made", a="1"), "alice")
    assert again["metadata"]["resourceVersion"] == answer.json["metadata"]["resourceVersion"]


def test_two_appliers_share_what_they_agree_on_and_clash_on_the_rest(cluster: Cluster) -> None:
    path = f"{NS}/configmaps/shared"
    applied(cluster, path, config("shared", a="1", b="1"), "alice")
    both = applied(cluster, path, config("shared", a="1", c="3"), "bob")
    assert owners(both)["bob", "Apply"] == {"f:data": {"f:a": {}, "f:c": {}}}
    clash = apply(cluster, path, config("shared", a="2"), "bob")
    assert (clash.code, clash.json["reason"]) == (409, "Conflict")
    assert clash.json["details"]["causes"] == [
        {"reason": "FieldManagerConflict", "message": 'conflict with "alice"', "field": ".data.a"}
    ]
    assert clash.json["message"] == 'Apply failed with 1 conflict: conflict with "alice": .data.a'
    forced = applied(cluster, path, config("shared", a="2"), "bob", force=True)
    assert forced["data"] == {"a": "2", "b": "1"}  # c was bob's alone and he let it go
    assert owners(forced) == {
        ("alice", "Apply"): {"f:data": {"f:b": {}}},
        ("bob", "Apply"): {"f:data": {"f:a": {}}},
    }


def test_letting_go_of_a_shared_field_keeps_it(cluster: Cluster) -> None:
    path = f"{NS}/configmaps/letgo"
    applied(cluster, path, config("letgo", a="1", b="1"), "alice")
    applied(cluster, path, config("letgo", a="1"), "bob")
    left = applied(cluster, path, config("letgo", b="1"), "alice")
    assert left["data"] == {"a": "1", "b": "1"}
    gone = applied(cluster, path, config("letgo"), "bob")
    assert gone["data"] == {"b": "1"}


def test_many_conflicts_are_listed_by_owner(cluster: Cluster) -> None:
    path = f"{NS}/configmaps/many"
    applied(cluster, path, config("many", a="1", b="1"), "alice")
    clash = apply(cluster, path, config("many", a="2", b="2"), "bob")
    assert clash.json["message"] == 'Apply failed with 2 conflicts: conflicts with "alice":\n- .data.a\n- .data.b'


def test_an_update_takes_the_fields_it_changes(cluster: Cluster) -> None:
    path = f"{NS}/configmaps/updated"
    applied(cluster, path, config("updated", a="1", b="1"), "alice")
    query = "?fieldManager=carol"
    cluster.http("PATCH", path + query, {"data": {"a": "9"}}, content_type="application/merge-patch+json")
    found = cluster.http("GET", path).json
    assert owners(found) == {
        ("alice", "Apply"): {"f:data": {"f:b": {}}},
        ("carol", "Update"): {"f:data": {"f:a": {}}},
    }
    clash = apply(cluster, path, config("updated", a="1"), "alice")
    assert 'conflict with "carol" using v1: .data.a' in clash.json["message"]


def test_lists_that_are_maps_merge_by_key_and_keep_order(cluster: Cluster) -> None:
    path = f"{APPS}/deployments/lists"
    body = deployment("lists")
    applied(cluster, path, body, "alice")
    side = {"name": "side", "image": "side:1"}
    sidecar = {**body, "spec": {"template": {"spec": {"containers": [side]}}}}
    both = applied(cluster, path, sidecar, "mesh")
    assert [c["name"] for c in both["spec"]["template"]["spec"]["containers"]] == ["c", "side"]
    mine = owners(both)["mesh", "Apply"]["f:spec"]["f:template"]["f:spec"]["f:containers"]
    assert mine == {'k:{"name":"side"}': {".": {}, "f:name": {}, "f:image": {}}}
    ports = owners(both)["alice", "Apply"]["f:spec"]["f:template"]["f:spec"]["f:containers"]['k:{"name":"c"}'][
        "f:ports"
    ]
    assert list(ports) == ['k:{"containerPort":80,"protocol":"TCP"}']
    assert "f:selector" in owners(both)["alice", "Apply"]["f:spec"]  # atomic: one field
    assert owners(both)["alice", "Apply"]["f:spec"]["f:selector"] == {}
    without = {**body, "spec": {"template": {"spec": {}}}}
    left = applied(cluster, path, without, "mesh")
    assert [c["name"] for c in left["spec"]["template"]["spec"]["containers"]] == ["c"]


def test_removing_a_container_also_removes_what_was_defaulted_in_it(cluster: Cluster) -> None:
    path = f"{APPS}/deployments/drops"
    body = deployment("drops")
    body["spec"]["template"]["spec"]["containers"].append({"name": "old", "image": "old:1"})
    assert len(applied(cluster, path, body, "alice")["spec"]["template"]["spec"]["containers"]) == 2
    del body["spec"]["template"]["spec"]["containers"][1]
    left = applied(cluster, path, body, "alice")["spec"]["template"]["spec"]["containers"]
    assert [c["name"] for c in left] == ["c"]


def test_sets_merge_item_by_item(cluster: Cluster) -> None:
    path = f"{NS}/configmaps/sets"
    for manager, item in (("alice", "a.io/x"), ("bob", "b.io/y")):
        body = config("sets")
        body["metadata"]["finalizers"] = [item]
        made = applied(cluster, path, body, manager)
    assert made["metadata"]["finalizers"] == ["a.io/x", "b.io/y"]
    assert owners(made)["bob", "Apply"]["f:metadata"]["f:finalizers"] == {'v:"b.io/y"': {}}
    left = applied(cluster, path, config("sets"), "alice")
    assert left["metadata"]["finalizers"] == ["b.io/y"]


def test_status_and_spec_have_owners_of_their_own(cluster: Cluster) -> None:
    path = f"{APPS}/deployments/status"
    applied(cluster, path, {**deployment("status"), "status": {"replicas": 7}}, "alice")
    assert cluster.http("GET", path).json["status"].get("replicas") is None
    body = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "status"}, "status": {"replicas": 3}}
    done = applied(cluster, path + "/status", body, "controller")
    assert done["status"]["replicas"] == 3
    entry = next(e for e in done["metadata"]["managedFields"] if e["manager"] == "controller")
    assert (entry["subresource"], entry["fieldsV1"]) == ("status", {"f:status": {"f:replicas": {}}})
    assert done["metadata"]["generation"] == 1


def test_create_by_post_owns_what_it_sent_and_what_was_defaulted(cluster: Cluster) -> None:
    made = cluster.create(f"{APPS}/deployments", deployment("posted"), fieldManager="poster")
    spec = owners(made)["poster", "Update"]["f:spec"]
    assert spec["f:replicas"] == {}
    assert "f:strategy" in spec
    assert "." not in spec


def test_clearing_managed_fields(cluster: Cluster) -> None:
    path = f"{NS}/configmaps/cleared"
    applied(cluster, path, config("cleared", a="1"), "alice")
    body = [{"op": "replace", "path": "/metadata/managedFields", "value": [{}]}]
    done = cluster.http("PATCH", path, body, content_type="application/json-patch+json")
    assert "managedFields" not in done.json["metadata"] or done.json["metadata"]["managedFields"] == []


@pytest.mark.parametrize(
    ("query", "body", "text"),
    [
        ("", config("x"), "fieldManager: Required value"),
        (
            "?fieldManager=a",
            {**config("x"), "metadata": {"name": "x", "managedFields": [{}]}},
            "managedFields must be nil",
        ),
        ("?fieldManager=a", {"kind": "ConfigMap"}, "couldn't get version/kind"),
        ("?fieldManager=a", {**config("other")}, "does not match the name on the URL"),
    ],
)
def test_what_apply_refuses(cluster: Cluster, query: str, body: JSON, text: str) -> None:
    answer = cluster.http("PATCH", f"{NS}/configmaps/x{query}", body, content_type=APPLY)
    assert answer.code in (400, 422)
    assert text in answer.json["message"]


SETS: list[tuple[JSON, JSON, JSON, JSON, JSON]] = [
    # a, b, union, difference, intersection
    ({"f:a": {}}, {"f:b": {}}, {"f:a": {}, "f:b": {}}, {"f:a": {}}, {}),
    ({"f:a": {}}, {"f:a": {}}, {"f:a": {}}, {}, {"f:a": {}}),
    (
        {"f:a": {".": {}, "f:b": {}}},
        {"f:a": {"f:b": {}}},
        {"f:a": {".": {}, "f:b": {}}},
        {"f:a": {}},
        {"f:a": {"f:b": {}}},
    ),
    ({"f:a": {"f:b": {}}}, {"f:a": {}}, {"f:a": {".": {}, "f:b": {}}}, {"f:a": {"f:b": {}}}, {}),
]


@pytest.mark.parametrize(("a", "b", "union", "difference", "intersection"), SETS)
def test_set_algebra(a: JSON, b: JSON, union: JSON, difference: JSON, intersection: JSON) -> None:
    assert fieldset.union(a, b) == union
    assert fieldset.difference(a, b) == difference
    assert fieldset.intersection(a, b) == intersection


def test_comparison_names_every_changed_leaf() -> None:
    schema = builtin_types()["Pod"]
    old = {"spec": {"containers": [{"name": "a", "image": "1"}, {"name": "b"}], "nodeSelector": {"x": "1"}}}
    new = {"spec": {"containers": [{"name": "a", "image": "2"}], "nodeSelector": {"x": "2"}, "hostname": "h"}}
    seen = fieldset.compare(old, new, schema)
    assert sorted(fieldset.paths(seen.modified)) == ['.spec.containers[name="a"].image', ".spec.nodeSelector"]
    assert sorted(fieldset.paths(seen.added)) == [".spec.hostname"]
    assert '.spec.containers[name="b"]' in list(fieldset.paths(seen.removed))
