"""One request through the router: what the workers get, what the client gets, on every route."""

import json

import pytest
from tests.fakes.fake_worker import expected_text
from tests.fakes.router_bed import bed

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6}
CHAT_PROMPT = json.dumps(CHAT["messages"])


async def test_pd_sends_the_same_body_with_one_room_to_both_sides():
    async with bed() as b:
        reply = await b.ask("/v1/chat/completions", CHAT)
        assert reply.status == 200
        assert reply.json["choices"][0]["message"]["content"] == expected_text(CHAT_PROMPT, 0, 6)
        (prefill,), (decode,) = b.prefill[0].seen, b.decode[0].seen
        assert prefill.raw == decode.raw
        assert prefill.body["bootstrap_host"] == "127.0.0.1"
        assert prefill.body["bootstrap_port"] == 9000
        assert 0 <= prefill.body["bootstrap_room"] < 2**63
        assert isinstance(prefill.body["rid"], str)
        for name in CHAT:
            assert prefill.body[name] == CHAT[name]


async def test_a_batch_gets_lists_with_distinct_rooms():
    async with bed() as b:
        for body, path in (
            ({"text": ["a", "b", "c"]}, "/generate"),
            ({"input_ids": [[1, 2], [3], [4]]}, "/generate"),
            ({"prompt": ["a", "b", "c"], "model": "fake"}, "/v1/completions"),
        ):
            reply = await b.ask(path, body)
            assert reply.status == 200, reply.body
            seen = b.decode[0].seen[-1].body
            assert seen["bootstrap_host"] == ["127.0.0.1"] * 3
            assert seen["bootstrap_port"] == [9000] * 3
            assert len(set(seen["bootstrap_room"])) == 3
            assert len(set(seen["rid"])) == 3


@pytest.mark.parametrize("body", [{"text": "a"}, {"input_ids": [1, 2, 3]}, {"text": "a", "sampling_params": {"n": 2}}])
async def test_a_single_prompt_gets_scalars(body):
    async with bed() as b:
        assert (await b.ask("/generate", body)).status == 200
        seen = b.prefill[0].seen[-1].body
        assert isinstance(seen["bootstrap_room"], int)
        assert seen["bootstrap_host"] == "127.0.0.1"
        assert isinstance(seen["rid"], str)
