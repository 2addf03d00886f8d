"""CustomResourceDefinitions: serving, pruning, defaults, validation, subresources, versions, columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.cluster.apiserver.conftest import TOKEN, Cluster, as_yaml

from baton.cluster.apiserver.errors import Cause

JSON = dict[str, Any]
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
BOATS = "/apis/harbour.io/v1/namespaces/default/boats"


def crd() -> JSON:
    spec = {
        "type": "object",
        "required": ["crew"],
        "properties": {
            "crew": {"type": "integer", "minimum": 1, "maximum": 99},
            "replicas": {"type": "integer", "default": 1},
            "rig": {"type": "string", "enum": ["sloop", "ketch"], "default": "sloop"},
            "port": {"x-kubernetes-int-or-string": True},
            "name": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 8},
            "extra": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "note": {"type": "string", "nullable": True},
            "berths": {
                "type": "array",
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["id"],
                "items": {
                    "type": "object",
                    "required": ["id"],
                    "properties": {"id": {"type": "string"}, "beds": {"type": "integer", "default": 2}},
                },
            },
        },
    }
    status = {
        "type": "object",
        "properties": {"replicas": {"type": "integer"}, "phase": {"type": "string"}, "selector": {"type": "string"}},
    }
    schema = {"type": "object", "properties": {"spec": spec, "status": status}}
    columns = [
        {"name": "PHASE", "type": "string", "jsonPath": ".status.phase"},
        {"name": "CREW", "type": "integer", "jsonPath": ".spec.crew"},
        {"name": "FIRST", "type": "string", "jsonPath": '.spec.berths[?(@.id=="a")].beds', "priority": 1},
        {"name": "AGE", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    ]
    scale = {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}, "scale": scale},
        "additionalPrinterColumns": columns,
    }
    old = {"name": "v1alpha1", "served": True, "storage": False, "deprecated": True}
    old["schema"] = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "boats.harbour.io"},
        "spec": {
            "group": "harbour.io",
            "scope": "Namespaced",
            "names": {"plural": "boats", "kind": "Boat", "shortNames": ["bt"], "categories": ["all"]},
            "versions": [version, old],
        },
    }


def to_version(obj: JSON, api_version: str) -> JSON:
    """v1alpha1 calls the crew `sailors`, and has a note by default."""
    spec = dict(obj.get("spec") or {})
    old, new = ("crew", "sailors") if api_version.endswith("v1alpha1") else ("sailors", "crew")
    if old in spec:
        spec[new] = spec.pop(old)
    if new == "crew":
        spec.setdefault("note", "old boat")
    return {**obj, "apiVersion": api_version, "spec": spec}


def no_thirteen(obj: JSON, old: JSON | None) -> list[Cause]:
    """Nor may a crew grow by more than fifty at once."""
    crew = obj["spec"].get("crew", obj["spec"].get("sailors"))
    out = [Cause.invalid("spec.crew", crew, "is unlucky")] if crew == 13 else []
    before = crew if old is None else old["spec"].get("crew", old["spec"].get("sailors"))
    return [*out, Cause.invalid("spec.crew", crew, "grows too fast")] if crew > before + 50 else out


def full_dozens(obj: JSON) -> JSON:
    """Eleven sailors are rounded up."""
    return {**obj, "spec": {**obj["spec"], "crew": 12}} if obj["spec"].get("crew") == 11 else obj


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(
        tmp_path_factory.mktemp("cluster"),
        {"boats.harbour.io": to_version},
        {"boats.harbour.io": no_thirteen},
        {"boats.harbour.io": full_dozens},
    )
    made.create(CRDS, crd())
    yield made
    made.close()


def boat(name: str, /, **spec: Any) -> JSON:
    return {"apiVersion": "harbour.io/v1", "kind": "Boat", "metadata": {"name": name}, "spec": {"crew": 3, **spec}}


def test_a_new_crd_is_established_and_discovered(cluster: Cluster) -> None:
    assert "condition met" in cluster.kubectl("wait", "--for=condition=Established", "crd/boats.harbour.io")
    assert "boats" in cluster.kubectl("api-resources", "--api-group=harbour.io")
    assert "boat.harbour.io/found created" in cluster.kubectl("create", "-f", "-", stdin=as_yaml(boat("found")))
    assert "crew\t<integer> -required-" in cluster.kubectl("explain", "boat.spec")
    assert "boat.harbour.io/found" in cluster.kubectl("get", "all", "-o", "name")


def test_defaults_pruning_and_kept_unknown_fields(cluster: Cluster) -> None:
    body = boat("pruned", mast="oak", berths=[{"id": "a"}], extra={"any": {"thing": 1}}, note=None)
    answer = cluster.http("POST", BOATS, body)
    assert answer.json["spec"] == {
        "crew": 3,
        "replicas": 1,
        "rig": "sloop",
        "berths": [{"id": "a", "beds": 2}],
        "extra": {"any": {"thing": 1}},
        "note": None,
    }
    assert answer.warnings == ['299 - "unknown field \\"spec.mast\\""']
    strict = cluster.http("POST", f"{BOATS}?fieldValidation=Strict", body)
    assert strict.json["message"] == 'strict decoding error: unknown field "spec.mast"'


@pytest.mark.parametrize(
    ("spec", "field", "text"),
    [
        ({"crew": "three"}, "spec.crew", 'spec.crew in body must be of type integer: "string"'),
        ({"crew": 0}, "spec.crew", "should be greater than or equal to 1"),
        ({"crew": 100}, "spec.crew", "should be less than or equal to 99"),
        ({"rig": "barge"}, "spec.rig", 'Unsupported value: "barge": supported values: "sloop", "ketch"'),
        ({"name": "UPPER"}, "spec.name", "should match '^[a-z]+$'"),
        ({"name": "toolongname"}, "spec.name", "Too long: may not be more than 8 bytes"),
        ({"port": 1.5}, "spec.port", "must be of type integer or string"),
        ({"berths": [{"beds": 1}]}, "spec.berths[0].id", "Required value"),
        ({"berths": [{"id": "a"}, {"id": "a"}]}, "spec.berths[1]", 'Duplicate value: {"id": "a"}'),
    ],
)
def test_values_that_break_the_schema(cluster: Cluster, spec: JSON, field: str, text: str) -> None:
    answer = cluster.http("POST", BOATS, boat("broken", **spec))
    assert (answer.code, answer.json["reason"]) == (422, "Invalid")
    causes = {c["field"]: c["message"] for c in answer.json["details"]["causes"]}
    assert text in causes[field]
    assert answer.json["message"].startswith('Boat.harbour.io "broken" is invalid: ')


def test_rules_beyond_the_schema(cluster: Cluster) -> None:
    text = cluster.kubectl("create", "-f", "-", stdin=as_yaml(boat("unlucky") | {"spec": {"crew": 13}}), fails=True)
    assert 'The Boat "unlucky" is invalid: spec.crew: Invalid value: 13: is unlucky' in text
    cluster.create(BOATS, boat("lucky"))
    text = cluster.kubectl("patch", "boat", "lucky", "--type=merge", "-p", '{"spec":{"crew":13}}', fails=True)
    assert "is unlucky" in text
    text = cluster.kubectl("patch", "boat", "lucky", "--type=merge", "-p", '{"spec":{"crew":90}}', fails=True)
    assert "grows too fast" in text, "a rule may look at the stored object too"


def test_an_object_is_completed_before_it_is_stored(cluster: Cluster) -> None:
    assert cluster.create(BOATS, boat("eleven", crew=11))["spec"]["crew"] == 12
    text = cluster.kubectl("patch", "boat", "eleven", "--type=merge", "-p", '{"spec":{"crew":11}}', "-o", "yaml")
    assert "crew: 12" in text


def test_status_is_apart_and_generation_counts_spec(cluster: Cluster) -> None:
    made = cluster.create(BOATS, {**boat("parts"), "status": {"phase": "Lost"}})
    assert "status" not in made
    cluster.kubectl(
        "patch",
        "boat",
        "parts",
        "--subresource=status",
        "--type=merge",
        "-p",
        '{"status":{"phase":"Docked"},"spec":{"crew":9}}',
    )
    cluster.kubectl("patch", "boat", "parts", "--type=merge", "-p", '{"status":{"phase":"Lost"},"spec":{"crew":4}}')
    found = cluster.get("boat", "parts")
    assert (found["status"], found["spec"]["crew"], found["metadata"]["generation"]) == ({"phase": "Docked"}, 4, 2)
    strategic = cluster.kubectl("patch", "boat", "parts", "-p", "{}", fails=True)
    assert "application/strategic-merge-patch+json is not supported by harbour.io/v1, Kind=Boat" in strategic


def test_scale_subresource_and_wait_on_jsonpath(cluster: Cluster) -> None:
    cluster.create(BOATS, boat("scaled"))
    cluster.kubectl("scale", "boat", "scaled", "--replicas=5")
    status = '{"status":{"replicas":5,"selector":"boat=scaled","phase":"Docked"}}'
    cluster.kubectl("patch", "bt", "scaled", "--subresource=status", "--type=merge", "-p", status)
    scale = cluster.http("GET", f"{BOATS}/scaled/scale").json
    assert (scale["spec"], scale["status"]) == ({"replicas": 5}, {"replicas": 5, "selector": "boat=scaled"})
    assert "condition met" in cluster.kubectl("wait", "--for=jsonpath={.status.phase}=Docked", "boat/scaled")


def test_printer_columns(cluster: Cluster) -> None:
    cluster.create(BOATS, boat("columns", berths=[{"id": "a", "beds": 7}]))
    lines = cluster.kubectl("get", "boat", "columns", "-o", "wide").splitlines()
    assert lines[0].split() == ["NAME", "PHASE", "CREW", "FIRST", "AGE"]
    assert lines[1].split()[:3] == ["columns", "3", "7"]


def test_versions_are_one_object(cluster: Cluster) -> None:
    cluster.create(BOATS, boat("twice"))
    old = BOATS.replace("/v1/", "/v1alpha1/")
    answer = cluster.http("GET", f"{old}/twice")
    assert (answer.json["apiVersion"], answer.json["spec"]["sailors"]) == ("harbour.io/v1alpha1", 3)
    assert answer.warnings == ['299 - "harbour.io/v1alpha1 Boat is deprecated"']
    patched = cluster.http(
        "PATCH", f"{old}/twice", {"spec": {"sailors": 8}}, content_type="application/merge-patch+json"
    )
    assert patched.json["spec"]["sailors"] == 8
    found = cluster.http("GET", f"{BOATS}/twice").json
    assert found["spec"]["crew"] == 8
    assert found["metadata"]["uid"] == answer.json["metadata"]["uid"]
    stream = cluster.watch(f"{old}?watch=true&fieldSelector=metadata.name%3Dtwice")
    assert stream.next()["object"]["spec"]["sailors"] == 8


def test_what_conversion_fills_in_is_no_change(cluster: Cluster) -> None:
    old = BOATS.replace("/v1/", "/v1alpha1/")
    body = {"apiVersion": "harbour.io/v1alpha1", "kind": "Boat", "metadata": {"name": "noted"}, "spec": {"sailors": 2}}
    made = cluster.http("POST", old, body).json
    assert made["spec"]["note"] == "old boat"
    again = cluster.http(
        "PATCH", f"{old}/noted", {"spec": {"note": None}}, content_type="application/merge-patch+json"
    ).json
    assert again["spec"]["note"] == "old boat"
    assert again["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


def test_a_custom_body_names_its_type(cluster: Cluster) -> None:
    answer = cluster.http("POST", BOATS, {"metadata": {"name": "untyped"}, "spec": {"crew": 1}})
    assert (answer.code, "couldn't get version/kind" in answer.json["message"]) == (400, True)


def test_apply_on_a_custom_resource(cluster: Cluster) -> None:
    manifest = as_yaml(boat("applied", berths=[{"id": "a"}]))
    cluster.kubectl("apply", "-f", "-", stdin=manifest)
    before = cluster.get("boat", "applied")["metadata"]["resourceVersion"]
    cluster.kubectl("apply", "-f", "-", stdin=manifest)
    assert cluster.get("boat", "applied")["metadata"]["resourceVersion"] == before


def test_a_crd_that_cannot_be(cluster: Cluster) -> None:
    bad = crd()
    bad["metadata"]["name"] = "wrong"
    bad["spec"]["versions"][0]["storage"] = False
    bad["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["x"] = {}
    causes = {c["field"] for c in cluster.http("POST", CRDS, bad).json["details"]["causes"]}
    where = "spec.versions[0].schema.openAPIV3Schema.properties[spec].properties[x].type"
    assert causes == {"metadata.name", "spec.versions", where}


def test_cel_rules_are_announced_as_not_evaluated(cluster: Cluster) -> None:
    body = crd()
    body["metadata"]["name"] = "ships.harbour.io"
    body["spec"]["names"] = {"plural": "ships", "kind": "Ship"}
    node = body["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    node["x-kubernetes-validations"] = [{"rule": "self.spec.crew > 0"}]
    answer = cluster.http("POST", CRDS, body)
    assert answer.code == 201
    assert "CEL" in answer.warnings[0]
    cluster.create("/apis/harbour.io/v1/namespaces/default/ships", {**boat("one"), "kind": "Ship"})
    assert cluster.http("DELETE", f"{CRDS}/ships.harbour.io").code == 200
    cluster.settle()
    assert cluster.http("GET", "/apis/harbour.io/v1/namespaces/default/ships/one").code == 404
    assert not cluster.store.resource("ships.harbour.io").objects


def test_crds_are_served_again_after_a_restart(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("again")
    first = Cluster(directory)
    first.create(CRDS, crd())
    made = first.create(BOATS, boat("kept"))
    first.close()
    second = Cluster(directory)
    found = second.http("GET", f"{BOATS}/kept", token=TOKEN).json
    assert found == made
    second.close()
