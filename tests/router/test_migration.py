"""A worker dies in mid-stream: the client's stream goes on with no gap, duplicate or change; or ends with an error event."""

import asyncio
import json
from typing import Any

import pytest
from tests.fakes.fake_worker import expected_text
from tests.fakes.router_bed import Bed, Reply, bed, connect, eventually, http_request

MESSAGES = [{"role": "user", "content": "tell me"}]
CHAT: dict[str, Any] = {"model": "fake", "messages": MESSAGES, "max_tokens": 12, "stream": True}
COMPLETION: dict[str, Any] = {"model": "fake", "prompt": "once", "max_tokens": 12, "stream": True}
GENERATE: dict[str, Any] = {"text": "once", "sampling_params": {"max_new_tokens": 12}, "stream": True}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION, "/generate": GENERATE}
PROMPTS = {"/v1/chat/completions": json.dumps(MESSAGES), "/v1/completions": "once", "/generate": "once"}


def with_n(path: str, n: int) -> dict[str, Any]:
    body = dict(ROUTES[path])
    if path == "/generate":
        body["sampling_params"] = {"max_new_tokens": 12, "n": n}
    else:
        body["n"] = n
    return body


def texts_of(path: str, reply: Reply) -> dict[int, str]:
    """Text per choice; checks the form of the stream on the way."""
    assert reply.status == 200, reply.body
    events = reply.events
    assert events[-1] == "[DONE]"
    texts: dict[int, str] = {}
    finished: set[int] = set()
    roles: list[int] = []
    ids, created = set(), set()
    for event in events[:-1]:
        assert "error" not in event, event
        if path == "/generate":
            index = event.get("index", 0)
            assert event["text"].startswith(texts.get(index, ""))
            assert len(event["text"]) > len(texts.get(index, ""))
            texts[index] = event["text"]
            ids.add(event["meta_info"]["id"])
            if event["meta_info"]["finish_reason"] is not None:
                finished.add(index)
            continue
        ids.add(event["id"])
        created.add(event["created"])
        for choice in event["choices"]:
            index = choice["index"]
            assert index not in finished, "an event after the finish"
            if path == "/v1/completions":
                texts[index] = texts.get(index, "") + choice["text"]
            else:
                if "role" in choice["delta"]:
                    roles.append(index)
                    assert index not in texts, "the role comes first"
                texts[index] = texts.get(index, "") + choice["delta"].get("content", "")
            if choice["finish_reason"] is not None:
                finished.add(index)
    assert len(ids) == 1, "one response has one id"
    assert len(created) <= 1, "one response has one creation time"
    assert finished == set(texts)
    if path == "/v1/chat/completions":
        assert sorted(roles) == sorted(texts), "one role per choice"
    return texts


def expected(path: str, n: int) -> dict[int, str]:
    return {choice: expected_text(PROMPTS[path], choice, 12 - 3 * choice) for choice in range(n)}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("tokens", [0, 1, 5, 8, 11])
async def test_a_stream_goes_on_elsewhere(path: str, n: int, tokens: int):
    async with bed(prefill=2, decode=2) as b:
        b.decode[0].faults.die_after_tokens = tokens
        b.decode[1].faults.die_after_tokens = tokens
        b.decode[1].faults.die_count = 0
        reply = await b.ask(path, with_n(path, n))
        assert texts_of(path, reply) == expected(path, n)
        assert b.decode[0].faults.die_count == 0, "the fault happened"


async def test_usage_counts_what_had_finished_before_the_death():
    async with bed(prefill=1, decode=2) as b:
        b.decode[0].faults.die_after_tokens = 8  # choice 2 (6 tokens) has ended by then
        body = with_n("/v1/chat/completions", 3) | {"stream_options": {"include_usage": True}}
        reply = await b.ask("/v1/chat/completions", body)
        assert texts_of("/v1/chat/completions", reply) == expected("/v1/chat/completions", 3)
        usage = reply.events[-2]["usage"]
        assert usage == {"prompt_tokens": 7, "total_tokens": 7 + 12 + 9 + 6, "completion_tokens": 12 + 9 + 6}
        assert b.decode[1].seen[0].body["baton_resume"]["output_ids"][2] is None


async def test_the_pair_is_new_and_so_are_room_and_rid():
    async with bed(prefill=2, decode=2) as b:
        b.decode[0].faults.die_after_tokens = 4
        await b.ask("/v1/completions", COMPLETION | {"rid": "mine"})
        first, second = b.decode[0].seen[0].body, b.decode[1].seen[0].body
        assert first["bootstrap_room"] != second["bootstrap_room"]
        assert first["rid"] == "mine"
        assert not second["rid"].startswith("mine")
        assert second["baton_resume"]["created"] == 1700000000 + b.decode[0].port


async def test_a_stream_survives_as_many_deaths_as_allowed():
    async with bed(prefill=1, decode=2) as b:
        for worker in b.decode:
            worker.faults.die_after_tokens = 3
            worker.faults.die_count = 1
        reply = await b.ask("/v1/completions", COMPLETION)
        assert texts_of("/v1/completions", reply) == expected("/v1/completions", 1)


