"""vLLM's prefill/decode protocol: the prefill is asked first, its answer goes to the decode. The servers check the protocol."""

import asyncio
import json
from functools import partial
from typing import Any

import openai
import pytest
from tests.fakes.fake_vllm import FakeVllm
from tests.fakes.fake_worker import expected_text
from tests.fakes.router_bed import Bed, Reply, bed, connect, eventually, http_request

from baton.protocol.hops import Resume
from baton.router.config import BreakerConfig, HealthConfig, RetryConfig
from baton.router.retry import Answer
from baton.router.vllm_pd import decode_body, handed_over, members_of, prefill_body

MESSAGES = [{"role": "user", "content": "hello"}]
CHAT: dict[str, Any] = {"model": "fake", "messages": MESSAGES, "max_tokens": 8}
COMPLETION: dict[str, Any] = {"model": "fake", "prompt": "once", "max_tokens": 8}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}
PROMPTS = {"/v1/chat/completions": json.dumps(MESSAGES), "/v1/completions": "once"}
PATHS = sorted(ROUTES)
NO_RETRY = RetryConfig(max_retries=0, migration_limit=0)

vllm_bed = partial(bed, make=FakeVllm)
baton_bed = partial(bed, make=partial(FakeVllm, is_baton=True))


def text_of(path: str, reply: Reply, choice: int = 0) -> str:
    assert reply.status == 200, reply.body
    if "text/event-stream" not in reply.headers["content-type"]:
        found = reply.json["choices"][choice]
        return str(found["text"] if path == "/v1/completions" else found["message"]["content"])
    assert reply.events[-1] == "[DONE]"
    parts = [one for event in reply.events[:-1] for one in event["choices"] if one["index"] == choice]
    return "".join(one["text"] if path == "/v1/completions" else one["delta"].get("content", "") for one in parts)


# One request


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_the_prefill_is_asked_for_one_token_and_its_answer_goes_to_the_decode(path, stream):
    async with vllm_bed() as b:
        body = ROUTES[path] | {"stream": stream, "logprobs": True if path == PATHS[0] else 1, "min_tokens": 3}
        body |= {"stream_options": {"include_usage": True}} if stream else {}
        reply = await b.ask(path, body)
        assert text_of(path, reply) == expected_text(PROMPTS[path], 0, 8)
        usage = reply.events[-2]["usage"] if stream else reply.json["usage"]
        assert usage == {"prompt_tokens": 7, "total_tokens": 15, "completion_tokens": 8}
        (prefill,), (decode,) = b.prefill[0].seen, b.decode[0].seen
        ours = ("kv_transfer_params", "request_id")
        assert {name: value for name, value in decode.body.items() if name not in ours} == body
        changed = {"stream": False, "max_tokens": 1, "min_tokens": 1}
        expected = {name: value for name, value in (body | changed).items() if name != "stream_options"}
        assert {name: value for name, value in prefill.body.items() if name not in ours} == expected
        assert prefill.headers["x-request-id"] == decode.headers["x-request-id"] == decode.body["request_id"]
        assert 0 < float(decode.headers["x-baton-timeout-s"]) <= float(prefill.headers["x-baton-timeout-s"])
        (offer,) = b.prefill[0].offers
        assert offer.is_taken


async def test_openai_s_newer_name_of_max_tokens():
    async with vllm_bed() as b:
        body = {"model": "fake", "messages": MESSAGES, "max_completion_tokens": 5, "max_tokens": 5}
        assert (await b.ask(PATHS[0], body)).status == 200
        assert b.prefill[0].seen[0].body["max_completion_tokens"] == 1
        assert b.decode[0].seen[0].body["max_completion_tokens"] == 5


async def test_a_client_s_id_begins_the_servers_and_may_be_repeated():
    """The servers refuse one id twice: a prefill keeps what it has for a decode under it."""
    async with vllm_bed() as b:
        for _ in range(2):
            reply = await b.ask(PATHS[0], CHAT, {"x-request-id": "mine"})
            assert reply.headers["x-request-id"] == "mine"
            assert reply.json["id"].startswith("chatcmpl-mine-")
            reply = await b.ask(PATHS[0], CHAT | {"request_id": "own"}, {"x-request-id": "mine"})
            assert reply.json["id"].startswith("chatcmpl-own-")
        for bad in ("a\nb", "", 7, "x" * 300):
            assert (await b.ask(PATHS[0], CHAT | {"request_id": bad})).status == 200


