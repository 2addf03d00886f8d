"""The OpenAI routes: the official client as oracle, SGLang 0.4.10's documents key for key, refusals by name."""

import json
import re
from typing import Any

import openai
import pytest
from tests.server.conftest import MODEL, Start, sse_events

from baton.protocol.rank import Submit

USER = [{"role": "user", "content": "Say hello."}]
TEXT = "Hello there, world!"


def chat_body(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": USER, **more}


async def test_chat_document_is_the_seeds_shape(start: Start) -> None:
    async with start() as bed:
        answer = await bed.post("/v1/chat/completions", chat_body(max_tokens=3))
        document = answer.json()
        template = (
            '{"id":ID,"object":"chat.completion","created":N,"model":"/models/demo","choices":[{"index":0,"message":'
            '{"role":"assistant","content":"Hello there,","reasoning_content":null,"tool_calls":null},"logprobs":null,'
            '"finish_reason":"length","matched_stop":null}],"usage":{"prompt_tokens":N,"total_tokens":N,'
            '"completion_tokens":3,"prompt_tokens_details":null}}'
        )
        text = re.sub(r'"[0-9a-f]{32}"', "ID", answer.text)
        text = re.sub(r'"(created|prompt_tokens|total_tokens)":\d+', r'"\1":N', text)
        assert text == template
        assert document["usage"]["total_tokens"] == document["usage"]["prompt_tokens"] + 3


async def test_chat_stream_events_are_sglangs(start: Start) -> None:
    async with start() as bed:
        body = chat_body(stream=True, stream_options={"include_usage": True}, rid="abc")
        bed.say("Hi")
        text = (await bed.post("/v1/chat/completions", body)).text
        events = [re.sub(r'"(created|prompt_tokens|total_tokens)":\d+', r'"\1":N', one) for one in sse_events(text)]
        head = '{"id":"abc","object":"chat.completion.chunk","created":N,"model":"/models/demo","choices":['
        nulls = '"reasoning_content":null,"tool_calls":null},"logprobs":null,"finish_reason":'
        assert events == [
            head + '{"index":0,"delta":{"role":"assistant","content":"",' + nulls + 'null,"matched_stop":null}],"usage":null}',
            head + '{"index":0,"delta":{"role":null,"content":"Hi",' + nulls + 'null,"matched_stop":null}],"usage":null}',
            head + '{"index":0,"delta":{"role":null,"content":null,' + nulls + '"stop","matched_stop":2}],"usage":null}',
            head + '],"usage":{"prompt_tokens":N,"total_tokens":N,"completion_tokens":2}}',
            "[DONE]",
        ]  # fmt: skip


async def test_official_client_chat(start: Start) -> None:
    async with start("--enable-cache-report", cached_tokens=4) as bed:
        answer = await bed.openai.chat.completions.create(
            model=MODEL, messages=USER, logprobs=True, top_logprobs=2, n=2, seed=1  # type: ignore[arg-type]
        )  # fmt: skip
        assert [one.message.content for one in answer.choices] == [TEXT, TEXT]
        assert answer.choices[1].index == 1
        first = answer.choices[0].logprobs.content[0]  # type: ignore[union-attr,index]
        assert (first.token, bytes(first.bytes or []), first.logprob) == ("Hello", b"Hello", -0.5)
        assert [one.logprob for one in first.top_logprobs] == [-0.5, -1.0]
        num_tokens = len(bed.tokenizer.encode(TEXT)) + 1
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2 * num_tokens
        assert answer.usage.prompt_tokens_details.cached_tokens == 4  # type: ignore[union-attr]
        submits = bed.rank.received_of(Submit)
        assert answer.usage.prompt_tokens == len(submits[0].input_ids)
        assert answer.id in submits[0].rid


async def test_official_client_chat_stream(start: Start) -> None:
    async with start() as bed:
        stream = await bed.openai.chat.completions.create(
            model=MODEL, messages=USER, stream=True, n=2, logprobs=True, stream_options={"include_usage": True}  # type: ignore[arg-type]
        )  # fmt: skip
        texts, tokens, reasons, usage = ["", ""], ["", ""], ["", ""], None
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                tokens[choice.index] += "".join(
                    one.token for one in (choice.logprobs.content if choice.logprobs else None) or []
                )
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            usage = chunk.usage or usage
        assert texts == [TEXT, TEXT]
        assert tokens == [TEXT + "<|im_end|>"] * 2
        assert reasons == ["stop", "stop"]
        assert usage is not None
        assert usage.completion_tokens == 2 * (len(bed.tokenizer.encode(TEXT)) + 1)


async def test_official_client_completions(start: Start) -> None:
    async with start() as bed:
        for prompt in ("Once", ["Once", "Twice"], [5, 6], [[5, 6], [7]]):
            answer = await bed.openai.completions.create(model=MODEL, prompt=prompt, n=2, echo=True, max_tokens=50)  # type: ignore[arg-type]
            many = isinstance(prompt, list) and not isinstance(prompt[0], int)
            echoes = [
                one if isinstance(one, str) else bed.tokenizer.decode(one) for one in (prompt if many else [prompt])
            ]  # type: ignore[arg-type,misc]
            assert [one.text for one in answer.choices] == [echo + TEXT for echo in echoes for _ in range(2)]
            assert [one.index for one in answer.choices] == list(range(2 * len(echoes)))


async def test_completion_echo_with_logprobs(start: Start) -> None:
    async with start() as bed:
        body = {"model": MODEL, "prompt": "Once upon", "echo": True, "logprobs": 1, "max_tokens": 2}
        choice = (await bed.post("/v1/completions", body)).json()["choices"][0]
        assert list(choice) == ["index", "text", "logprobs", "finish_reason", "matched_stop"]
        logprobs = choice["logprobs"]
        assert list(logprobs) == ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
        assert "".join(logprobs["tokens"]) == choice["text"] == "Once uponHello there"
        assert logprobs["token_logprobs"][0] is None
        assert [
            choice["text"][at:].startswith(token)
            for at, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
        ] == [True] * 4
        streamed = sse_events((await bed.post("/v1/completions", {**body, "stream": True})).text)[:-1]
        offsets = [at for event in streamed for at in json.loads(event)["choices"][0]["logprobs"]["text_offset"]]
        assert offsets == logprobs["text_offset"]


async def test_completion_stream(start: Start) -> None:
    async with start() as bed:
        stream = await bed.openai.completions.create(model=MODEL, prompt="a", stream=True, stop="wor", max_tokens=50)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello there, "
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert chunks[-1].choices[0].matched_stop == "wor"  # type: ignore[attr-defined]


async def test_a_batch_may_bring_an_id_for_each_prompt(start: Start) -> None:
    """As routers send it: one abort of what the ids have in common ends them all."""
    async with start() as bed:
        body = {"model": MODEL, "prompt": ["Hi", "Ho"], "n": 2, "max_tokens": 3, "rid": ["abc_0", "abc_1"]}
        answer = await bed.post("/v1/completions", body)
        assert answer.status_code == 200
        assert answer.json()["id"] == answer.headers["x-request-id"] == "abc"
        assert [one["index"] for one in answer.json()["choices"]] == [0, 1, 2, 3]
        rids = [submit.rid for submit in bed.rank.received_of(Submit)]
        assert rids == ["abc_0_0", "abc_0_1", "abc_1_0", "abc_1_1"]


async def test_sampling_defaults_come_from_the_model_and_the_request_wins(start: Start) -> None:
    async with start() as bed:
        bed.ctx.sampling_defaults = {"temperature": 0.6, "top_k": 0, "top_p": 0.9}
        await bed.post("/v1/chat/completions", chat_body(top_p=0.5, max_tokens=1, min_p=0.1))
        [submit] = bed.rank.received_of(Submit)
        sampling = submit.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.6, -1, 0.5, 0.1)
        assert sampling.max_new_tokens == 1