async def test_one_death_too_many_ends_in_an_error_event():
    async with bed(prefill=1, decode=2) as b:
        for worker in b.decode:
            worker.faults.die_after_tokens = 3
            worker.faults.die_count = 100
        reply = await b.ask("/v1/completions", COMPLETION)
        last = reply.events[-1]
        assert last["error"]["type"] == "stream_lost"
        assert last["error"]["request_id"] == reply.headers["x-request-id"]


async def test_a_retryable_error_event_migrates():
    async with bed(prefill=1, decode=2) as b:
        b.decode[0].faults.error_event_after = 5
        reply = await b.ask("/v1/completions", COMPLETION)
        assert texts_of("/v1/completions", reply) == expected("/v1/completions", 1)


async def test_an_error_event_that_no_retry_helps_reaches_the_client():
    async with bed(prefill=1, decode=2) as b:
        b.decode[0].faults.error_event_after = 5
        b.decode[0].faults.error_event = b'{"error":{"message":"bad","code":400,"retryable":false}}'
        reply = await b.ask("/v1/completions", COMPLETION)
        assert reply.events[-1] == {"error": {"message": "bad", "code": 400, "retryable": False}}
        assert not b.decode[1].seen


async def test_an_error_as_the_first_event_is_an_error_answer():
    async with bed(prefill=1, decode=1) as b:
        b.decode[0].faults.error_event_after = 0
        b.decode[0].faults.error_event = b'{"error":{"message":"bad","code":400,"retryable":false}}'
        reply = await b.ask("/v1/completions", COMPLETION)
        assert reply.status == 400
        assert reply.json["error"]["message"] == "bad"


async def test_workers_that_are_not_ours_end_in_an_error_event():
    async with bed(prefill=1, decode=2, sends_token_ids=False) as b:
        b.decode[0].faults.die_after_tokens = 5
        reply = await b.ask("/v1/completions", COMPLETION)
        assert reply.status == 200
        assert reply.events[-1]["error"]["retryable"] is True
        assert not b.decode[1].seen


async def test_workers_that_are_not_ours_are_retried_before_the_first_event():
    async with bed(prefill=1, decode=2, sends_token_ids=False) as b:
        b.decode[0].faults.die_before_answer = 1
        reply = await b.ask("/v1/completions", COMPLETION)
        assert texts_of("/v1/completions", reply) == expected("/v1/completions", 1)


async def test_a_worker_that_cannot_resume_never_repeats_text():
    async with bed(prefill=1, decode=2) as b:
        b.decode[0].faults.die_after_tokens = 5
        b.decode[1].sends_token_ids = False
        reply = await b.ask("/v1/completions", COMPLETION)
        *events, last = reply.events
        assert "cannot continue" in last["error"]["message"]
        text = "".join(event["choices"][0]["text"] for event in events)
        assert text == expected_text("once", 0, 5)


async def test_the_death_of_prefill_after_the_first_event_is_ignored():
    async with bed(prefill=1, decode=1) as b:
        b.prefill[0].faults.no_answer = True
        b.decode[0].gate, b.decode[0].gate_at = asyncio.Event(), 2
        client = await connect(b.router.port)
        client.send(http_request("/v1/completions", COMPLETION))
        await client.body_with(b"data: ")
        b.prefill[0].kill()
        await eventually(lambda: b.router.core.registry.by_role["prefill"][0].active == 0)
        b.decode[0].gate.set()
        assert texts_of("/v1/completions", await client.reply()) == expected("/v1/completions", 1)
        assert len(b.decode[0].seen) == 1


async def test_the_death_of_prefill_before_the_transfer_is_retried():
    async with bed(prefill=2, decode=1) as b:
        b.prefill[0].faults.no_transfer = True
        client = await connect(b.router.port)
        client.send(http_request("/v1/completions", COMPLETION))
        await eventually(lambda: b.prefill[0].seen)
        b.prefill[0].kill()
        assert texts_of("/v1/completions", await client.reply()) == expected("/v1/completions", 1)
        await eventually(lambda: b.decode[0].aborts)
        assert b.decode[0].aborts[0]["rid"] == b.decode[0].seen[0].body["rid"]


@pytest.mark.parametrize("full", [False, True])
async def test_100_streams_lose_a_prefill_and_a_decode_worker(full: bool):
    """0 failed, 0 wrong; also when the survivor takes only few at a time (503 for the rest)."""
    async with bed(prefill=2, decode=2, prefill_policy="random", decode_policy="random") as b:
        gate = asyncio.Event()
        for worker in b.decode:
            worker.gate, worker.gate_at = gate, 4
        paths = list(ROUTES) * 34
        asks = [asyncio.create_task(b.ask(path, with_n(path, 1))) for path in paths[:100]]
        await eventually(lambda: sum(worker.at_gate for worker in b.decode) == 100)
        if full:
            b.decode[1].faults.queue_full_over = b.decode[1].running + 3
        b.prefill[0].kill()
        b.decode[0].kill()
        gate.set()
        replies = await asyncio.gather(*asks)
        for path, reply in zip(paths, replies, strict=False):
            assert texts_of(path, reply) == expected(path, 1)
        await _nothing_left(b)


async def _nothing_left(b: Bed) -> None:
    await eventually(lambda: not b.router.core.exchanges)
    await eventually(lambda: all(worker.active == 0 for worker in b.router.core.registry.all()))
