"""A worker that answers as vLLM 0.10: documents and events key for key, the official client, errors, routes, metrics."""

import asyncio
import json
import re
from contextlib import AbstractAsyncContextManager
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.server.conftest import MODEL, Bed, Start, sse_events

from baton.engine.server.vllm_dialect import VllmDialect
from baton.protocol.rank import Submit

USER = [{"role": "user", "content": "Say hello."}]
TEXT = "Hello there, world!"


def vllm(start: Start, *flags: str, cached_tokens: int = 0, **settings: Any) -> AbstractAsyncContextManager[Bed]:
    return start(*flags, dialect=VllmDialect(**settings), cached_tokens=cached_tokens)


def chat_body(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": USER, **more}


def masked(text: str) -> str:
    """What differs from answer to answer, made equal."""
    text = re.sub(r'"(chatcmpl|cmpl|modelperm)-[0-9a-f]{32}"', r'"\1-ID"', text)
    return re.sub(r'"(created|prompt_tokens|total_tokens)":\d+', r'"\1":N', text)


async def test_chat_document_is_the_one_that_vllm_prints(start: Start) -> None:
    async with vllm(start) as bed:
        answer = await bed.post("/v1/chat/completions", chat_body(max_tokens=3))
        assert masked(answer.text) == (
            '{"id":"chatcmpl-ID","object":"chat.completion","created":N,"model":"/models/demo","choices":[{"index":0,'
            '"message":{"role":"assistant","reasoning_content":null,"content":"Hello there,","tool_calls":[]},'
            '"logprobs":null,"finish_reason":"length","stop_reason":null}],"usage":{"prompt_tokens":N,"total_tokens":N,'
            '"completion_tokens":3,"prompt_tokens_details":null},"prompt_logprobs":null,"kv_transfer_params":null}'
        )


async def test_chat_stream_leaves_out_what_nobody_set(start: Start) -> None:
    async with vllm(start) as bed:
        bed.say("Hi")
        bed.rank.credits = 1  # the end comes in a step of its own
        body = chat_body(stream=True, stream_options={"include_usage": True}, request_id="abc")
        text = ""
        async with bed.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for part in answer.aiter_text():
                text += part
                if '"Hi"' in part:
                    bed.rank.give(1)
        head = '{"id":"chatcmpl-abc","object":"chat.completion.chunk","created":N,"model":"/models/demo","choices":['
        assert [masked(one) for one in sse_events(text)] == [
            head + '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}',
            head + '{"index":0,"delta":{"content":"Hi"},"logprobs":null,"finish_reason":null}]}',
            head + '{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop","stop_reason":null}]}',
            head + '],"usage":{"prompt_tokens":N,"total_tokens":N,"completion_tokens":2}}',
            "[DONE]",
        ]


async def test_completion_document_and_events(start: Start) -> None:
    async with vllm(start) as bed:
        body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
        head = '{"id":"cmpl-ID","object":"text_completion","created":N,"model":"/models/demo","choices":['
        answer = await bed.post("/v1/completions", body)
        assert masked(answer.text) == head + (
            '{"index":0,"text":"Hello","logprobs":null,"finish_reason":"length","stop_reason":null,"prompt_logprobs":null}],'
            '"usage":{"prompt_tokens":N,"total_tokens":N,"completion_tokens":1,"prompt_tokens_details":null},'
            '"kv_transfer_params":null}'
        )
        streamed = await bed.post("/v1/completions", {**body, "stream": True})
        assert [masked(one) for one in sse_events(streamed.text)] == [
            head
            + '{"index":0,"text":"Hello","logprobs":null,"finish_reason":"length","stop_reason":null}],"usage":null}',
            "[DONE]",
        ]


@pytest.mark.parametrize(
    ("stop", "reason"), [({"stop": "wor"}, "wor"), ({"stop_token_ids": [2]}, 2), ({}, None)]
)  # fmt: skip
async def test_stop_reason_is_what_the_request_asked_for_and_null_at_the_end_of_a_sequence(
    start: Start, stop: dict[str, Any], reason: str | int | None
) -> None:
    async with vllm(start) as bed:
        choice = (await bed.post("/v1/chat/completions", chat_body(**stop))).json()["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", reason)


async def test_official_client(start: Start) -> None:
    async with vllm(start, "--enable-cache-report", cached_tokens=4) as bed:
        answer = await bed.openai.chat.completions.create(
            model=MODEL, messages=USER, logprobs=True, top_logprobs=2, n=2  # type: ignore[arg-type]
        )  # fmt: skip
        assert [one.message.content for one in answer.choices] == [TEXT, TEXT]
        first = answer.choices[0].logprobs.content[0]  # type: ignore[union-attr,index]
        assert (first.token, bytes(first.bytes or []), first.logprob) == ("Hello", b"Hello", -0.5)
        assert [one.logprob for one in first.top_logprobs] == [-0.5, -1.0]
        assert answer.usage.prompt_tokens_details.cached_tokens == 4  # type: ignore[union-attr]
        stream = await bed.openai.chat.completions.create(model=MODEL, messages=USER, stream=True)  # type: ignore[arg-type]
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices[0].finish_reason == "stop"
        completed = await bed.openai.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=2)
        assert [one.text for one in completed.choices] == ["Hello there"] * 2
        assert [one.id for one in (await bed.openai.models.list()).data] == [MODEL]