@pytest.mark.parametrize("name", ["kv_transfer_params", "kv_transfer\\u005fparams"])
@pytest.mark.parametrize("make", [FakeVllm, None])
async def test_a_client_may_not_say_from_whom_a_worker_takes_kv(name, make):
    async with bed(make=make) as b:
        params = '{"do_remote_prefill":true,"remote_host":"evil","remote_port":1,"remote_engine_id":"e","remote_block_ids":[1]}'
        reply = await b.ask("/v1/completions", f'{{"model":"fake","prompt":"p","{name}":{params}}}'.encode())
        assert reply.status == 400
        assert reply.json["error"]["param"] == "kv_transfer_params"
        assert not any(worker.seen for worker in b.workers)
        twice = f'{{"model":"fake","{name}":{params},"prompt":"p","kv_transfer_params":null}}'.encode()
        if make is FakeVllm:
            assert (await b.ask("/v1/completions", twice)).status == 200
            assert b.decode[0].seen[0].body["kv_transfer_params"] == b.prefill[0].offers[0].params


async def test_fields_of_sglang_s_protocol_are_not_passed_on():
    async with vllm_bed() as b:
        body = COMPLETION | {
            "bootstrap_host": "evil",
            "bootstrap_port": 1,
            "bootstrap_room": 2,
            "rid": ["r"],
            "baton_resume": {},
        }
        assert (await b.ask("/v1/completions", body)).status == 200


async def test_generate_is_not_vllm_s():
    async with vllm_bed() as b:
        reply = await b.ask("/generate", {"text": "p"})
        assert reply.status == 501
        assert "/v1/completions" in reply.json["error"]["message"]
        assert not any(worker.seen for worker in b.workers)


@pytest.mark.parametrize("extra", [{"n": 2}, {"prompt": ["once", "twice"]}, {"prompt": [[1, 2], [3]]}])
async def test_what_vllm_cannot_hand_over_the_decode_computes_alone(extra):
    """Its prefill frees the blocks when the first of several sequences has them."""
    async with vllm_bed() as b:
        reply = await b.ask("/v1/completions", COMPLETION | extra)
        assert reply.status == 200
        assert len(reply.json["choices"]) == 2
        assert not b.prefill[0].seen
        assert "kv_transfer_params" not in b.decode[0].seen[0].body
        assert 'handovers_total{protocol="vllm",outcome="alone"} 1' in (await b.get("/metrics")).body.decode()


async def test_baton_s_workers_hand_over_several_sequences():
    async with baton_bed() as b:
        reply = await b.ask("/v1/completions", COMPLETION | {"n": 2, "stream": True})
        assert [text_of("/v1/completions", reply, choice) for choice in (0, 1)] == [
            expected_text("once", 0, 8), expected_text("once", 1, 5),
        ]  # fmt: skip
        assert b.prefill[0].offers[0].is_taken


async def test_a_prefill_whose_first_token_is_the_end_hands_nothing_over():
    async with vllm_bed() as b:
        b.prefill[0].eos_first = True
        reply = await b.ask("/v1/completions", COMPLETION)
        assert text_of("/v1/completions", reply) == expected_text("once", 0, 8)
        assert "kv_transfer_params" not in b.decode[0].seen[0].body


async def test_the_openai_client_works():
    async with vllm_bed() as b:
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{b.router.port}/v1", api_key="x", max_retries=0)
        whole = await client.chat.completions.create(**CHAT)
        stream = await client.chat.completions.create(**CHAT, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == whole.choices[0].message.content
        b.prefill[0].faults.status = 400
        b.prefill[
            0
        ].faults.error_body = b'{"error":{"message":"too long","type":"BadRequestError","param":null,"code":400}}'
        with pytest.raises(openai.BadRequestError, match="too long"):
            await client.chat.completions.create(**CHAT)
        await client.close()


async def test_cache_aware_sends_one_beginning_to_one_prefill():
    async with vllm_bed(prefill=2, decode=2, prefill_policy="cache_aware") as b:
        for question in range(6):
            for document in ("first", "second"):
                body = COMPLETION | {"prompt": f"{document} document " * 40 + str(question)}
                assert (await b.ask("/v1/completions", body)).status == 200
        beginnings = [{seen.body["prompt"].split()[0] for seen in worker.seen} for worker in b.prefill]
        assert sorted(beginnings, key=str) == [{"first"}, {"second"}]
        assert [len(worker.seen) for worker in b.decode] == [6, 6], "round robin"


# What goes wrong


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("status", [400, 422, 500])
async def test_an_error_of_either_side_is_passed_on_with_its_stage(side, status):
    async with vllm_bed(retry=NO_RETRY) as b:
        getattr(b, side)[0].faults.status = status
        reply = await b.ask("/v1/completions", COMPLETION | {"stream": True})
        assert reply.status == status
        assert reply.body == getattr(b, side)[0].faults.error_body
        assert reply.headers["x-baton-error-stage"] == side
        assert len(b.decode[0].seen) == (side == "decode")


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503}, {"die_before_answer": 1}])
@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("make", [vllm_bed, baton_bed])
async def test_what_fails_before_an_answer_has_begun_is_tried_on_another_pair(make, side, fault):
    async with make(prefill=2, decode=2) as b:
        for name, value in fault.items():
            setattr(getattr(b, side)[0].faults, name, value)
        reply = await b.ask("/v1/completions", COMPLETION | {"stream": True})
        assert text_of("/v1/completions", reply) == expected_text("once", 0, 8)
        assert {len(worker.seen) for worker in getattr(b, side)} == {1}
        ids = [event["id"] for event in reply.events[:-1]]
        assert len(set(ids)) == 1
        assert "-" not in ids[0].removeprefix("cmpl-"), "what marks a second try is not shown"


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_dead_worker_is_gone_round(side):
    async with vllm_bed(prefill=2, decode=2) as b:
        getattr(b, side)[0].kill()
        for _ in range(4):
            assert (await b.ask("/v1/completions", COMPLETION)).status == 200