async def test_no_max_tokens_means_the_rest_of_the_context_in_chat_and_16_in_completions(start: Start) -> None:
    async with start() as bed:
        await bed.post("/v1/chat/completions", chat_body())
        await bed.post("/v1/completions", {"prompt": "a"})
        assert [one.sampling.max_new_tokens for one in bed.rank.received_of(Submit)] == [None, 16]


async def test_cache_salt_isolates(start: Start) -> None:
    async with start() as bed:
        await bed.post("/v1/chat/completions", chat_body(cache_salt="s", extra_key="k", max_tokens=1))
        [submit] = bed.rank.received_of(Submit)
        assert submit.extra_key == "sk"


async def test_model_names(start: Start) -> None:
    async with start() as bed:
        assert (await bed.post("/v1/chat/completions", chat_body(model=MODEL + "/"))).json()["model"] == MODEL + "/"
        with pytest.raises(openai.NotFoundError) as caught:
            await bed.openai.chat.completions.create(model="other", messages=USER)  # type: ignore[arg-type]
        assert "The model `other` does not exist" in caught.value.message
        body = (await bed.post("/v1/completions", {"model": "other", "prompt": "a"})).json()
        assert list(body) == ["object", "message", "type", "param", "code"]
        assert (body["object"], body["type"], body["param"], body["code"]) == ("error", "NotFoundError", "model", 404)


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    (chat_body(messages=[]), "Messages cannot be empty"),
    ({"model": MODEL}, "messages"),
    (chat_body(messages=[{"content": "a"}]), "messages[0].role"),
    (chat_body(messages=[{"role": "user"}]), "messages[0].content"),
    (chat_body(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "image_url"),
    (chat_body(messages=[{"role": "user", "content": [{"type": "text", "text": 1}]}]), "messages[0].content[0].text"),
    (chat_body(tools=[{"type": "function"}]), "tools"),
    (chat_body(tool_choice="required"), "tool_choice"),
    (chat_body(response_format={"type": "json_schema"}), "response_format"),
    (chat_body(top_logprobs=2), "top_logprobs"),
    (chat_body(logprobs=True, top_logprobs=1000), "top_logprobs"),
    (chat_body(regex="a"), "regex"),
    (chat_body(temperature="hot"), "temperature"),
    (chat_body(max_tokens=-1), "max_tokens"),
    (chat_body(n=0), "n must be"),
    (chat_body(logit_bias={"x": 1}), "logit_bias"),
    (chat_body(modalities=["audio"]), "modalities"),
    (chat_body(stop=[""]), "stop"),
]