async def test_the_text_and_the_end_of_one_step_are_one_event(start: Start) -> None:
    async with vllm(start) as bed:
        text = (await bed.post("/v1/chat/completions", chat_body(stream=True, max_tokens=1))).text
        last = json.loads(sse_events(text)[-2])["choices"][0]
        assert (last["delta"], last["finish_reason"]) == ({"content": "Hello"}, "length")


async def test_log_probabilities_in_vllms_order_and_by_number_where_asked(start: Start) -> None:
    async with vllm(start) as bed:
        body = chat_body(logprobs=True, top_logprobs=1, max_tokens=1)
        found = (await bed.post("/v1/chat/completions", body)).json()["choices"][0]["logprobs"]["content"][0]
        assert list(found) == ["token", "logprob", "bytes", "top_logprobs"]
        assert list(found["top_logprobs"][0]) == ["token", "logprob", "bytes"]
        [token_id] = bed.tokenizer.encode("Hello")
        body["return_tokens_as_token_ids"] = True
        found = (await bed.post("/v1/chat/completions", body)).json()["choices"][0]["logprobs"]["content"][0]
        assert found["token"] == found["top_logprobs"][0]["token"] == f"token_id:{token_id}"
        body["top_logprobs"] = 21
        refused = (await bed.post("/v1/chat/completions", body)).json()["error"]
        assert "21, which is greater than max allowed: 20" in refused["message"]


