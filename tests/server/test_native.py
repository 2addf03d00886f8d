"""/generate: SGLang's document, key for key; streams; batches; what is refused and how."""

import json
from typing import Any

import pytest
from tests.server.conftest import Start, sse_events

from baton.protocol.errors import ErrorInfo
from baton.protocol.rank import Abort, Submit


async def test_document_has_sglangs_keys_in_order(start: Start) -> None:
    async with start() as bed:
        answer = await bed.post("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 3}, "rid": "r1"})
        assert answer.status_code == 200
        document = answer.json()
        token_ids = bed.tokenizer.encode("Hello there, world!")[:3]
        assert list(document) == ["text", "output_ids", "meta_info"]
        assert document["text"] == bed.tokenizer.decode(token_ids)
        assert document["output_ids"] == token_ids
        meta = document["meta_info"]
        assert list(meta) == [
            "id", "finish_reason", "prompt_tokens", "weight_version", "total_retractions", "completion_tokens",
            "cached_tokens", "e2e_latency",
        ]  # fmt: skip
        assert meta["id"] == "r1"
        assert meta["finish_reason"] == {"type": "length", "length": 3}
        assert (meta["prompt_tokens"], meta["completion_tokens"], meta["weight_version"]) == (1, 3, "default")


async def test_end_of_sequence_is_matched_by_id_and_has_no_text(start: Start) -> None:
    async with start() as bed:
        bed.say("Yes.")
        document = (await bed.post("/generate", {"text": "Hi"})).json()
        assert document["text"] == "Yes."
        assert document["meta_info"]["finish_reason"] == {"type": "stop", "matched": 2}
        assert document["output_ids"][-1] == 2


async def test_stream_is_cumulative_and_ends_with_done(start: Start) -> None:
    async with start() as bed:
        body = {"text": "Hi", "stream": True, "stream_options": {"include_usage": True}, "lora_path": ""}
        documents: list[dict[str, Any]] = []
        bed.rank.credits = 1
        async with bed.http.stream("POST", "/generate", json=body) as answer:
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    documents.append(json.loads(line.removeprefix("data: ")))
                    bed.rank.give(1)
                elif line:
                    assert line == "data: [DONE]"
        token_ids = [*bed.tokenizer.encode("Hello there, world!"), 2]
        assert [one["output_ids"] for one in documents] == [token_ids[: k + 1] for k in range(len(token_ids))]
        assert [one["text"] for one in documents[:2]] == ["Hello", "Hello there"]
        assert documents[-1]["text"] == "Hello there, world!"
        assert documents[0]["meta_info"]["finish_reason"] is None
        assert documents[0]["meta_info"]["prompt_tokens"] == 1
        assert "e2e_latency" not in documents[0]["meta_info"]


async def test_stream_output_flag_sends_new_ids_only(start: Start) -> None:
    async with start("--stream-output") as bed:
        events = sse_events((await bed.post("/generate", {"text": "Hi", "stream": True})).text)[:-1]
        documents = [json.loads(event) for event in events]
        token_ids = [token_id for one in documents for token_id in one["output_ids"]]
        assert token_ids == [*bed.tokenizer.encode("Hello there, world!"), 2]
        assert documents[-1]["text"] == "Hello there, world!"


async def test_batch_with_n_and_per_prompt_sampling(start: Start) -> None:
    async with start() as bed:
        body = {
            "input_ids": [[5, 6], [7]],
            "sampling_params": [{"n": 2, "max_new_tokens": 1, "seed": 9}, {"n": 2, "max_new_tokens": 2, "seed": 9}],
            "rid": ["a", "b"],
        }
        documents = (await bed.post("/generate", body)).json()
        assert [one["meta_info"]["id"] for one in documents] == ["a_0", "a_1", "b_0", "b_1"]
        assert [one["meta_info"]["completion_tokens"] for one in documents] == [1, 1, 2, 2]
        assert [one["meta_info"]["prompt_tokens"] for one in documents] == [2, 2, 1, 1]
        submits = bed.rank.received_of(Submit)
        assert [one.sampling.seed for one in submits] == [9, 10, 9, 10]
        assert {one.sampling.n for one in submits} == {1}


async def test_streamed_batch_carries_the_index(start: Start) -> None:
    async with start() as bed:
        body = {"text": ["a", "b"], "stream": True, "sampling_params": {"max_new_tokens": 2}}
        events = [json.loads(event) for event in sse_events((await bed.post("/generate", body)).text)[:-1]]
        assert {one["index"] for one in events} == {0, 1}


async def test_logprobs(start: Start) -> None:
    async with start() as bed:
        body = {
            "input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}, "return_logprob": True,
            "logprob_start_len": 0, "top_logprobs_num": 2, "token_ids_logprob": [11],
            "return_text_in_logprobs": True,
        }  # fmt: skip
        meta = (await bed.post("/generate", body)).json()["meta_info"]
        first, second = bed.tokenizer.encode("Hello there, world!")[:2]
        text = bed.tokenizer.decode
        assert meta["output_token_logprobs"] == [[-0.5, first, text([first])], [-0.5, second, text([second])]]
        assert meta["input_token_logprobs"][0][:2] == [None, 5]
        assert meta["input_top_logprobs"][0] is None
        assert [triple[0] for triple in meta["output_top_logprobs"][0]] == [-0.5, -1.0]
        assert meta["output_token_ids_logprobs"][0][0][:2] == [-3.0, 11]


async def test_stop_string_across_tokens_ends_the_rank_too(start: Start) -> None:
    async with start() as bed:
        body = {"text": "Hi", "sampling_params": {"stop": ["re, w"], "max_new_tokens": 50}}
        num_tokens = len(bed.tokenizer.encode("Hello there, w"))
        bed.rank.credits = num_tokens  # the sequence would go on
        document = (await bed.post("/generate", body)).json()
        assert document["text"] == "Hello the"
        assert document["meta_info"]["finish_reason"] == {"type": "stop", "matched": "re, w"}
        [submit] = bed.rank.received_of(Submit)
        await bed.until(lambda: bool(bed.rank.received_of(Abort)))
        assert bed.rank.received_of(Abort) == [Abort(submit.rid, "stop string", matched_stop="re, w")]


BAD_REQUESTS = [
    ({}, "text"),
    ({"text": "a", "input_ids": [1]}, "text"),
    ({"text": 5}, "text"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": [1, "x"]}, "input_ids"),
    ({"input_ids": [49152]}, "input_ids"),
    ({"input_ids": [-1]}, "input_ids"),
    ({"text": ""}, "no tokens"),
    ({"text": "a", "sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
    ({"text": "a", "sampling_params": {"temperatur": 1}}, "temperatur"),
    ({"text": "a", "sampling_params": {"top_p": 0}}, "top_p must be in (0, 1], got 0"),
    ({"text": "a", "sampling_params": {"regex": "a+"}}, "regex"),
    ({"text": "a", "sampling_params": {"max_new_tokens": 100000}}, "context length of 8192 tokens"),
    ({"input_ids": [1] * 8192}, "longer than the model's context length (8192 tokens)"),
    ({"input_ids": [1] * 8100, "sampling_params": {"max_new_tokens": 1}}, "maximum allowed length (8000 tokens)"),
    ({"text": "a", "image_data": "x"}, "image_data"),
    ({"text": "a", "lora_path": "x"}, "lora_path"),
    ({"text": ["a", "b"], "rid": ["1"]}, "rid"),
    ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
    ({"text": "\ud800"}, "JSON"),
]


async def test_bad_requests_name_the_field_and_reach_no_rank(start: Start) -> None:
    async with start() as bed:
        for body, field in BAD_REQUESTS:
            answer = await bed.http.post("/generate", content=json.dumps(body).encode())
            assert answer.status_code == 400, body
            assert field in answer.json()["error"]["message"], body
            assert answer.headers["x-baton-retryable"] == "0"
        assert bed.rank.received == []


async def test_broken_bodies(start: Start) -> None:
    async with start() as bed:
        broken = ((b'{"text": "\xff"}', "UTF-8"), (b'{"text": ', "JSON"), (b"[1]", "object"), (b"", "JSON"))
        for content, problem in broken:
            answer = await bed.http.post("/generate", content=content)
            assert answer.status_code == 400
            assert problem in answer.json()["error"]["message"]


async def test_body_over_the_limit(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.engine.server.intake.MAX_BODY_BYTES", 100)
    async with start() as bed:
        answer = await bed.post("/generate", {"text": "x" * 200})
        assert answer.status_code == 413
        assert "100 bytes" in answer.json()["error"]["message"]
        assert (await bed.post("/generate", {"text": "x"})).status_code == 200


async def test_error_of_the_rank_is_the_status_even_for_streams(start: Start) -> None:
    async with start() as bed:
        bed.rank.refuse = ErrorInfo("ServiceUnavailableError", 503, "The request queue is full.", retryable=True)
        for stream in (False, True):
            answer = await bed.post("/generate", {"text": "a", "stream": stream})
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "The request queue is full."
            assert answer.headers["x-baton-retryable"] == "1"


async def test_ids_in_use_are_refused(start: Start) -> None:
    async with start() as bed:
        answer = await bed.post("/generate", {"text": ["a", "b"], "rid": ["same", "same"]})
        assert answer.status_code == 400
        assert "Duplicate request ID detected: same" in answer.text


async def test_token_ids_without_a_tokenizer(start: Start) -> None:
    async with start("--skip-tokenizer-init") as bed:
        body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 2}}
        document = (await bed.post("/generate", body)).json()
        assert list(document) == ["output_ids", "meta_info"]
        assert (await bed.post("/generate", {"text": "a"})).status_code == 400
        body["sampling_params"] = {"stop": "x"}
        assert (await bed.post("/generate", body)).status_code == 400