async def test_bad_chats_name_the_field(start: Start) -> None:
    async with start() as bed:
        for body, field in BAD_CHATS:
            answer = await bed.post("/v1/chat/completions", body)
            assert answer.status_code == 400, body
            assert field in answer.json()["message"], (body, answer.text)
            assert answer.json()["object"] == "error"
        assert bed.rank.received == []
        fine = chat_body(tools=[], response_format={"type": "text"}, user="me", tool_choice="auto", functions=None)
        assert (await bed.post("/v1/chat/completions", fine)).status_code == 200


async def test_bad_completions_name_the_field(start: Start) -> None:
    async with start() as bed:
        for more, field in (
            ({"suffix": "x"}, "suffix"), ({"prompt": []}, "prompt"), ({"prompt": [1, "a"]}, "prompt"),
            ({"best_of": 3}, "best_of"), ({"logprobs": -1}, "logprobs"), ({"prompt": {"a": 1}}, "prompt"),
        ):  # fmt: skip
            answer = await bed.post("/v1/completions", {"model": MODEL, "prompt": "a", **more})
            assert answer.status_code == 400, more
            assert field in answer.json()["message"], (more, answer.text)


async def test_other_content_types_are_refused_on_v1(start: Start) -> None:
    async with start() as bed:
        content = json.dumps(chat_body())
        for content_type, status in (("text/plain", 400), ("application/json; charset=utf-8", 200)):
            answer = await bed.http.post(
                "/v1/chat/completions", content=content, headers={"content-type": content_type}
            )
            assert answer.status_code == status
            if status == 400:
                assert answer.json()["message"] == "Unsupported Media Type: Only 'application/json' is allowed"


async def test_unknown_fields_are_counted_and_harmless(start: Start) -> None:
    async with start() as bed:
        for _ in range(2):
            assert (await bed.post("/v1/chat/completions", chat_body(brand_new=1))).status_code == 200
        info = (await bed.http.get("/get_server_info")).json()
        assert info["ignored_request_fields"] == {"brand_new": 2}


async def test_text_parts_are_joined_for_a_template_that_wants_text(start: Start) -> None:
    async with start() as bed:
        parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]
        await bed.post("/v1/chat/completions", chat_body(max_tokens=1))
        await bed.post("/v1/chat/completions", chat_body(max_tokens=1, messages=[{"role": "user", "content": parts}]))
        first, second = bed.rank.received_of(Submit)
        assert first.input_ids == second.input_ids


async def test_continue_final_message(start: Start) -> None:
    async with start() as bed:
        messages = [*USER, {"role": "assistant", "content": "Hel"}]
        await bed.post("/v1/chat/completions", chat_body(messages=messages, continue_final_message=True, max_tokens=1))
        [submit] = bed.rank.received_of(Submit)
        assert bed.tokenizer.decode(submit.input_ids, skip_special_tokens=False).endswith("<|im_start|>assistant\nHel")