async def test_a_prefill_without_a_connector_is_named():
    async with vllm_bed() as b:
        b.prefill[0].has_connector = False
        error = (await b.ask("/v1/completions", COMPLETION)).json["error"]
        assert (error["type"], error["code"], error["stage"]) == ("no_handover", 502, "prefill")
        assert b.prefill[0].url in error["message"]
        assert "--kv-transfer-config" in error["message"]
        assert not b.decode[0].seen
    async with vllm_bed(prefill=2, breaker=BreakerConfig(failure_threshold=1)) as b:
        b.prefill[0].has_connector = False
        for _ in range(4):
            assert (await b.ask("/v1/completions", COMPLETION)).status == 200
        assert len(b.prefill[0].seen) == 1, "its breaker has opened"


async def test_a_decode_of_vllm_that_dies_in_mid_stream_ends_in_a_retryable_error():
    async with vllm_bed(prefill=2, decode=2) as b:
        b.decode[0].faults.die_after_tokens = 3
        reply = await b.ask("/v1/completions", COMPLETION | {"stream": True})
        *events, last = reply.events
        assert "".join(event["choices"][0]["text"] for event in events) == expected_text("once", 0, 3)
        assert (last["error"]["type"], last["error"]["stage"], last["error"]["retryable"]) == (
            "stream_lost",
            "decode",
            True,
        )
        assert not b.decode[1].seen


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_of_baton_s_workers_goes_on_elsewhere(path, tokens, n):
    async with baton_bed(prefill=2, decode=2) as b:
        b.decode[0].faults.die_after_tokens = tokens
        reply = await b.ask(path, ROUTES[path] | {"stream": True, "n": n})
        for choice in range(n):
            assert text_of(path, reply, choice) == expected_text(PROMPTS[path], choice, 8 - 3 * choice)
        assert len({event["id"] for event in reply.events[:-1]}) == 1
        assert b.prefill[1].seen[0].body.get("baton_resume") == b.decode[1].seen[0].body.get("baton_resume")
        assert len(b.prefill[1].seen) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_baton", [False, True])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
async def test_a_client_that_leaves_ends_the_request_on_both_sides(stage, is_baton, stream):
    async with (baton_bed if is_baton else vllm_bed)() as b:
        waits = getattr(b, stage)[0]
        waits.faults.hang = True
        client = await connect(b.router.port)
        client.send(http_request("/v1/completions", COMPLETION | {"stream": stream}))
        await eventually(lambda: waits.seen)
        client.close()
        await eventually(lambda: waits.disconnects)
        asked = [b.prefill[0]] if stage == "prefill" else b.workers
        if is_baton:  # what its prefill holds is given up too
            for worker in asked:
                await eventually(lambda worker=worker: worker.aborts)
                assert worker.aborts == [{"rid": worker.seen[0].body["request_id"], "abort_all": False}]
        await _nothing_left(b)


async def test_the_deadline_is_one_for_both_and_its_error_names_the_stage():
    async with vllm_bed(request_timeout_s=0.05) as b:
        for side in (b.prefill, b.decode):
            side[0].faults.hang = True
            error = (await b.ask("/v1/completions", COMPLETION)).json["error"]
            assert (error["type"], error["code"], error["stage"]) == ("deadline_exceeded", 504, side[0].role)
            side[0].faults.hang = False
        await _nothing_left(b)


