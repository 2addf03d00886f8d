"""The client against a scripted HTTP server: what it sends, and what it makes of answers and of broken watches."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from baton.cluster_client import (
    AlreadyExists,
    ApiError,
    Client,
    ClusterConfig,
    Conflict,
    Gone,
    Invalid,
    NotFound,
    Unreachable,
    follow,
)
from baton.cluster_client.credentials import StaticToken
from baton.cluster_client.resources import CONFIG_MAPS, NODES, PODS, ROLE_BASED_GROUPS

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[Client]:
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{tail:.*}", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with Client(ClusterConfig(f"http://127.0.0.1:{port}", StaticToken("s3cret"))) as client:
            yield client
    finally:
        await runner.cleanup()


def pod(name: str, version: int, uid: str | None = None) -> dict[str, Any]:
    meta = {"name": name, "namespace": "default", "uid": uid or f"uid-{name}", "resourceVersion": str(version)}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta}


def status(code: int, reason: str, message: str = "", **more: Any) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": message, **more}
    return web.json_response(body, status=code)


@pytest.mark.parametrize(
    ("resource", "namespace", "name", "subresource", "path"),
    [
        (PODS, "default", "p", None, "/api/v1/namespaces/default/pods/p"),
        (PODS, None, None, None, "/api/v1/pods"),
        (NODES, None, "n", "status", "/api/v1/nodes/n/status"),
        (
            ROLE_BASED_GROUPS,
            "x",
            "g",
            "scale",
            "/apis/workloads.x-k8s.io/v1alpha2/namespaces/x/rolebasedgroups/g/scale",
        ),
        (PODS, "a/b", "../c", None, "/api/v1/namespaces/a%2Fb/pods/..%2Fc"),
    ],
)
def test_paths(resource: Any, namespace: str | None, name: str | None, subresource: str | None, path: str) -> None:
    assert resource.path(namespace, name, subresource) == path


@pytest.mark.parametrize(("namespace", "name"), [(None, "p"), ("default", "")])
def test_a_path_that_would_hit_a_whole_collection_is_refused(namespace: str | None, name: str) -> None:
    with pytest.raises(ValueError, match="Pod"):
        PODS.path(namespace, name)


async def test_list_follows_continue_and_fills_in_the_kind() -> None:
    seen: list[dict[str, str]] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(dict(request.query))
        bare = {"metadata": {"name": f"p{len(seen)}"}}
        more = {"continue": "token"} if len(seen) == 1 else {}
        return web.json_response({"items": [bare], "metadata": {"resourceVersion": "7", **more}})

    async with served(handler) as client:
        result = await client.list(PODS, "default", label_selector="a=b", field_selector="spec.nodeName=n")
    assert [item["metadata"]["name"] for item in result.items] == ["p1", "p2"]
    assert {item["kind"] for item in result.items} == {"Pod"}
    assert result.resource_version == "7"
    assert [query.get("continue") for query in seen] == [None, "token"]
    assert {(q["labelSelector"], q["fieldSelector"]) for q in seen} == {("a=b", "spec.nodeName=n")}


@pytest.mark.parametrize(
    ("kind", "content_type"),
    [
        ("json", "application/json-patch+json"),
        ("merge", "application/merge-patch+json"),
        ("strategic", "application/strategic-merge-patch+json"),
        ("apply", "application/apply-patch+yaml"),
    ],
)
async def test_patch_names_its_kind_and_our_field_manager(kind: Any, content_type: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(
            {"type": request.content_type, "query": dict(request.query), "body": await request.json()}
        )

    async with served(handler) as client:
        answer = await client.patch(CONFIG_MAPS, "c", "default", {"data": {}}, kind=kind, force=True, dry_run=True)
    assert answer["type"] == content_type
    assert answer["query"] == {"fieldManager": "baton", "dryRun": "All"} | (
        {"force": "true"} if kind == "apply" else {}
    )


async def test_delete_with_uid_is_a_precondition_and_credentials_are_sent() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer s3cret"
        return web.json_response({"sent": await request.json()})

    async with served(handler) as client:
        answer = await client.delete(PODS, "p", "default", uid="u", grace_period_s=0, propagation="Foreground")
    assert answer["sent"]["preconditions"] == {"uid": "u"}
    assert answer["sent"]["gracePeriodSeconds"] == 0
    assert answer["sent"]["propagationPolicy"] == "Foreground"


@pytest.mark.parametrize(
    ("code", "reason", "kind", "retryable"),
    [
        (404, "NotFound", NotFound, False),
        (409, "AlreadyExists", AlreadyExists, True),
        (409, "Conflict", Conflict, True),
        (410, "Expired", Gone, True),
        (422, "Invalid", Invalid, False),
        (403, "Forbidden", ApiError, False),
        (503, "ServiceUnavailable", ApiError, True),
    ],
)
async def test_failures_are_typed(code: int, reason: str, kind: type[ApiError], retryable: bool) -> None:
    causes = [{"field": "spec.x", "message": "no", "reason": "FieldValueInvalid"}]

    async def handler(_: web.Request) -> web.Response:
        return status(code, reason, "because", details={"causes": causes})

    async with served(handler) as client:
        with pytest.raises(kind) as caught:
            await client.get(PODS, "p", "default")
    assert (caught.value.code, caught.value.reason, caught.value.message) == (code, reason, "because")
    assert caught.value.causes == causes
    assert caught.value.retryable is retryable


async def test_too_many_requests_is_waited_out() -> None:
    answers = [web.Response(status=429, headers={"Retry-After": "0"}), web.json_response({"kind": "Pod"})]

    async def handler(_: web.Request) -> web.Response:
        return answers.pop(0)

    async with served(handler) as client:
        client_answer = await client.get(PODS, "p", "default")
    assert client_answer == {"kind": "Pod"}


async def test_no_server_and_no_json_are_unreachable() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(text="<html>")

    async with served(handler) as client:
        with pytest.raises(Unreachable, match="not JSON"):
            await client.get(PODS, "p", "default")
    async with Client(ClusterConfig("http://127.0.0.1:9")) as client:
        with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9"):
            await client.get(PODS, "p", "default")


class Script:
    """Answers list and watch requests from a list of steps; each watch step is a list of events or a Response."""

    def __init__(self, lists: list[tuple[list[dict[str, Any]], int]], watches: list[Any]) -> None:
        self.lists, self.watches = lists, watches
        self.watched_from: list[str] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.query.get("watch") != "true":
            items, version = self.lists.pop(0)
            return web.json_response({"items": items, "metadata": {"resourceVersion": str(version)}})
        self.watched_from.append(request.query["resourceVersion"])
        if not self.watches:
            return status(500, "InternalError", "script is over")
        step = self.watches.pop(0)
        if isinstance(step, web.Response):
            return step
        response = web.StreamResponse()
        await response.prepare(request)
        raw = b"".join(json.dumps(event).encode() + b"\n" for event in step)
        for start in range(0, len(raw), 1000):  # events must not depend on how TCP cuts them
            await response.write(raw[start : start + 1000])
        return response


class FollowingStoppedError(Exception):
    pass


async def collect(script: Script) -> list[tuple[str, str]]:
    """What `follow` says until the script is over (its back-off then ends the test)."""
    said: list[tuple[str, str]] = []

    async def stop(_: float) -> None:
        raise FollowingStoppedError

    async with served(script.answer) as client:
        with pytest.raises(FollowingStoppedError):
            async for change in follow(client, PODS, "default", sleep=stop):
                said.append((change.type, change.object["metadata"]["name"] if change.object else ""))
    return said


def event(kind: str, obj: dict[str, Any]) -> dict[str, Any]:
    return {"type": kind, "object": obj}


async def test_follow_resumes_after_the_last_event_or_bookmark() -> None:
    bookmark = {"kind": "Pod", "metadata": {"resourceVersion": "20"}}
    script = Script(
        [([pod("a", 1)], 5)],
        [[event("ADDED", pod("b", 6))], [event("BOOKMARK", bookmark)], [event("DELETED", pod("a", 21))]],
    )
    assert await collect(script) == [("ADDED", "a"), ("SYNCED", ""), ("ADDED", "b"), ("DELETED", "a")]
    assert script.watched_from == ["5", "6", "20", "21"]


@pytest.mark.parametrize("as_event", [True, False])
async def test_follow_relists_when_the_server_forgot_and_tells_the_difference(as_event: bool) -> None:
    gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"}
    step: Any = [event("ERROR", gone)] if as_event else status(410, "Expired", "too old")
    script = Script(
        [
            ([pod("same", 1), pod("changed", 2), pod("gone", 3), pod("reborn", 4, "first")], 5),
            ([pod("same", 1), pod("changed", 9), pod("new", 10), pod("reborn", 8, "second")], 11),
        ],
        [step],
    )
    said = await collect(script)
    assert said[:5] == [("ADDED", "same"), ("ADDED", "changed"), ("ADDED", "gone"), ("ADDED", "reborn"), ("SYNCED", "")]
    assert sorted(said[5:]) == [
        ("ADDED", "new"),
        ("ADDED", "reborn"),
        ("DELETED", "gone"),
        ("DELETED", "reborn"),
        ("MODIFIED", "changed"),
    ]
    assert script.watched_from == ["5", "11"]


async def test_an_event_longer_than_any_buffer_arrives_whole() -> None:
    big = pod("big", 6)
    big["metadata"]["annotations"] = {"x": "y" * 500_000}
    script = Script([([], 5)], [[event("ADDED", big)]])
    assert await collect(script) == [("SYNCED", ""), ("ADDED", "big")]
