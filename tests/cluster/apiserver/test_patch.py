"""Patch formats as tables. JSON patch and merge patch cases follow the examples of RFC 6902 and RFC 7386."""

from __future__ import annotations

from typing import Any

import pytest

from baton.cluster.apiserver.errors import StatusError
from baton.cluster.apiserver.patch import json_patch, merge_patch
from baton.cluster.apiserver.schema_text import builtin_types
from baton.cluster.apiserver.strategic import strategic_merge

JSON = dict[str, Any]

MERGE: list[tuple[Any, Any, Any]] = [
    # target, patch, result: the table of RFC 7386, appendix A
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "result"), MERGE)
def test_merge_patch(target: Any, patch: Any, result: Any) -> None:
    assert merge_patch(target, patch) == result


JSON_PATCH: list[tuple[JSON, list[JSON], JSON]] = [
    ({"foo": "bar"}, [{"op": "add", "path": "/baz", "value": "qux"}], {"baz": "qux", "foo": "bar"}),
    ({"foo": ["bar", "baz"]}, [{"op": "add", "path": "/foo/1", "value": "qux"}], {"foo": ["bar", "qux", "baz"]}),
    ({"foo": ["bar"]}, [{"op": "add", "path": "/foo/-", "value": ["x"]}], {"foo": ["bar", ["x"]]}),
    ({"baz": "qux", "foo": "bar"}, [{"op": "remove", "path": "/baz"}], {"foo": "bar"}),
    ({"foo": ["bar", "qux", "baz"]}, [{"op": "remove", "path": "/foo/1"}], {"foo": ["bar", "baz"]}),
    ({"baz": "qux"}, [{"op": "replace", "path": "/baz", "value": "boo"}], {"baz": "boo"}),
    (
        {"foo": {"bar": "baz", "waldo": "fred"}, "qux": {"corge": "grault"}},
        [{"op": "move", "from": "/foo/waldo", "path": "/qux/thud"}],
        {"foo": {"bar": "baz"}, "qux": {"corge": "grault", "thud": "fred"}},
    ),
    ({"a": [1, 2, 3]}, [{"op": "move", "from": "/a/0", "path": "/a/2"}], {"a": [2, 3, 1]}),
    ({"a": {"b": 1}}, [{"op": "copy", "from": "/a", "path": "/c"}], {"a": {"b": 1}, "c": {"b": 1}}),
    ({"/": 9, "~1": 10}, [{"op": "test", "path": "/~01", "value": 10}], {"/": 9, "~1": 10}),
    ({"a/b": 1}, [{"op": "replace", "path": "/a~1b", "value": 2}], {"a/b": 2}),
]


@pytest.mark.parametrize(("target", "operations", "result"), JSON_PATCH)
def test_json_patch(target: JSON, operations: list[JSON], result: JSON) -> None:
    before = repr(target)
    assert json_patch(target, operations) == result
    assert repr(target) == before


@pytest.mark.parametrize(
    ("operations", "code"),
    [
        ({"op": "add"}, 400),
        ([{"op": "add"}], 400),
        ([1], 400),
        ([{"op": "test", "path": "/a", "value": 2}], 422),
        ([{"op": "test", "path": "/t", "value": 1}], 422),  # true is not 1
        ([{"op": "remove", "path": "/nope"}], 422),
        ([{"op": "replace", "path": "/nope", "value": 1}], 422),
        ([{"op": "add", "path": "/x/y", "value": 1}], 422),
        ([{"op": "add", "path": "/list/9", "value": 1}], 422),
        ([{"op": "add", "path": "/list/01", "value": 1}], 422),
        ([{"op": "fly", "path": "/a"}], 422),
        ([{"op": "replace", "path": "", "value": 3}], 400),
        ([{"op": "test", "path": "/a", "value": 1}] * 10_001, 413),
    ],
)
def test_json_patch_that_does_not_fit(operations: Any, code: int) -> None:
    with pytest.raises(StatusError) as refused:
        json_patch({"a": 1, "t": True, "list": [1]}, operations)
    assert refused.value.code == code


def spec(*containers: JSON, **more: Any) -> JSON:
    return {"spec": {"containers": list(containers), **more}}


