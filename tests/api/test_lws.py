"""LeaderWorkerSet: both published manifests pass, upstream's rules hold with its paths and texts, defaults are its."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.api.test_validation import changed
from tests.controllers.builders import leader_worker_set, pod_template

from baton.api import crd_manifests, lws
from baton.api.lws_validation import validate

SHARED = Path(__file__).parents[3] / "shared" / "manifests"
Object = dict[str, Any]
GOOD = leader_worker_set(2, 4)
SUBGROUPS = leader_worker_set(2, 4, template={"subGroupPolicy": {"subGroupSize": 2}})
TEMPLATE = "spec.leaderWorkerTemplate"
ROLLING = "spec.rolloutStrategy.rollingUpdateConfiguration"
SUBGROUP_SIZE = f"{TEMPLATE}.subGroupPolicy.subGroupSize"


@pytest.mark.parametrize("name", ["sglang_multi.yaml", "vllm_multi.yaml"])
def test_published_manifests_are_good(name: str) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    found = next(doc for doc in yaml.safe_load_all(path.read_text()) if doc["kind"] == "LeaderWorkerSet")
    assert validate(found) == []


@pytest.mark.parametrize(
    ("path", "value", "field", "text"),
    [
        ("metadata.name", "1a", "metadata.name", "DNS-1035"),
        ("metadata.name", "a.b", "metadata.name", "DNS-1035"),
        ("metadata.name", "x" * 64, "metadata.name", "DNS-1035"),
        ("metadata.name", "x" * 60, "metadata.name", "a host name has at most 63"),
        ("spec.replicas", -1, "spec.replicas", "Invalid value: -1: replicas must be equal or greater than 0"),
        ("spec.replicas", 1_000_001, "spec.replicas", "replicas must be equal or less than 1000000"),
        (f"{TEMPLATE}.size", 0, f"{TEMPLATE}.size", "Invalid value: 0: size must be equal or greater than 1"),
        (f"{TEMPLATE}.size", 2_000_000_000, "spec.replicas", "the product of replicas and worker replicas must not exceed 2147483647"),
        (f"{TEMPLATE}.restartPolicy", "Always", f"{TEMPLATE}.restartPolicy", "RecreateGroupAfterStart"),
        (f"{TEMPLATE}.workerTemplate", {"spec": {}}, f"{TEMPLATE}.workerTemplate.spec.containers", "needs at least one container"),
        (f"{TEMPLATE}.leaderTemplate", {}, f"{TEMPLATE}.leaderTemplate.spec", "is required"),
        (f"{TEMPLATE}.volumeClaimTemplates", [{"spec": {}}], f"{TEMPLATE}.volumeClaimTemplates[0].metadata.name", "Required value"),
        (f"{TEMPLATE}.subGroupPolicy", {}, SUBGROUP_SIZE, "Required value"),
        (f"{TEMPLATE}.subGroupPolicy", {"subGroupSize": 0}, SUBGROUP_SIZE, "subGroupSize must be equal or greater than 1"),
        (f"{TEMPLATE}.subGroupPolicy", {"subGroupSize": 5}, SUBGROUP_SIZE, "subGroupSize cannot be larger than size"),
        (f"{TEMPLATE}.subGroupPolicy", {"subGroupSize": 5}, SUBGROUP_SIZE, "size or size - 1 must be divisible by subGroupSize"),
        (f"{TEMPLATE}.subGroupPolicy", {"subGroupSize": 2, "subGroupPolicyType": "LeaderExcluded"}, SUBGROUP_SIZE, "size-1 must be divisible by subGroupSize when using LeaderExcluded"),
        ("metadata.annotations", {"leaderworkerset.sigs.k8s.io/subgroup-exclusive-topology": "rack"}, "metadata.annotations.leaderworkerset.sigs.k8s.io/subgroup-exclusive-topology", "without subGroupSize set"),
        (f"{ROLLING}.partition", -1, f"{ROLLING}.partition", "Invalid value: -1: must be greater than or equal to 0"),
        (f"{ROLLING}.maxUnavailable", -1, f"{ROLLING}.maxUnavailable", "must be greater than or equal to 0"),
        (f"{ROLLING}.maxUnavailable", 0, f"{ROLLING}.maxUnavailable", "Invalid value: 0: must not be 0 when `maxSurge` is 0"),
        (f"{ROLLING}.maxUnavailable", "101%", f"{ROLLING}.maxUnavailable", 'Invalid value: "101%": must not be greater than 100%'),
        (f"{ROLLING}.maxSurge", "two", f"{ROLLING}.maxSurge", "a valid percent string"),
        ("spec.rolloutStrategy.type", "Recreate", "spec.rolloutStrategy.type", "RollingUpdate"),
        ("spec.startupPolicy", "Never", "spec.startupPolicy", "LeaderReady"),
        ("spec.networkConfig", {"subdomainPolicy": "None"}, "spec.networkConfig.subdomainPolicy", "UniquePerReplica"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(path: str, value: Any, field: str, text: str) -> None:
    errors = validate(changed(GOOD, path, value))
    assert any(error.field == field and text in error.message for error in errors), list(map(str, errors))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{ROLLING}.partition", 9),
        (f"{ROLLING}.maxUnavailable", 9),
        (f"{ROLLING}.maxSurge", "100%"),
        ("spec.replicas", 0),
        (f"{TEMPLATE}.size", 1),
        (f"{TEMPLATE}.subGroupPolicy", {"subGroupSize": 3}),
        (f"{TEMPLATE}.subGroupPolicy", {"subGroupSize": 3, "subGroupPolicyType": "LeaderExcluded"}),
        (f"{TEMPLATE}.restartPolicy", "Default"),
    ],
)
def test_what_upstream_accepts_is_accepted(path: str, value: Any) -> None:
    assert validate(changed(GOOD, path, value)) == []


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (GOOD, SUBGROUPS, "cannot enable subGroupSize after the lws is already created"),
        (SUBGROUPS, GOOD, "cannot remove subGroupSize after enabled"),
        (SUBGROUPS, changed(SUBGROUPS, SUBGROUP_SIZE, 4), "Invalid value: 4: field is immutable"),
        (GOOD, changed(GOOD, "spec.networkConfig", {"subdomainPolicy": None}), "cannot set subdomainPolicy as null"),
    ],
)
def test_what_may_not_change_does_not(old: Object, new: Object, text: str) -> None:
    (error,) = validate(new, old)
    assert text in error.message
    assert validate(old, old) == []


def test_size_and_templates_may_change() -> None:
    new = changed(changed(GOOD, f"{TEMPLATE}.size", 2), f"{TEMPLATE}.workerTemplate", pod_template("img:2"))
    assert validate(new, GOOD) == []


def test_the_deprecated_policy_is_stored_as_what_it_means() -> None:
    old = changed(GOOD, f"{TEMPLATE}.restartPolicy", "Default")
    assert lws.complete(old)["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "None"
    assert old["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "Default", "the argument is not changed"
    for other in (GOOD, {}, {"spec": {"leaderWorkerTemplate": None}}):
        assert lws.complete(other) is other


def test_the_crd_has_upstreams_names_columns_defaults_and_scale() -> None:
    crd = next(one for one in crd_manifests() if one["metadata"]["name"] == "leaderworkersets.leaderworkerset.x-k8s.io")
    assert crd["spec"]["names"]["shortNames"] == ["lws"]
    (version,) = crd["spec"]["versions"]
    assert [column["name"] for column in version["additionalPrinterColumns"] if not column.get("priority")] == [
        "Ready", "Desired", "Up-to-date", "Age",
    ]  # fmt: skip
    assert version["subresources"]["scale"]["labelSelectorPath"] == ".status.hpaPodSelector"
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    assert (spec["replicas"]["default"], spec["startupPolicy"]["default"]) == (1, "LeaderCreated")
    assert spec["networkConfig"]["default"] == {}
    assert spec["networkConfig"]["properties"]["subdomainPolicy"]["default"] == "Shared"
    rolling = spec["rolloutStrategy"]["properties"]["rollingUpdateConfiguration"]["properties"]
    assert [rolling[name]["default"] for name in ("partition", "maxUnavailable", "maxSurge")] == [0, 1, 0]
    template = spec["leaderWorkerTemplate"]
    assert template["required"] == ["workerTemplate"]
    assert template["properties"]["size"]["default"] == 1
    assert template["properties"]["restartPolicy"]["default"] == "RecreateGroupOnPodRestart"
