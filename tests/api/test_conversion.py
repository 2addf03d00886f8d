"""Conversion between the two versions of a RoleBasedGroup loses nothing, in either direction."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.api import convert, labels

Object = dict[str, Any]
SHARED = Path(__file__).parents[3] / "shared" / "manifests"
text = st.text("ab-", min_size=1, max_size=3)
strings = st.dictionaries(text, text, max_size=2)
template = st.fixed_dictionaries(
    {"spec": st.fixed_dictionaries({"containers": st.just([{"name": "c", "image": "i"}])})},
    optional={"metadata": st.fixed_dictionaries({"labels": strings})},
)
patch = st.sampled_from([{}, {"spec": {"nodeName": None}}])
role_annotations = st.dictionaries(
    st.sampled_from(["x", labels.ROLE_WORKLOAD_TYPE]),
    st.sampled_from(["apps/v1/StatefulSet", "a/b", "odd"]),
    max_size=2,
)
same = {
    "labels": strings,
    "annotations": role_annotations,
    "replicas": st.integers(0, 9),
    "dependencies": st.lists(text, max_size=2),
    "minReadySeconds": st.integers(0, 9),
    "servicePorts": st.just([{"name": "http", "port": 80}]),
    "engineRuntimes": st.just([{"profileName": "p"}]),
    "rolloutStrategy": st.sampled_from([{}, {"rollingUpdate": {"type": "Recreate", "partition": "10%"}}]),
    "futureField": st.integers(),
}
restart = st.sampled_from(["None", "RecreateRoleInstanceOnPodRestart", "RecreateRBGOnPodRestart"])
components = st.lists(st.fixed_dictionaries({"name": text, "size": st.integers(0, 2)}), max_size=2)
old_role = st.fixed_dictionaries(
    {},
    optional=same
    | {
        "workload": st.sampled_from(
            [{"apiVersion": "apps/v1", "kind": "StatefulSet"}, {"apiVersion": "apps/v1", "kind": "Deployment"},
             {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet"},
             {"apiVersion": "workloads.x-k8s.io/v1alpha2", "kind": "RoleInstanceSet"}]
        ),
        "template": template,
        "templateRef": st.just({"name": "t"}),
        "templatePatch": patch,
        "leaderWorkerSet": st.fixed_dictionaries({}, optional={"size": st.integers(1, 3), "patchLeaderTemplate": patch, "odd": st.just(1)}),
        "components": components,
        "restartPolicy": restart,
        "scalingAdapter": st.fixed_dictionaries({}, optional={"enable": st.booleans(), "odd": st.just(1)}),
    },
)  # fmt: skip
source = {"template": template, "templateRef": st.fixed_dictionaries({"name": text}, optional={"patch": patch})}
config = st.just({"type": "None", "baseDelaySeconds": 5})
new_role = st.fixed_dictionaries(
    {},
    optional=same
    | {
        "podManagementPolicy": st.sampled_from(["Parallel", "OrderedReady"]),
        "scalingAdapter": st.fixed_dictionaries({}, optional={"enable": st.booleans(), "labels": strings}),
        "standalonePattern": st.fixed_dictionaries({}, optional=source),
        "leaderWorkerPattern": st.fixed_dictionaries(
            {},
            optional=source
            | {"size": st.integers(1, 3), "workerTemplatePatch": patch, "sharedServiceSelection": st.just("All"),
               "restartPolicy": restart, "restartPolicyConfig": config},
        ),
        "customComponentsPattern": st.fixed_dictionaries({}, optional={"components": components, "restartPolicyConfig": config}),
    },
)  # fmt: skip
group_annotations = st.dictionaries(
    st.sampled_from(["x", labels.EXCLUSIVE_TOPOLOGY, labels.OLD_EXCLUSIVE_TOPOLOGY, labels.KEPT_COORDINATION]),
    st.sampled_from(["kubernetes.io/hostname", "{broken", "[]"]),
    min_size=1,
    max_size=3,
)
old_rest = {
    "roleTemplates": st.just([{"name": "t", "template": {}}]),
    "podGroupPolicy": st.sampled_from([{}, {"kubeScheduling": {"scheduleTimeoutSeconds": 5}}]),
    "coordination": st.just([{"name": "c", "roles": ["a"]}]),
    "futureField": st.integers(),
}


def groups(
    version: str, role: st.SearchStrategy[Object], rest: dict[str, st.SearchStrategy[Any]]
) -> st.SearchStrategy[Object]:
    def build(parts: tuple[list[Object], Object, Object]) -> Object:
        roles, spec, meta = parts
        named = [{"name": f"r{index}", **found} for index, found in enumerate(roles)]
        return {
            "apiVersion": f"workloads.x-k8s.io/{version}",
            "kind": "RoleBasedGroup",
            "metadata": {"name": "g", **meta},
            "spec": {"roles": named, **spec},
            "status": {"pods": "1/1"},
        }

    meta: st.SearchStrategy[Object] = st.fixed_dictionaries({}, optional={"annotations": group_annotations})
    return st.tuples(st.lists(role, max_size=3), st.fixed_dictionaries({}, optional=rest), meta).map(build)


def with_workloads(group: Object) -> Object:
    """v1alpha1's default, written out: what a v1alpha1 reader is promised to see."""
    result = copy.deepcopy(group)
    for role in result["spec"]["roles"]:
        role.setdefault("workload", {"apiVersion": "apps/v1", "kind": "StatefulSet"})
    return result


