"""Watches and lists on the wire: order, selectors, resume, bookmarks, 410, pages."""

from __future__ import annotations

import threading
from typing import Any

from tests.cluster.apiserver.conftest import NS, Cluster, config_map, pod

JSON = dict[str, Any]


def brief(event: JSON) -> tuple[str, str]:
    return event["type"], event["object"]["metadata"].get("name", "")


def patch(cluster: Cluster, path: str, body: JSON) -> JSON:
    answer = cluster.http("PATCH", path, body, content_type="application/merge-patch+json")
    assert answer.code == 200, answer.raw
    return answer.json


def test_events_come_in_order_and_a_watch_resumes_where_it_was(cluster: Cluster) -> None:
    cluster.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "order"}})
    base = "/api/v1/namespaces/order/configmaps"
    start = cluster.http("GET", base).json["metadata"]["resourceVersion"]
    cluster.create(base, config_map("a"))
    changed = patch(cluster, f"{base}/a", {"data": {"k": "v"}})
    cluster.http("DELETE", f"{base}/a")
    stream = cluster.watch(f"{base}?watch=true&resourceVersion={start}")
    events = [stream.next() for _ in range(3)]
    assert [brief(e) for e in events] == [("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a")]
    revisions = [int(e["object"]["metadata"]["resourceVersion"]) for e in events]
    assert revisions == sorted(set(revisions))
    resumed = cluster.watch(f"{base}?watch=true&resourceVersion={changed['metadata']['resourceVersion']}")
    assert brief(resumed.next()) == ("DELETED", "a")
    cluster.create(base, config_map("b"))
    assert brief(stream.next()) == brief(resumed.next()) == ("ADDED", "b")


def test_objects_entering_and_leaving_a_selector_come_and_go(cluster: Cluster) -> None:
    base = f"{NS}/configmaps"
    body = config_map("moves")
    body["metadata"]["labels"] = {"tier": "tin"}
    made = cluster.create(base, body)
    start = made["metadata"]["resourceVersion"]
    stream = cluster.watch(f"{base}?watch=1&labelSelector=tier%3Dgold&resourceVersion={start}")
    patch(cluster, f"{base}/moves", {"metadata": {"labels": {"tier": "gold"}}})
    assert brief(stream.next()) == ("ADDED", "moves")
    patch(cluster, f"{base}/moves", {"data": {"x": "y"}})
    assert brief(stream.next()) == ("MODIFIED", "moves")
    left = patch(cluster, f"{base}/moves", {"metadata": {"labels": {"tier": "tin"}}})
    event = stream.next()
    assert brief(event) == ("DELETED", "moves")
    assert event["object"]["metadata"]["resourceVersion"] == left["metadata"]["resourceVersion"]
    assert event["object"]["metadata"]["labels"] == {"tier": "gold"}


def test_initial_events_end_with_a_bookmark(cluster: Cluster) -> None:
    cluster.create(f"{NS}/pods", pod("listed"))
    query = "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"
    stream = cluster.watch(f"{NS}/pods?{query}&fieldSelector=metadata.name%3Dlisted")
    assert brief(stream.next()) == ("ADDED", "listed")
    mark = stream.next()
    assert mark["type"] == "BOOKMARK"
    assert mark["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
    cluster.http("DELETE", f"{NS}/pods/listed")
    assert brief(stream.next()) == ("DELETED", "listed")
    refused = cluster.http("GET", f"{NS}/pods?watch=true&sendInitialEvents=true")
    assert refused.code == 422
    assert "sendInitialEvents requires setting resourceVersionMatch" in refused.json["message"]


def test_a_watch_without_revision_begins_with_what_exists(cluster: Cluster) -> None:
    cluster.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "begin"}})
    base = "/api/v1/namespaces/begin/configmaps"
    for name in ("b", "a"):
        cluster.create(base, config_map(name))
    for query in ("watch=True", "watch=true&resourceVersion=0"):
        stream = cluster.watch(f"{base}?{query}")
        assert [brief(stream.next()), brief(stream.next())] == [("ADDED", "a"), ("ADDED", "b")]
    assert cluster.watch(f"{base}?watch=true&timeoutSeconds=1").rest()[-1]["type"] == "ADDED"


