"""The cache keeps its promises whatever order news arrives in."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from baton.cluster_client import Cache, Change, Client, ClusterConfig
from baton.cluster_client.resources import PODS


def pod(name: str, version: int, uid: str, *, owner: str = "", app: str = "") -> dict[str, Any]:
    meta: dict[str, Any] = {"name": name, "namespace": "default", "uid": uid, "resourceVersion": str(version)}
    if owner:
        meta["ownerReferences"] = [{"uid": owner}]
    if app:
        meta["labels"] = {"app": app}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta}


def new_cache() -> Cache:
    return Cache(Client(ClusterConfig("http://127.0.0.1:9")), PODS, index_labels=["app"])


def names(pods: list[dict[str, Any]]) -> list[str]:
    return [item["metadata"]["name"] for item in pods]


def test_indexes_follow_changes() -> None:
    cache = new_cache()
    cache.apply(Change("ADDED", pod("a", 1, "u1", owner="o1", app="x")))
    cache.apply(Change("ADDED", pod("b", 2, "u2", owner="o1", app="y")))
    assert names(cache.by_owner("o1")) == ["a", "b"]
    assert names(cache.by_label("app", "x")) == ["a"]
    cache.apply(Change("MODIFIED", pod("a", 3, "u1", owner="o2", app="y")))
    assert names(cache.by_owner("o1")) == ["b"]
    assert names(cache.by_label("app", "y", "default")) == ["a", "b"]
    cache.apply(Change("DELETED", pod("b", 4, "u2", owner="o1", app="y")))
    assert (cache.by_owner("o1"), names(cache.by_label("app", "y")), names(cache.list("default"))) == ([], ["a"], ["a"])


def test_own_writes_are_read_and_late_news_does_not_undo_them() -> None:
    cache = new_cache()
    told: list[tuple[str, str]] = []
    cache.subscribe(
        lambda change: told.append((change.type, change.object["metadata"]["resourceVersion"] if change.object else ""))
    )
    cache.apply(Change("ADDED", pod("a", 5, "u1")))
    cache.observe(pod("a", 9, "u1"))
    cache.apply(Change("MODIFIED", pod("a", 7, "u1")))  # the watch lags behind our write
    found = cache.get("a", "default")
    assert found is not None and found["metadata"]["resourceVersion"] == "9"
    assert told == [("ADDED", "5"), ("MODIFIED", "9")]


def test_an_answer_that_arrives_after_the_deletion_does_not_revive_the_object() -> None:
    cache = new_cache()
    cache.apply(Change("ADDED", pod("a", 5, "u1")))
    cache.apply(Change("DELETED", pod("a", 6, "u1")))
    cache.observe(pod("a", 5, "u1"))
    assert cache.get("a", "default") is None
    cache.observe(pod("a", 7, "u2"))
    cache.apply(Change("DELETED", pod("a", 6, "u1")))  # late news about the first life
    found = cache.get("a", "default")
    assert found is not None and found["metadata"]["uid"] == "u2"


steps = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.integers(1, 3), st.sampled_from(["put", "delete"]), st.sampled_from(["", "o1", "o2"])
    ),
    max_size=40,
)


@given(steps)
def test_indexes_always_equal_a_scan(history: list[tuple[str, int, str, str]]) -> None:
    cache = new_cache()
    for version, (name, life, action, owner) in enumerate(history):
        item = pod(name, version, f"{name}{life}", owner=owner, app=owner)
        cache.apply(Change("DELETED" if action == "delete" else "MODIFIED", item))
    for owner in ("o1", "o2"):
        scan = [i for i in cache.list() if [{"uid": owner}] == i["metadata"].get("ownerReferences")]
        assert cache.by_owner(owner) == scan
        assert cache.by_label("app", owner) == scan
    assert cache.list("default") == cache.list()