@pytest.mark.parametrize("is_baton", [False, True])
async def test_a_prefill_that_stops_answering_before_its_kv_is_taken_is_left(is_baton):
    """A Baton prefill answers before it computes: it is busy with the request until decode begins."""
    health = HealthConfig(interval_s=0.02, retry_interval_s=0.02, timeout_s=0.1, failure_threshold=2)
    async with (baton_bed if is_baton else vllm_bed)(prefill=2, decode=1, health=health) as b:
        stuck = b.prefill[0]
        stuck.faults.no_transfer = True
        client = await connect(b.router.port)
        client.send(http_request("/v1/completions", COMPLETION | {"stream": True}))
        await eventually(lambda: b.decode[0].seen)
        assert b.router.core.registry.by_role["prefill"][0].active == 1
        stuck.frozen = True
        assert text_of("/v1/completions", await client.reply()) == expected_text("once", 0, 8)
        assert len(b.prefill[1].seen) == 1
        await _nothing_left(b)


async def test_a_prefill_that_is_lost_while_decode_is_connected_to_is_left(monkeypatch):
    async with vllm_bed(prefill=2) as b:
        prefill, (decode,) = b.router.core.registry.by_role["prefill"][0], b.router.core.registry.by_role["decode"]
        connect_to_decode, gate = decode.pool.connect, asyncio.Event()

        async def slowly():
            await gate.wait()
            return await connect_to_decode()

        monkeypatch.setattr(decode.pool, "get_idle", lambda: None)
        monkeypatch.setattr(decode.pool, "connect", slowly)
        ask = asyncio.create_task(b.ask("/v1/completions", COMPLETION | {"stream": True}))
        await eventually(lambda: any(one.held is prefill for one in b.router.core.progress_on(prefill)))
        for attempt in b.router.core.progress_on(prefill):
            attempt.give_up_on(prefill, "it does not answer")
        gate.set()
        assert text_of("/v1/completions", await ask) == expected_text("once", 0, 8)
        assert len(b.decode[0].seen) == len(b.prefill[1].seen) == 1
        await _nothing_left(b)


async def test_a_prefill_has_load_until_decode_begins():
    async with vllm_bed() as b:
        (worker,) = b.router.core.registry.by_role["prefill"]
        b.decode[0].gate, b.decode[0].gate_at = asyncio.Event(), 1
        b.prefill[0].faults.no_transfer = True
        client = await connect(b.router.port)
        client.send(http_request("/v1/completions", COMPLETION | {"stream": True}))
        await eventually(lambda: b.decode[0].seen)
        assert worker.active == 1
        b.prefill[0].offers[0].computed.set()
        await client.body_with(b"data: ")
        assert worker.active == 0
        b.decode[0].gate.set()
        assert (await client.reply()).events[-1] == "[DONE]"


# The bodies


def test_bodies_keep_what_they_do_not_know_to_the_byte():
    members = members_of(b'{"a": 1.50, "kv_transfer_params": {"x": 1}, "a": 1.5e0, "prompt" : "\\u00e4"}')
    params = {"remote_block_ids": members_of(b'{"x": [[1,  2], []]}')["x"]}
    assert decode_body(members, "r", params, None) == (
        b'{"a":1.5e0,"prompt":"\\u00e4","kv_transfer_params":{"remote_block_ids":[[1,  2], []]},"request_id":"r"}'
    )


@pytest.mark.parametrize(
    ("given", "sent"), [(0, 0), (1, 1), (5, 3), ("five", "five"), (None, None), (True, True), (-1, -1)]
)
def test_min_tokens_never_exceeds_what_the_prefill_makes(given, sent):
    resume = Resume(None, [[4, 5], None, []])
    body = json.loads(prefill_body(members_of(json.dumps({"min_tokens": given}).encode()), "r", resume))
    assert body["max_tokens"] == 3
    assert body["min_tokens"] == sent


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"kv_transfer_params":{}}', b'{"kv_transfer_params":[1]}'])
def test_an_answer_that_hands_nothing_over_is_an_error(body):
    with pytest.raises(Exception, match="its answer"):
        handed_over(Answer(200, [], body))


async def _nothing_left(b: Bed) -> None:
    await eventually(lambda: not b.router.core.exchanges)
    await eventually(lambda: all(worker.active == 0 for worker in b.router.core.registry.all()))