def test_a_watch_from_forgotten_history_gets_410(cluster: Cluster) -> None:
    made = cluster.create(f"{NS}/configmaps", config_map("old"))
    page = cluster.http("GET", f"{NS}/configmaps?limit=1").json["metadata"]
    patch(cluster, f"{NS}/configmaps/old", {"data": {"a": "1"}})
    patch(cluster, f"{NS}/configmaps/old", {"data": {"a": "2"}})
    cluster.run(cluster.store.compact(cluster.store.committed_revision))
    stream = cluster.watch(f"{NS}/configmaps?watch=true&resourceVersion={made['metadata']['resourceVersion']}")
    assert stream.code == 200
    event = stream.next()
    assert event["type"] == "ERROR"
    assert (event["object"]["code"], event["object"]["reason"]) == (410, "Expired")
    assert "too old resource version" in event["object"]["message"]
    if "continue" in page:
        expired = cluster.http("GET", f"{NS}/configmaps?limit=1&continue={page['continue']}")
        assert (expired.code, expired.json["reason"]) == (410, "Expired")


def test_pages_show_one_moment(cluster: Cluster) -> None:
    cluster.create("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "pages"}})
    base = "/api/v1/namespaces/pages/configmaps"
    for name in "abcde":
        cluster.create(base, config_map(name))
    first = cluster.http("GET", f"{base}?limit=2").json
    assert first["metadata"]["remainingItemCount"] == 3
    cluster.http("DELETE", f"{base}/d")
    cluster.create(base, config_map("c2"))
    names = [o["metadata"]["name"] for o in first["items"]]
    token = first["metadata"]["continue"]
    while token:
        page = cluster.http("GET", f"{base}?limit=2&continue={token}").json
        assert page["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
        names += [o["metadata"]["name"] for o in page["items"]]
        token = page["metadata"].get("continue")
    assert names == list("abcde")
    exact = f"{base}?resourceVersionMatch=Exact&resourceVersion={first['metadata']['resourceVersion']}"
    assert [o["metadata"]["name"] for o in cluster.http("GET", exact).json["items"]] == list("abcde")


def test_list_options_that_make_no_sense(cluster: Cluster) -> None:
    base = f"{NS}/pods"
    table = [
        ("resourceVersion=abc", 400, "invalid syntax"),
        ("resourceVersion=99999999", 504, "Too large resource version: 99999999"),
        ("continue=nonsense", 400, "invalid continue token"),
        ("labelSelector=a%3D%3D%3D", 400, "unable to parse requirement"),
        ("fieldSelector=spec.nope%3D1", 400, "field label not supported: spec.nope"),
        ("resourceVersionMatch=Exact", 422, "forbidden unless resourceVersion is provided"),
        ("limit=x", 400, "invalid syntax"),
    ]
    for query, code, text in table:
        answer = cluster.http("GET", f"{base}?{query}")
        assert answer.code == code, query
        assert text in answer.json["message"], query


def test_tables_in_watches_carry_columns_once(cluster: Cluster) -> None:
    cluster.create(f"{NS}/pods", pod("tabled"))
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
    stream = cluster.watch(f"{NS}/pods?watch=true&fieldSelector=metadata.name%3Dtabled", accept)
    first = stream.next()["object"]
    assert [c["name"] for c in first["columnDefinitions"]][:4] == ["Name", "Ready", "Status", "Restarts"]
    patch(cluster, f"{NS}/pods/tabled/status", {"status": {"phase": "Running"}})
    second = stream.next()["object"]
    assert second["columnDefinitions"] is None
    assert second["rows"][0]["cells"][2] == "Running"


def test_many_writers_lose_no_update(cluster: Cluster) -> None:
    """Optimistic concurrency: increments with PUT and retry on 409 all count; stale writes never win."""
    path = f"{NS}/configmaps/counter"
    cluster.create(f"{NS}/configmaps", config_map("counter", n="0"))
    conflicts = []

    def increment() -> None:
        done = 0
        while done < 10:
            found = cluster.http("GET", path).json
            found["data"]["n"] = str(int(found["data"]["n"]) + 1)
            answer = cluster.http("PUT", path, found)
            if answer.code == 200:
                done += 1
            else:
                assert (answer.code, answer.json["reason"]) == (409, "Conflict")
                assert "the object has been modified" in answer.json["message"]
                conflicts.append(1)

    threads = [threading.Thread(target=increment) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert cluster.http("GET", path).json["data"]["n"] == "60"