A, B = {"name": "a", "image": "1"}, {"name": "b", "image": "1"}
STRATEGIC: list[tuple[str, JSON, JSON, JSON]] = [
    ("changes an item by name", spec(A, B), spec({"name": "b", "image": "2"}), spec(A, {"name": "b", "image": "2"})),
    ("adds an item", spec(A), spec(B), spec(A, B)),
    ("deletes an item", spec(A, B), spec({"name": "a", "$patch": "delete"}), spec(B)),
    ("replaces a list", spec(A, B), spec({"$patch": "replace"}, B), spec(B)),
    (
        "replaces one item whole",
        spec({**A, "tty": True}),
        spec({"name": "a", "image": "3", "$patch": "replace"}),
        spec({"name": "a", "image": "3"}),
    ),
    (
        "orders items",
        spec(A, B),
        {"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}},
        spec(B, A),
    ),
    (
        "keeps unknown items where they were",
        spec(A, B, {"name": "z", "image": "1"}),
        {
            "spec": {
                "$setElementOrder/containers": [{"name": "z"}, {"name": "a"}],
                "containers": [{"name": "a", "image": "9"}],
            }
        },
        spec({"name": "z", "image": "1"}, {"name": "a", "image": "9"}, B),
    ),
    (
        "merges a set",
        {"metadata": {"finalizers": ["x"]}},
        {"metadata": {"finalizers": ["x", "y"]}},
        {"metadata": {"finalizers": ["x", "y"]}},
    ),
    (
        "deletes from a set",
        {"metadata": {"finalizers": ["x", "y"]}},
        {"metadata": {"$deleteFromPrimitiveList/finalizers": ["x"]}},
        {"metadata": {"finalizers": ["y"]}},
    ),
    (
        "replaces an atomic list",
        spec(tolerations=[{"key": "a"}]),
        spec(tolerations=[{"key": "b"}]),
        spec(tolerations=[{"key": "b"}]),
    ),
    (
        "replaces a map",
        spec(nodeSelector={"a": "1"}),
        {"spec": {"nodeSelector": {"$patch": "replace", "b": "2"}}},
        spec(nodeSelector={"b": "2"}),
    ),
    (
        "retains only named keys",
        spec(volumes=[{"name": "v", "emptyDir": {}}]),
        {"spec": {"volumes": [{"name": "v", "hostPath": {"path": "/x"}, "$retainKeys": ["name", "hostPath"]}]}},
        spec(volumes=[{"name": "v", "hostPath": {"path": "/x"}}]),
    ),
    (
        "tells ports apart by protocol",
        spec(
            {"name": "a", "ports": [{"containerPort": 53, "protocol": "TCP"}, {"containerPort": 53, "protocol": "UDP"}]}
        ),
        spec({"name": "a", "ports": [{"containerPort": 53, "protocol": "UDP", "name": "dns"}]}),
        spec(
            {
                "name": "a",
                "ports": [
                    {"containerPort": 53, "protocol": "TCP"},
                    {"containerPort": 53, "protocol": "UDP", "name": "dns"},
                ],
            }
        ),
    ),
    ("null removes", spec(A, hostname="h"), {"spec": {"hostname": None}}, spec(A)),
]


@pytest.mark.parametrize(("what", "target", "patch", "result"), STRATEGIC, ids=[c[0] for c in STRATEGIC])
def test_strategic_merge(what: str, target: JSON, patch: JSON, result: JSON) -> None:
    before = repr(target)
    assert strategic_merge(target, patch, builtin_types()["Pod"]) == result
    assert repr(target) == before


@pytest.mark.parametrize(
    ("patch", "text"),
    [
        (spec({"image": "x"}), "does not contain declared merge key: name"),
        ({"spec": {"$patch": "explode"}}, 'unknown $patch directive "explode"'),
    ],
)
def test_strategic_patches_that_are_refused(patch: JSON, text: str) -> None:
    with pytest.raises(StatusError, match=r"merge key|directive") as refused:
        strategic_merge(spec(A), patch, builtin_types()["Pod"])
    assert (refused.value.code, text in refused.value.message) == (400, True)
