"""Every refusal names the field and says what to do; good manifests pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.controllers.builders import group, role

from baton.api import to_stored, unknown, validate
from baton.api.validation import find_cycle

SHARED = Path(__file__).parents[3] / "shared" / "manifests"
Object = dict[str, Any]


def found(obj: Object) -> list[tuple[str, str]]:
    return [(error.field, error.reason) for error in validate(obj)]


def changed(obj: Object, path: str, value: Any) -> Object:
    """A copy of ``obj`` with one field set; a path such as ``spec.roles.0.name``."""
    result = copy.deepcopy(obj)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    at: Any = result
    for part in parents:
        at = at[part] if isinstance(part, int) else at.setdefault(part, {})
    at[last] = value
    return result


GOOD = group(role("a", 2), role("b", dependencies=["a"]))


def test_a_good_group_passes() -> None:
    assert validate(GOOD) == []


@pytest.mark.parametrize(
    ("path", "value", "field", "reason"),
    [
        ("metadata.name", "a.b", "metadata.name", "FieldValueInvalid"),
        ("metadata.name", "x" * 70, "metadata.name", "FieldValueInvalid"),
        ("spec.roles", [], "spec.roles", "FieldValueInvalid"),
        ("spec.roles.1.name", "a", "spec.roles[1].name", "FieldValueDuplicate"),
        ("spec.roles.0.name", "A_b", "spec.roles[0].name", "FieldValueInvalid"),
        ("spec.roles.0.replicas", "2", "spec.roles[0].replicas", "FieldValueInvalid"),
        ("spec.roles.0.replicas", -1, "spec.roles[0].replicas", "FieldValueInvalid"),
        ("spec.roles.0.labels", {"a": 1}, "spec.roles[0].labels.a", "FieldValueInvalid"),
        ("spec.roles.1.dependencies", ["nosuch"], "spec.roles[1].dependencies[0]", "FieldValueNotFound"),
        ("spec.roles.0.dependencies", ["b"], "spec.roles[0].dependencies", "FieldValueInvalid"),
        ("spec.roles.0.dependencies", ["a"], "spec.roles[0].dependencies", "FieldValueInvalid"),
        ("spec.roles.0.rolloutStrategy.rollingUpdate.partition", 2, "spec.roles[0].rolloutStrategy.rollingUpdate.partition", "FieldValueInvalid"),
        ("spec.roles.0.rolloutStrategy.rollingUpdate.partition", "x%", "spec.roles[0].rolloutStrategy.rollingUpdate.partition", "FieldValueInvalid"),
        ("spec.roles.0.rolloutStrategy.rollingUpdate.maxUnavailable", 0, "spec.roles[0].rolloutStrategy.rollingUpdate.maxUnavailable", "FieldValueInvalid"),
        ("spec.roles.0.rolloutStrategy.rollingUpdate.type", "Blue", "spec.roles[0].rolloutStrategy.rollingUpdate.type", "FieldValueNotSupported"),
        ("spec.roles.0.rolloutStrategy.type", "Recreate", "spec.roles[0].rolloutStrategy.type", "FieldValueInvalid"),
        ("spec.roles.0.standalonePattern.template.spec.containers", [], "spec.roles[0].standalonePattern.template.spec.containers", "FieldValueRequired"),
        ("spec.roles.0.standalonePattern", {}, "spec.roles[0].standalonePattern", "FieldValueRequired"),
        ("spec.roles.0.standalonePattern.templateRef", {"name": "t"}, "spec.roles[0].standalonePattern", "FieldValueInvalid"),
        ("spec.roles.0.standalonePattern", {"templateRef": {"name": "t", "patch": {}}}, "spec.roles[0].standalonePattern.templateRef.name", "FieldValueNotFound"),
        ("spec.roles.0.standalonePattern.template.spec.containers.0.volumeMounts", [{"name": "v", "mountPath": "/v"}], "spec.roles[0].standalonePattern.template.spec.containers[0].volumeMounts[0].name", "FieldValueNotFound"),
        ("spec.roles.0.leaderWorkerPattern", {"size": 2}, "spec.roles[0]", "FieldValueInvalid"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(path: str, value: Any, field: str, reason: str) -> None:
    assert (field, reason) in found(changed(GOOD, path, value))


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("spec.roles.0.rolloutStrategy.rollingUpdate.maxSurge", 1, "spec.roles[0].rolloutStrategy.rollingUpdate.maxSurge"),
        ("spec.roles.0.scalingAdapter", {"enable": True}, "spec.roles[0].scalingAdapter"),
        ("spec.roles.0.engineRuntimes", [{"profileName": "p"}], "spec.roles[0].engineRuntimes"),
        ("metadata.annotations", {"rbg.workloads.x-k8s.io/group-gang-scheduling": "true"}, "metadata.annotations[rbg.workloads.x-k8s.io/group-gang-scheduling]"),
        ("metadata.annotations", {"rolebasedgroup.workloads.x-k8s.io/exclusive-topology": "h"}, "metadata.annotations[rolebasedgroup.workloads.x-k8s.io/exclusive-topology]"),
        ("metadata.annotations", {"conversion.workloads.x-k8s.io/v1alpha1-coordination": "[]"}, "metadata.annotations[conversion.workloads.x-k8s.io/v1alpha1-coordination]"),
        ("spec.roles.0.annotations", {"rbg.workloads.x-k8s.io/role-workload-type": "apps/v1/Deployment"}, "spec.roles[0].annotations[rbg.workloads.x-k8s.io/role-workload-type]"),
    ],
)  # fmt: skip
def test_what_is_not_there_yet_is_refused_with_its_path(path: str, value: Any, field: str) -> None:
    assert found(changed(GOOD, path, value)) == [(field, "FieldValueNotSupported")]


V1 = {
    "apiVersion": "workloads.x-k8s.io/v1alpha1",
    "kind": "RoleBasedGroup",
    "metadata": {"name": "g"},
    "spec": {"roles": [{"name": "a", "template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}}]},
}


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("spec.roles.0.restartPolicy", "RecreateRBGOnPodRestart", "spec.roles[0].restartPolicy"),
        ("spec.roles.0.workload", {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet"}, "spec.roles[0].workload"),
        ("spec.coordination", [{"name": "c", "roles": ["a"]}], "spec.coordination"),
        ("spec.podGroupPolicy", {"kubeScheduling": {}}, "spec.podGroupPolicy"),
        ("spec.roles.0.templateRef", {"name": "t"}, "spec.roles[0]"),
    ],
)  # fmt: skip
def test_v1alpha1_has_its_own_paths(path: str, value: Any, field: str) -> None:
    assert field in [error.field for error in validate(changed(V1, path, value))]
    assert validate(V1) == []


def test_a_cycle_is_shown_whole() -> None:
    obj = group(role("a", dependencies=["b"]), role("b", dependencies=["c"]), role("c", dependencies=["b"]))
    assert [error.message for error in validate(obj)] == ["roles wait for each other: b -> c -> b; remove one of these"]
    assert find_cycle({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}) == []


def test_pod_names_that_would_not_fit_a_host_name_are_refused() -> None:
    errors = validate(group(role("r" * 40), name="g" * 30))
    assert [error.field for error in errors] == ["spec.roles[0].name"]
    assert "71 characters" in errors[0].message


def test_unknown_fields_are_listed_not_lost() -> None:
    obj = changed(changed(GOOD, "spec.roles.0.replica", 3), "spec.extra", {})
    assert unknown(obj) == ["spec.extra", "spec.roles[0].replica"]
    assert to_stored(obj).wire() == obj


def test_null_means_not_given() -> None:
    assert validate(changed(GOOD, "spec.roles.0.dependencies", None)) == []
    assert to_stored(changed(GOOD, "spec.roles.0.replicas", None)).spec.roles[0].replicas == 1


@pytest.mark.parametrize("name", ["sglang_pd.yaml", "dynamo.yaml"])
def test_manifests_people_have_pass(name: str) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here")
    for obj in yaml.safe_load_all((SHARED / name).read_text()):
        if obj and obj["kind"] == "RoleBasedGroup":
            assert (validate(obj), unknown(obj)) == ([], [])
