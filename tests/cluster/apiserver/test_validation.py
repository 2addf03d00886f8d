"""Objects that are refused, and what is said about them: field paths, reasons and words of Kubernetes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tests.cluster.apiserver.conftest import APPS, NS, Cluster, config_map, deployment, pod, stateful_set

JSON = dict[str, Any]


def changed(obj: JSON, path: str, value: Any) -> JSON:
    """`obj` with the value at a dotted path (numbers index lists)."""
    out = copy.deepcopy(obj)
    here: Any = out
    *way, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    for name in way:
        here = here[name]
    here[last] = value
    return out


C = "spec.containers.0"
SERVICE: JSON = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}}
CLAIM: JSON = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": "c"},
    "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
}

REFUSED: list[tuple[str, JSON, str, str, str]] = [
    # collection, object, field, reason, text
    ("pods", changed(pod(), "metadata.name", "Up"), "metadata.name", "FieldValueInvalid", "a lowercase RFC 1123 subdomain"),
    ("pods", changed(pod(), "metadata.labels", {"a b": "c"}), "metadata.labels", "FieldValueInvalid", "name part must consist"),
    ("pods", changed(pod(), "metadata.labels", {"a": "c d"}), "metadata.labels", "FieldValueInvalid", "a valid label must be"),
    ("pods", changed(pod(), "spec", {"containers": []}), "spec.containers", "FieldValueRequired", "Required value"),
    ("pods", changed(pod(), f"{C}.name", ""), "spec.containers[0].name", "FieldValueRequired", "Required value"),
    ("pods", changed(pod(), f"{C}.name", "a.b"), "spec.containers[0].name", "FieldValueInvalid", "RFC 1123 label"),
    ("pods", changed(pod(), f"{C}.image", None), "spec.containers[0].image", "FieldValueRequired", "Required value"),
    ("pods", changed(pod(), f"{C}.imagePullPolicy", "No"), "spec.containers[0].imagePullPolicy", "FieldValueNotSupported",
     'Unsupported value: "No": supported values: "Always", "IfNotPresent", "Never"'),
    ("pods", changed(pod(), f"{C}.ports", [{"containerPort": 70000}]), "spec.containers[0].ports[0].containerPort",
     "FieldValueInvalid", "must be between 1 and 65535, inclusive"),
    ("pods", changed(pod(), f"{C}.volumeMounts", [{"name": "v", "mountPath": "/v"}]),
     "spec.containers[0].volumeMounts[0].name", "FieldValueNotFound", 'Not found: "v"'),
    ("pods", changed(pod(), f"{C}.resources", {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}),
     "spec.containers[0].resources.requests", "FieldValueInvalid", "must be less than or equal to cpu limit of 1"),
    ("pods", changed(pod(), f"{C}.resources", {"limits": {"memory": "1 GB"}}),
     "spec.containers[0].resources.limits.memory", "FieldValueInvalid", "quantities must match"),
    ("pods", changed(pod(), f"{C}.readinessProbe", {"periodSeconds": 1}), "spec.containers[0].readinessProbe",
     "FieldValueRequired", "must specify a handler type"),
    ("pods", changed(pod(), f"{C}.env", [{"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}]),
     "spec.containers[0].env[0].valueFrom", "FieldValueInvalid", "may not be specified when `value` is not empty"),
    ("pods", changed(pod(), "spec.volumes", [{"name": "v"}, {"name": "v"}]), "spec.volumes[1].name",
     "FieldValueDuplicate", 'Duplicate value: "v"'),
    ("pods", changed(pod(), "spec.volumes", [{"name": "v", "emptyDir": {}, "hostPath": {"path": "/"}}]),
     "spec.volumes[0].hostPath", "FieldValueForbidden", "may not specify more than 1 volume type"),
    ("pods", changed(pod(), "spec.restartPolicy", "Maybe"), "spec.restartPolicy", "FieldValueNotSupported", "Maybe"),
    ("services", changed(SERVICE, "metadata.name", "1st"), "metadata.name", "FieldValueInvalid", "DNS-1035 label"),
    ("services", changed(SERVICE, "spec", {}), "spec.ports", "FieldValueRequired", "Required value"),
    ("services", changed(SERVICE, "spec.ports", [{"port": 1}, {"port": 2}]), "spec.ports[0].name", "FieldValueRequired", ""),
    ("services", changed(SERVICE, "spec.type", "Magic"), "spec.type", "FieldValueNotSupported", "Magic"),
    ("configmaps", config_map("a", **{"b/c": "x"}), "data[b/c]", "FieldValueInvalid", "a valid config key"),
    ("persistentvolumeclaims", changed(CLAIM, "spec.accessModes", []), "spec.accessModes", "FieldValueRequired", ""),
    ("persistentvolumeclaims", changed(CLAIM, "spec.resources", {}), "spec.resources[storage]", "FieldValueRequired", ""),
    ("deployments", changed(deployment(), "spec.selector.matchLabels", {"x": "y"}), "spec.template.metadata.labels",
     "FieldValueInvalid", "`selector` does not match template `labels`"),
    ("deployments", changed(deployment(), "spec.replicas", -1), "spec.replicas", "FieldValueInvalid", "greater than or equal to 0"),
    ("deployments", changed(deployment(), "spec.template.spec.restartPolicy", "Never"),
     "spec.template.spec.restartPolicy", "FieldValueNotSupported", 'supported values: "Always"'),
    ("statefulsets", changed(stateful_set(), "spec.podManagementPolicy", "Odd"), "spec.podManagementPolicy",
     "FieldValueNotSupported", "Odd"),
]  # fmt: skip


@pytest.mark.parametrize(("plural", "obj", "field", "reason", "text"), REFUSED, ids=[f"{c[0]} {c[2]}" for c in REFUSED])
def test_refused(cluster: Cluster, plural: str, obj: JSON, field: str, reason: str, text: str) -> None:
    base = APPS if plural in ("deployments", "statefulsets") else NS
    answer = cluster.http("POST", f"{base}/{plural}", obj)
    assert (answer.code, answer.json["reason"]) == (422, "Invalid"), answer.raw
    causes = {(c["field"], c["reason"]): c["message"] for c in answer.json["details"]["causes"]}
    assert text in causes[field, reason]
    assert field in answer.json["message"]


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("spec.replicas", "three", "cannot unmarshal string into field Deployment.spec.replicas of type integer"),
        ("spec.template.spec.containers", {}, "of type array"),
        ("metadata.labels", ["a"], "of type object"),
        ("spec.template.spec.containers.0.env", [{"name": "A", "value": 60}], "of type string"),
    ],
)
def test_wrong_types_are_bad_requests(cluster: Cluster, path: str, value: Any, text: str) -> None:
    answer = cluster.http("POST", f"{APPS}/deployments", changed(deployment("typed"), path, value))
    assert (answer.code, answer.json["reason"]) == (400, "BadRequest")
    assert text in answer.json["message"]


def test_numbers_are_accepted_as_quantities(cluster: Cluster) -> None:
    body = changed(pod("quantities"), f"{C}.resources", {"limits": {"cpu": 0.5, "aliyun/erdma": 1, "memory": "16Gi"}})
    made = cluster.create(f"{NS}/pods", body)
    resources = made["spec"]["containers"][0]["resources"]
    assert resources["limits"] == {"cpu": "0.5", "aliyun/erdma": "1", "memory": "16Gi"}
    assert resources["requests"] == resources["limits"]
    assert made["status"]["qosClass"] == "Guaranteed"


def test_a_claim_template_is_a_volume_of_the_pods(cluster: Cluster) -> None:
    claimed = stateful_set("claimed")
    container = claimed["spec"]["template"]["spec"]["containers"][0]
    container["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    claimed["spec"]["volumeClaimTemplates"] = [
        {
            "metadata": {"name": "data"},
            "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": 1}}},
        }
    ]
    assert cluster.http("POST", f"{APPS}/statefulsets", claimed).code == 201
    container["volumeMounts"][0]["name"] = "dta"
    claimed["metadata"]["name"] = "mistyped"
    refused = cluster.http("POST", f"{APPS}/statefulsets", claimed)
    assert [cause["field"] for cause in refused.json["details"]["causes"]] == [
        "spec.template.spec.containers[0].volumeMounts[0].name"
    ]


def test_null_means_not_given(cluster: Cluster) -> None:
    body = changed(pod("nulls"), "spec.volumes", None)
    body["metadata"]["creationTimestamp"] = None
    body["status"] = None
    made = cluster.create(f"{NS}/pods", body)
    assert "volumes" not in made["spec"]


FIXED: list[tuple[str, JSON, JSON, str]] = [
    (
        "configmaps",
        {**config_map("im", a="1"), "immutable": True},
        {"data": {"a": "2"}},
        "field is immutable when `immutable` is set",
    ),
    (
        "secrets",
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "im"}},
        {"type": "other"},
        "field is immutable",
    ),
    (
        "persistentvolumeclaims",
        changed(CLAIM, "metadata.name", "im"),
        {"spec": {"accessModes": ["ReadOnlyMany"]}},
        "spec is immutable after creation",
    ),
    ("deployments", deployment("im"), {"spec": {"selector": {"matchLabels": {"b": "c"}}}}, "field is immutable"),
    ("statefulsets", stateful_set("im"), {"spec": {"serviceName": "x"}}, "updates to statefulset spec"),
]


@pytest.mark.parametrize(("plural", "obj", "patch", "text"), FIXED, ids=[c[0] for c in FIXED])
def test_what_may_not_change(cluster: Cluster, plural: str, obj: JSON, patch: JSON, text: str) -> None:
    base = APPS if plural in ("deployments", "statefulsets") else NS
    cluster.create(f"{base}/{plural}", obj)
    answer = cluster.http("PATCH", f"{base}/{plural}/im", patch, content_type="application/merge-patch+json")
    assert answer.code == 422
    assert text in answer.json["message"]
