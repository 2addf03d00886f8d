"""Health, information, cache, aborts, metrics, models, tokenising, the API key; and what happens when the rank is lost."""

import asyncio
import json

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.server.conftest import MODEL, Bed, Start, sse_events

from baton.protocol.rank import Abort, GetState, Submit


async def test_health_follows_warm_up_stop_and_loss(start: Start) -> None:
    async with start() as bed:
        assert (await bed.http.get("/health")).status_code == 200
        assert (await bed.http.get("/health_generate")).status_code == 200
        [check] = bed.rank.received_of(Submit)
        assert check.rid.startswith("HEALTH_CHECK_")
        assert (check.input_ids, check.sampling.max_new_tokens) == ([0], 1)
        bed.ctx.is_warm = False
        assert (await bed.http.get("/health")).status_code == 503
        bed.ctx.is_warm, bed.ctx.is_stopping = True, True
        assert (await bed.http.get("/health_generate")).status_code == 503
        bed.ctx.is_stopping = False
        bed.ctx.engines.fail("test")
        assert (await bed.http.get("/health")).status_code == 503


async def test_a_busy_rank_is_healthy_and_a_hung_one_is_not(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.engine.server.admin.HEALTH_WAIT_S", 0.01)
    async with start() as bed:
        bed.rank.is_hung = True
        assert (await bed.http.get("/health")).status_code == 200
        monkeypatch.setattr("baton.engine.server.admin.CALL_TIMEOUT_S", 0.005)
        assert (await bed.http.get("/health")).status_code == 503
        assert (await bed.http.get("/health_generate")).status_code == 503


async def test_health_requests_of_a_disaggregated_worker_go_to_nobody(start: Start) -> None:
    async with start("--disaggregation-mode", "decode") as bed:
        await bed.http.get("/health_generate")
        [check] = bed.rank.received_of(Submit)
        assert check.bootstrap is not None
        assert check.bootstrap.host == "2.2.2.2"


async def test_information(start: Start) -> None:
    async with start("--served-model-name", "name", "--api-key", "secret") as bed:
        bed.http.headers["authorization"] = "Bearer secret"
        info = (await bed.http.get("/get_model_info")).json()
        assert list(info) == [
            "model_path", "tokenizer_path", "is_generation", "preferred_sampling_params", "weight_version",
            "has_image_understanding", "has_audio_understanding",
        ]  # fmt: skip
        server = (await bed.http.get("/get_server_info")).json()
        assert server["max_total_num_tokens"] == 100_000
        assert server["max_req_input_len"] == 8000
        assert server["tp_size"] == 1
        assert server["internal_states"][0]["last_gen_throughput"] == 0.0
        assert "secret" not in json.dumps(server)
        models = (await bed.http.get("/v1/models")).json()
        created = models["data"][0].pop("created")
        assert isinstance(created, int)
        card = {
            "id": "name",
            "object": "model",
            "owned_by": "sglang",
            "root": "name",
            "parent": None,
            "max_model_len": 8192,
        }
        assert models == {"object": "list", "data": [card]}
        assert (await bed.http.get("/v1/models/name")).json()["id"] == "name"
        assert (await bed.http.get("/v1/models/other/x")).status_code == 404
        assert (await bed.http.get("/get_load")).json()[0]["num_reqs"] == 0


async def test_flush_cache(start: Start) -> None:
    body = (
        "Cache flushed.\nPlease check backend logs for more details. "
        "(When there are running or waiting requests, the operation will not be performed.)\n"
    )
    async with start() as bed:
        for method in ("GET", "POST"):
            answer = await bed.http.request(method, "/flush_cache")
            assert (answer.status_code, answer.text) == (200, body)
        bed.rank.flush_ok = False
        assert (await bed.http.post("/flush_cache")).status_code == 400


async def test_abort_by_prefix_is_an_ordinary_end(start: Start) -> None:
    async with start() as bed:
        bed.rank.credits = 1
        bodies = [{"text": "a", "rid": rid} for rid in ("x-1", "x-2", "y-1")]
        requests = [asyncio.create_task(bed.post("/generate", body)) for body in bodies]
        await bed.until(lambda: len(bed.rank.received_of(Submit)) == 3)
        assert (await bed.post("/abort_request", {"rid": "x-"})).status_code == 200
        for request in requests[:2]:
            answer = await request
            assert answer.status_code == 200
            assert answer.json()["meta_info"]["finish_reason"]["type"] == "abort"
        assert {one.rid for one in bed.rank.received_of(Abort)} == {"x-1", "x-2"}
        assert (await bed.post("/abort_request", {})).status_code == 400
        assert (await bed.post("/abort_request", {"abort_all": True})).status_code == 200
        assert (await requests[2]).json()["meta_info"]["finish_reason"]["type"] == "abort"


async def test_cached_tokens_are_told_by_source(start: Start) -> None:
    """A decode worker without tiers tells of its prefill's; a worker with tiers tells also when nothing was cached."""
    sampling = {"max_new_tokens": 3}
    async with start("--enable-cache-report", cached_tokens=9, cached_host=2, cached_store=4) as bed:
        meta = (await bed.post("/generate", {"text": "Hi", "sampling_params": sampling})).json()["meta_info"]
        assert (meta["cached_tokens"], meta["cached_tokens_details"]) == (9, {"device": 3, "host": 2, "storage": 4})
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        usage = (await bed.post("/v1/chat/completions", body)).json()["usage"]
        assert usage["prompt_tokens_details"] == {
            "cached_tokens": 9, "cached_tokens_details": {"device": 3, "host": 2, "storage": 4},
        }  # fmt: skip
    async with start("--enable-hierarchical-cache") as bed:
        meta = (await bed.post("/generate", {"text": "Hi", "sampling_params": sampling})).json()["meta_info"]
        assert meta["cached_tokens_details"] == {"device": 0, "host": 0, "storage": 0}
    async with start("--enable-cache-report", cached_tokens=1) as bed:
        meta = (await bed.post("/generate", {"text": "Hi", "sampling_params": sampling})).json()["meta_info"]
        assert "cached_tokens_details" not in meta


async def test_the_store_is_cleared_by_sglangs_route(start: Start) -> None:
    async with start() as bed:
        assert (await bed.post("/clear_hicache_storage_backend", {})).status_code == 200
    async with start(flush_ok=False) as bed:
        assert (await bed.post("/clear_hicache_storage_backend", {})).status_code == 400


async def test_metrics_have_sglangs_names_and_both_spellings(start: Start) -> None:
    async with start("--enable-metrics", cached_tokens=1) as bed:
        before = await samples(bed)
        assert before["sglang:num_requests_total"] == 0, "the warm-up is not measured"
        assert (await bed.http.get("/health_generate")).status_code == 200
        await bed.post("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 3}})
        after = await samples(bed)

        def grown(name: str) -> float:
            return after[f"sglang:{name}"] - before[f"sglang:{name}"]

        assert grown("prompt_tokens_total") == 1
        assert grown("generation_tokens_total") == 3
        assert grown("cached_tokens_total") == 1
        assert grown("num_requests_total") == 1
        assert grown("time_to_first_token_seconds_count") == 1
        assert grown("inter_token_latency_seconds_count") == 2
        assert grown("e2e_request_latency_seconds_count") == 1
        for name in (
            "num_running_reqs", "token_usage", "num_prefill_inflight_queue_reqs", "num_prefill_infight_queue_reqs",
            "num_transfer_failed_reqs_total", "num_bootstrap_failed_reqs", "max_total_num_tokens", "engine_startup_time",
        ):  # fmt: skip
            assert f"sglang:{name}" in after


async def samples(bed: Bed) -> dict[str, float]:
    text = (await bed.http.get("/metrics")).text
    assert f'model_name="{MODEL}"' in text
    assert 'engine_type="unified"' in text
    families = text_string_to_metric_families(text)
    return {sample.name: sample.value for family in families for sample in family.samples}


async def test_no_metrics_route_without_the_flag(start: Start) -> None:
    async with start() as bed:
        answer = await bed.http.get("/metrics")
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "NotFoundError"


async def test_api_key(start: Start) -> None:
    async with start("--api-key", "s3cret") as bed:
        for given in (None, "Bearer wrong", "s3cret"):
            headers = {} if given is None else {"authorization": given}
            answer = await bed.http.get("/v1/models", headers=headers)
            assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
        assert (await bed.http.get("/health")).status_code == 200
        client = openai.AsyncOpenAI(base_url=f"{bed.url}/v1", api_key="s3cret", http_client=bed.http)
        assert (await client.models.list()).data[0].id == MODEL


async def test_tokenize_and_back(start: Start) -> None:
    async with start() as bed:
        answer = (await bed.post("/tokenize", {"model": MODEL, "prompt": "Hello there"})).json()
        assert answer == {"tokens": bed.tokenizer.encode("Hello there"), "count": 2, "max_model_len": 8192}
        assert (await bed.post("/v1/tokenize", {"prompt": ["a", "b c"]})).json()["count"] == [1, 2]
        assert (await bed.post("/detokenize", {"tokens": answer["tokens"]})).json() == {"text": "Hello there"}
        assert (await bed.post("/v1/detokenize", {"tokens": [[5], [6]]})).json()["text"] == [
            bed.tokenizer.decode([5]), bed.tokenizer.decode([6]),
        ]  # fmt: skip
        assert (await bed.post("/detokenize", {"tokens": [10**6]})).status_code == 400


async def test_a_lost_rank_ends_every_request_with_a_retryable_error(start: Start) -> None:
    async with start("--disaggregation-mode", "decode") as bed:
        bed.rank.credits = 2
        common = {"text": "a", "bootstrap_host": "h", "bootstrap_room": 1}
        plain = asyncio.create_task(bed.post("/generate", common))
        async with bed.http.stream("POST", "/generate", json={**common, "stream": True, "rid": "s1"}) as stream:
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            await bed.until(lambda: len(bed.rank.received_of(Submit)) == 2)
            bed.ctx.engines.fail("the test took it")
            events = sse_events("\n".join([line async for line in lines]))
            assert events[-1] == "[DONE]"
            error = json.loads(events[-2])["error"]
            assert (error["code"], error["stage"], error["retryable"], error["request_id"]) == (
                503,
                "decode",
                True,
                "s1",
            )
        answer = await plain
        assert answer.status_code == 503
        assert answer.headers["x-baton-retryable"] == "1"
        assert answer.headers["x-baton-error-stage"] == "decode"
        assert "the test took it" in answer.json()["error"]["message"]
        assert (await bed.post("/generate", common)).status_code == 503


async def test_requests_that_outlast_a_stopping_worker_end_with_a_retryable_error(start: Start) -> None:
    async with start() as bed:
        bed.rank.credits = 1
        async with bed.http.stream("POST", "/generate", json={"text": "a", "stream": True, "rid": "s1"}) as stream:
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            bed.ctx.engines.end_all("the worker was told to stop")
            events = sse_events("\n".join([line async for line in lines]))
        error = json.loads(events[-2])["error"]
        assert (error["type"], error["retryable"], error["request_id"]) == ("WorkerLostError", True, "s1")
        assert events[-1] == "[DONE]"
        await bed.until(lambda: bool(bed.rank.received_of(Abort)))
        assert bed.ctx.engines.num_in_flight == 0


async def test_the_watchdog_gives_up_a_rank_that_does_not_answer(start: Start) -> None:
    async with start() as bed:
        bed.rank.is_hung = True
        request = asyncio.create_task(bed.post("/generate", {"text": "a"}))
        await bed.until(lambda: len(bed.rank.received_of(Submit)) == 1)
        watchdog = asyncio.create_task(bed.ctx.engines.watch(0.05))
        answer = await request
        assert answer.status_code == 503
        assert "--watchdog-timeout" in answer.json()["error"]["message"]
        await watchdog
        assert bed.rank.received_of(GetState)


async def test_routes_that_are_not_served_say_so(start: Start) -> None:
    async with start() as bed:
        answer = await bed.post("/v1/embeddings", {"input": "a"})
        assert answer.status_code == 501
        assert "/v1/embeddings" in answer.json()["message"]
        assert (await bed.http.get("/nowhere")).status_code == 404
        assert (await bed.http.get("/generate")).status_code == 405


async def test_errors_carry_the_callers_request_id(start: Start) -> None:
    async with start() as bed:
        answer = await bed.http.post("/generate", json={}, headers={"x-request-id": "q1"})
        assert answer.headers["x-request-id"] == "q1"
        assert answer.json()["error"]["request_id"] == "q1"


async def test_log_requests_shows_start_and_end_but_no_more_than_asked(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for level, seen, unseen in (
        (0, "prompt_tokens=2", "temperature"),
        (1, "temperature=", "my prompt"),
        (3, "my prompt", "\0"),
    ):
        caplog.clear()
        async with start("--log-requests", "--log-requests-level", str(level)) as bed:
            await bed.post("/generate", {"text": "my prompt", "rid": "logged"})
            await bed.until(lambda: any("Finish: " in record.getMessage() for record in caplog.records))
        text = "\n".join(record.getMessage() for record in caplog.records)
        assert "Receive: rid=logged" in text
        assert "Finish: rid=logged finish=stop" in text
        assert seen in text
        assert unseen not in text