async def test_errors_are_nested_and_have_four_keys(start: Start) -> None:
    async with vllm(start) as bed:
        answer = await bed.post("/v1/chat/completions", chat_body(temperature=-1))
        assert answer.status_code == 400
        assert list(answer.json()) == ["error"]
        error = answer.json()["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert (error["type"], error["code"]) == ("BadRequestError", 400)
        assert "temperature" in error["message"]
        with pytest.raises(openai.NotFoundError) as caught:
            await bed.openai.chat.completions.create(model="other", messages=USER)  # type: ignore[arg-type]
        assert "The model `other` does not exist" in caught.value.message
        assert (await bed.http.get("/nothing")).json()["error"]["code"] == 404


@pytest.mark.parametrize(
    "field",
    [{"guided_json": {"type": "object"}}, {"use_beam_search": True}, {"prompt_logprobs": 1}, {"bad_words": ["a"]},
     {"truncate_prompt_tokens": 5}, {"add_generation_prompt": False}, {"echo": True}, {"logits_processors": ["a"]}],
)  # fmt: skip
async def test_what_would_change_an_answer_is_refused_by_name(start: Start, field: dict[str, Any]) -> None:
    async with vllm(start) as bed:
        error = (await bed.post("/v1/chat/completions", chat_body(**field))).json()["error"]
        assert error["param"] == next(iter(field))
        assert next(iter(field)) in error["message"]


async def test_fields_of_vllm_reach_the_rank(start: Start) -> None:
    async with vllm(start) as bed:
        body = chat_body(
            include_stop_str_in_output=True, stop="there", spaces_between_special_tokens=True, min_tokens=1
        )
        answer = (await bed.post("/v1/chat/completions", body)).json()
        assert answer["choices"][0]["message"]["content"] == "Hello there"
        assert bed.rank.received_of(Submit)[0].sampling.min_new_tokens == 1
        assert bed.ctx.unknown_fields == {}


async def test_every_served_name_is_accepted_and_the_first_one_answers(start: Start) -> None:
    async with vllm(start, "--served-model-name", "big", served_names=("big", "alias")) as bed:
        for asked in ("big", "alias"):
            assert (await bed.post("/v1/chat/completions", chat_body(model=asked))).json()["model"] == "big"
        assert (await bed.post("/v1/chat/completions", chat_body())).status_code == 404
        cards = (await bed.http.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == ["big", "alias"]
        assert (await bed.http.get("/v1/models/alias")).json()["id"] == "alias"


async def test_model_cards(start: Start) -> None:
    async with vllm(start) as bed:
        assert masked((await bed.http.get("/v1/models")).text) == (
            '{"object":"list","data":[{"id":"/models/demo","object":"model","created":N,"owned_by":"vllm",'
            '"root":"/models/demo","parent":null,"max_model_len":8192,"permission":[{"id":"modelperm-ID",'
            '"object":"model_permission","created":N,"allow_create_engine":false,"allow_sampling":true,'
            '"allow_logprobs":true,"allow_search_indices":false,"allow_view":true,"allow_fine_tuning":false,'
            '"organization":"*","group":null,"is_blocking":false}]}]}'
        )


async def test_routes_beside_generation(start: Start) -> None:
    async with vllm(start, "--api-key", "k", tracks_load=True) as bed:
        assert (await bed.http.get("/health")).text == ""
        assert [(await bed.http.request(method, "/ping")).status_code for method in ("GET", "POST")] == [200, 200]
        assert re.match(r"0\.10\.0\+baton\.", (await bed.http.get("/version")).json()["version"])
        assert (await bed.http.get("/load")).json() == {"server_load": 0}
        assert (await bed.http.get("/v1/models")).status_code == 401
        assert (await bed.post("/generate", {"text": "a"})).status_code == 401, "ours is never open"


async def test_load_counts_requests_in_progress(start: Start) -> None:
    async with vllm(start, tracks_load=True) as bed:
        bed.rank.paused.set()
        asked = asyncio.create_task(bed.post("/v1/chat/completions", chat_body(n=3)))
        await bed.until(lambda: len(bed.rank.received_of(Submit)) == 3)
        assert (await bed.http.get("/load")).json() == {"server_load": 1}
        bed.rank.resume()
        assert (await asked).status_code == 200


async def test_tokenize_and_detokenize(start: Start) -> None:
    async with vllm(start) as bed:
        answer = (await bed.post("/tokenize", {"prompt": "Hello there", "return_token_strs": True})).json()
        assert list(answer) == ["count", "max_model_len", "tokens", "token_strs"]
        assert (answer["tokens"], answer["token_strs"]) == (bed.tokenizer.encode("Hello there"), ["Hello", " there"])
        assert (await bed.post("/detokenize", {"tokens": answer["tokens"]})).json() == {"prompt": "Hello there"}
        chat = (await bed.post("/tokenize", {"messages": USER})).json()
        await bed.post("/v1/chat/completions", chat_body(max_tokens=1))
        assert chat["tokens"] == bed.rank.received_of(Submit)[0].input_ids
        assert chat["token_strs"] is None
        assert (await bed.post("/tokenize", {})).status_code == 400


async def test_metrics_have_vllms_names_and_labels(start: Start) -> None:
    async with vllm(start, "--enable-metrics", "--context-length", "100", cached_tokens=4) as bed:
        await bed.post("/v1/chat/completions", chat_body(max_tokens=3))
        families = {one.name: one for one in text_string_to_metric_families((await bed.http.get("/metrics")).text)}
        assert not [name for name in families if name.startswith("sglang")]
        labels = {"model_name": MODEL, "engine": "0"}
        counters = {
            name: next(one.value for one in family.samples if one.name == f"{name}_total" and one.labels == labels)
            for name, family in families.items()
            if family.type == "counter" and name != "vllm:request_success"
        }
        prompt_tokens = counters["vllm:prompt_tokens"]
        assert prompt_tokens == len(bed.rank.received_of(Submit)[0].input_ids)
        assert counters == {
            "vllm:prompt_tokens": prompt_tokens, "vllm:generation_tokens": 3, "vllm:num_preemptions": 0,
            "vllm:prefix_cache_queries": prompt_tokens, "vllm:gpu_prefix_cache_queries": prompt_tokens,
            "vllm:prefix_cache_hits": 4, "vllm:gpu_prefix_cache_hits": 4,
        }  # fmt: skip
        ends = {one.labels["finished_reason"]: one.value for one in families["vllm:request_success"].samples
                if one.name.endswith("_total")}  # fmt: skip
        assert ends == {"stop": 0, "length": 1, "abort": 0}
        once = ["time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
                "request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds",
                "request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens",
                "request_max_num_generation_tokens", "time_per_prefill_token_request_seconds"]  # fmt: skip
        counts = {
            one.name: one.value for family in families.values() for one in family.samples if one.name.endswith("_count")
        }
        assert {name: counts[f"vllm:{name}_count"] for name in once} == dict.fromkeys(once, 1)
        assert (
            counts["vllm:time_per_output_token_seconds_count"] == counts["vllm:inter_token_latency_seconds_count"] == 2
        )
        edges = [one.labels["le"] for one in families["vllm:request_prompt_tokens"].samples if "le" in one.labels]
        assert edges == ["1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "100.0", "+Inf"]
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc"):
            assert [one.labels for one in families[f"vllm:{gauge}"].samples] == [labels]
        [info] = families["vllm:cache_config_info"].samples
        assert (info.labels["block_size"], info.labels["num_gpu_blocks"]) == ("16", "6250")
