"""Names, quantities, merges and CRDs: small facts that other rooms build on."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.api import crd_manifests, names
from baton.api.crd import without_conversion
from baton.api.merge import apply_edits, diff, edits, merge_patch, strategic_merge
from baton.api.quantity import parse_quantity, resolve_count


def test_names_of_both_eras() -> None:
    assert names.pod_name("sglang-pd", "prefill", 1) == "sglang-pd-prefill-1"
    assert names.old_service_name("sglang-pd", "prefill") == "sglang-pd-prefill"
    assert names.new_service_name("sglang-pd", "prefill") == "s-sglang-pd-prefill"
    assert names.workload_name("g" * 62, "role") == "g" * 62  # cut at 63, which leaves a dash at the end
    assert names.port_key("Http-Port", 1) == "http_port"
    assert names.port_key(None, 80) == "port80"
    # sha1 of "default/sglang-pd", computed with sha1sum
    assert names.group_uid("default", "sglang-pd") == "da7f1e6a10200091241a095d17aad3b3a8986e3f"


@pytest.mark.parametrize(
    ("name", "expected"), [("a-0", 0), ("a-10", 10), ("a-01", None), ("b-0", None), ("a-x", None), ("a", None)]
)
def test_ordinals(name: str, expected: int | None) -> None:
    assert names.ordinal_of(name, "a") == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", "2"),
        (4, "4"),
        ("500m", "0.5"),
        ("16Gi", str(16 * 2**30)),
        ("1.5G", "1500000000"),
        ("1e3", "1000"),
        ("1E", "1e18"),
        ("-1", "-1"),
    ],
)
def test_quantities(text: object, value: str) -> None:
    assert parse_quantity(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "x", "1Q", "1 Gi", "nan", "Gi"])
def test_a_bad_quantity_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="quantity"):
        parse_quantity(text)


@pytest.mark.parametrize(
    ("value", "total", "up", "down"),
    [(3, 10, 3, 3), ("25%", 10, 3, 2), ("0%", 10, 0, 0), ("100%", 3, 3, 3), ("2", 5, 2, 2)],
)
def test_counts(value: Any, total: int, up: int, down: int) -> None:
    assert (resolve_count(value, total, round_up=True), resolve_count(value, total, round_up=False)) == (up, down)


@pytest.mark.parametrize("value", [-1, "-1", "x", "1.5%", True, None])
def test_bad_counts_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"must"):
        resolve_count(value, 10, round_up=True)


trees = st.recursive(
    st.integers() | st.text(max_size=2) | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
)
maps = st.dictionaries(st.sampled_from("abc"), trees, max_size=3)


@given(maps, maps)
def test_a_difference_applied_gives_the_target(base: Any, target: Any) -> None:
    assert merge_patch(base, diff(base, target)) == target
    assert diff(target, target) == {}
    assert apply_edits(base, edits(base, target)) == target
    assert edits(target, target) == []


def test_strategic_merge_of_a_template() -> None:
    base = {
        "spec": {
            "containers": [{"name": "a", "image": "1", "env": [{"name": "X", "value": "1"}]}, {"name": "b"}],
            "nodeName": "n",
        }
    }
    patch = {
        "spec": {
            "containers": [
                {"name": "a", "image": "2", "env": [{"name": "Y", "value": "2"}], "args": ["x"]},
                {"name": "b", "$patch": "delete"},
                {"name": "c"},
            ],
            "nodeName": None,
        }
    }
    assert strategic_merge(base, patch) == {
        "spec": {
            "containers": [
                {
                    "name": "a",
                    "image": "2",
                    "env": [{"name": "X", "value": "1"}, {"name": "Y", "value": "2"}],
                    "args": ["x"],
                },
                {"name": "c"},
            ]
        }
    }


@pytest.mark.parametrize("patch", [{"spec": {"$retainKeys": ["a"]}}, {"spec": {"containers": [{"image": "x"}]}}])
def test_directives_we_do_not_follow_are_refused(patch: Any) -> None:
    with pytest.raises(ValueError, match=r"not supported|merge key"):
        strategic_merge({}, patch)


def walk(schema: Any, path: str = "") -> list[tuple[str, Any]]:
    found = [(path, schema)]
    for name, inner in (schema.get("properties") or {}).items():
        found += walk(inner, f"{path}.{name}")
    if "items" in schema:
        found += walk(schema["items"], f"{path}[]")
    return found


def test_crd_schema_is_structural_and_says_what_the_types_say() -> None:
    crd, *_ = crd_manifests()
    versions = {version["name"]: version for version in crd["spec"]["versions"]}
    assert [(name, v["storage"], v["served"]) for name, v in versions.items()] == [
        ("v1alpha2", True, True),
        ("v1alpha1", False, True),
    ]
    for version in versions.values():
        for path, schema in walk(version["schema"]["openAPIV3Schema"]):
            assert "type" in schema or "x-kubernetes-int-or-string" in schema, path
    found = dict(walk(versions["v1alpha2"]["schema"]["openAPIV3Schema"]))
    role = found[".spec.roles[]"]
    assert role["required"] == ["name"]
    assert role["properties"]["replicas"] == {"type": "integer", "minimum": 0}
    assert found[".spec.roles"]["x-kubernetes-list-map-keys"] == ["name"]
    assert found[".spec.roles[].podManagementPolicy"]["enum"] == ["Parallel", "OrderedReady"]
    assert found[".spec.roles[].rolloutStrategy.rollingUpdate.partition"]["x-kubernetes-int-or-string"] is True
    assert found[".spec.roles[].standalonePattern.template"]["x-kubernetes-preserve-unknown-fields"] is True


def test_without_a_converter_only_the_stored_version_is_served() -> None:
    crd, *_ = without_conversion(crd_manifests())
    assert [version["name"] for version in crd["spec"]["versions"] if version["served"]] == ["v1alpha2"]
    crd, *_ = crd_manifests({"clientConfig": {"url": "https://x"}, "conversionReviewVersions": ["v1"]})
    assert crd["spec"]["conversion"]["strategy"] == "Webhook"