many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@many
@given(groups("v1alpha1", old_role, old_rest))
def test_v1alpha1_there_and_back(group: Object) -> None:
    before = copy.deepcopy(group)
    there = convert(group, "v1alpha2")
    assert group == before, "the argument was changed"
    assert there["apiVersion"].endswith("/v1alpha2") and there["status"] == group["status"]
    assert convert(there, "v1alpha1") == with_workloads(group)


@many
@given(groups("v1alpha2", new_role, {key: old_rest[key] for key in ("roleTemplates", "futureField")}))
def test_v1alpha2_there_and_back(group: Object) -> None:
    assert convert(convert(group, "v1alpha1"), "v1alpha2") == group


@pytest.mark.parametrize("name", ["sglang_pd.yaml", "dynamo.yaml"])
def test_manifests_people_have(name: str) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here")
    for group in yaml.safe_load_all((SHARED / name).read_text()):
        if group and group["kind"] == "RoleBasedGroup":
            there = convert(group, "v1alpha2")
            assert [set(role) for role in there["spec"]["roles"]] == [
                (set(role) - {"template", "workload"}) | {"standalonePattern", "annotations"}
                for role in group["spec"]["roles"]
            ]
            assert not any(key.startswith(labels.CONVERSION) for key in there["metadata"].get("annotations") or {})


def test_an_edit_in_the_other_version_wins_and_what_it_cannot_say_survives() -> None:
    group = {
        "apiVersion": "workloads.x-k8s.io/v1alpha2",
        "kind": "RoleBasedGroup",
        "metadata": {"name": "g"},
        "spec": {
            "roles": [{"name": "a", "replicas": 1, "podManagementPolicy": "OrderedReady", "standalonePattern": {}}]
        },
    }
    old = convert(group, "v1alpha1")
    old["spec"]["roles"][0]["replicas"] = 5
    new = convert(old, "v1alpha2")
    assert new["spec"]["roles"][0]["replicas"] == 5
    assert new["spec"]["roles"][0]["podManagementPolicy"] == "OrderedReady"


def test_topology_annotation_is_translated() -> None:
    group = {
        "apiVersion": "workloads.x-k8s.io/v1alpha1",
        "kind": "RoleBasedGroup",
        "metadata": {"name": "g", "annotations": {labels.OLD_EXCLUSIVE_TOPOLOGY: "rack"}},
        "spec": {"roles": []},
    }
    assert convert(group, "v1alpha2")["metadata"]["annotations"] == {labels.EXCLUSIVE_TOPOLOGY: "rack"}


@pytest.mark.parametrize("to", ["v1", "v1beta1"])
def test_an_unknown_version_is_refused(to: str) -> None:
    group = {"apiVersion": "workloads.x-k8s.io/v1alpha1", "kind": "RoleBasedGroup", "metadata": {}, "spec": {}}
    with pytest.raises(ValueError, match=to):
        convert(group, to)
