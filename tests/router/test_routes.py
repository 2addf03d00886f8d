"""Routes beside generation: health, models, fan-outs, worker administration, metrics, keys, shutdown."""

import asyncio
from urllib.parse import quote

import openai
import pytest
from tests.fakes.fake_worker import FakeWorker, expected_text
from tests.fakes.router_bed import bed, connect, eventually, http_request

from baton.router.config import HealthConfig, WorkerSpec

BODY = {"model": "fake", "prompt": "p", "max_tokens": 4}


async def test_health_is_always_200_and_readiness_says_who_is_missing():
    async with bed(waits=False, health=HealthConfig(retry_interval_s=0.01)) as b:
        b.decode[0].healthy = False
        await eventually(lambda: b.router.core.registry.by_role["prefill"][0].healthy)
        assert (await b.get("/health")).status == (await b.get("/liveness")).status == 200
        await eventually(lambda: b.router.core.registry.by_role["decode"][0].healthy is False)
        reply = await b.get("/readiness")
        assert reply.status == 503
        assert reply.json["missing"] == {"decode": f"{b.decode[0].url}: /health answered 503"}
        b.decode[0].healthy = True
        await eventually(lambda: b.router.core.registry.by_role["decode"][0].healthy)
        assert (await b.get("/readiness")).json == {"status": "ready", "healthy_workers": {"prefill": 1, "decode": 1}}


async def test_the_router_starts_before_its_workers():
    worker = await FakeWorker("regular").start()
    port = worker.port
    worker.kill()
    specs = (WorkerSpec(worker.url, "regular"),)
    async with bed(regular=1, workers=specs, waits=False, health=HealthConfig(retry_interval_s=0.01)) as b:
        await eventually(lambda: b.router.core.registry.all()[0].healthy is False)
        assert (await b.ask("/v1/completions", BODY)).status == 503
        await worker.start(port)
        await b.ready()
        assert (await b.ask("/v1/completions", BODY)).status == 200
    await worker.stop()


async def test_a_worker_that_fails_its_checks_gets_nothing_until_it_has_proved_itself():
    health = HealthConfig(interval_s=0.01, retry_interval_s=0.01, failure_threshold=2, success_threshold=2)
    async with bed(decode=2, health=health) as b:
        b.decode[0].healthy = False
        await eventually(lambda: not b.router.core.registry.by_role["decode"][0].healthy)
        for _ in range(3):
            assert (await b.ask("/v1/completions", BODY)).status == 200
        assert not b.decode[0].seen
        b.decode[0].healthy = True
        await b.ready()


async def test_fan_outs_reach_every_worker():
    async with bed(prefill=2, decode=2) as b:
        assert (await b.ask("/flush_cache")).body.startswith(b"Cache flushed.\n")
        assert (await b.get("/health_generate")).status == 200
        for worker in b.workers:
            assert worker.calls["/flush_cache"] == worker.calls["/health_generate"] == 1
        b.prefill[1].kill()
        reply = await b.get("/health_generate")
        assert reply.status == 503
        assert list(reply.json["failed"]) == [b.prefill[1].url]


async def test_server_info_has_mini_lb_s_shape():
    async with bed(prefill=2, decode=2) as b:
        info = (await b.get("/get_server_info")).json
        assert info["internal_states"] == [{"port": worker.port} for worker in b.decode]
        assert [one["version"] for one in info["prefill"] + info["decode"]] == ["fake"] * 4


async def test_model_routes_answer_for_the_first_worker():
    async with bed() as b:
        b.decode[0].calls.clear()
        assert (await b.get("/v1/models")).json["data"][0]["id"] == "fake"
        assert (await b.get("/get_model_info")).json["model_path"] == "fake"
        assert not b.decode[0].calls


async def test_regular_workers_need_no_pairing():
    async with bed(regular=2) as b:
        for _ in range(4):
            reply = await b.ask("/v1/completions", BODY)
            assert reply.json["choices"][0]["text"] == expected_text("p", 0, 4)
        assert [len(worker.seen) for worker in b.regular] == [2, 2]
        assert "bootstrap_room" not in b.regular[0].seen[0].body


async def test_workers_come_and_go():
    async with bed() as b:
        added = await FakeWorker("decode", b.fabric).start()
        reply = await b.ask("/workers", {"url": added.url, "worker_type": "decode"})
        assert reply.status == 202
        await b.ready()
        listed = (await b.get("/workers")).json
        assert listed["total"] == 3
        assert {one["url"] for one in listed["workers"]} == {b.prefill[0].url, b.decode[0].url, added.url}

        client = await connect(b.router.port)
        added.gate = asyncio.Event()
        b.decode[0].gate = added.gate
        client.send(http_request("/v1/completions", BODY | {"stream": True}))
        await eventually(lambda: b.decode[0].at_gate + added.at_gate == 1)
        busy = added if added.at_gate else b.decode[0]
        reply = await b.ask(f"/workers/{quote(busy.url, safe='')}", method="DELETE")
        assert reply.json == {"status": "draining", "url": busy.url, "load": 1}
        added.gate.set()
        assert (await client.reply()).events[-1] == "[DONE]", "what was in progress has ended well"
        await eventually(lambda: len(b.router.core.registry.by_role["decode"]) == 1)
        assert (await b.ask("/v1/completions", BODY)).status == 200
        assert len(busy.seen) == 1
        await added.stop()


@pytest.mark.parametrize(
    ("path", "method", "body", "status", "word"),
    [
        ("/workers", "POST", {"url": "http://x:1"}, 400, "worker_type"),
        ("/workers", "POST", {"url": "http://x:1", "worker_type": "regular"}, 400, "no regular workers"),
        ("/workers", "POST", {"url": "ftp://x:1", "worker_type": "decode"}, 400, "only http://"),
        ("/workers", "POST", {"worker_type": "decode"}, 400, "url"),
        ("/workers/http%3A%2F%2Fx%3A1", "DELETE", None, 404, "http://x:1"),
        ("/register", "POST", {"mode": "prefill", "registry_url": "http://x:1"}, 400, "bootstrap_port"),
        ("/register", "POST", {"mode": "other", "registry_url": "http://x:1"}, 400, "mode"),
        ("/abort_request", "POST", {}, 400, "rid"),
        ("/abort_request", "POST", b"{", 400, "body"),
    ],
)
async def test_bad_administration_is_refused(path, method, body, status, word):
    async with bed() as b:
        reply = await b.ask(path, body, method=method)
        assert reply.status == status
        assert word in reply.json["error"]["message"]


async def test_workers_register_themselves_and_again_after_a_restart():
    async with bed() as b:
        added = await FakeWorker("prefill", b.fabric).start()
        for port in (9100, 9200):
            body = {"mode": "prefill", "registry_url": added.url, "bootstrap_port": port}
            assert (await b.ask("/register", body)).status == 200
        workers = b.router.core.registry.by_role["prefill"]
        assert [worker.bootstrap_port for worker in workers] == [9000, 9200]
        await added.stop()


async def test_metrics_count_what_happened():
    async with bed(decode=2) as b:
        b.decode[0].faults.status, b.decode[0].faults.status_count = 500, 1
        for _ in range(3):
            await b.ask("/v1/completions", BODY)
        await b.ask("/v1/completions", b"{")
        text = (await b.get("/metrics")).body.decode()
        samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert samples['smg_http_requests_total{method="POST",path="/v1/completions"}'] == "4"
        assert samples['smg_http_responses_total{path="/v1/completions",status_code="200"}'] == "3"
        assert samples['smg_http_responses_total{path="/v1/completions",status_code="400"}'] == "1"
        assert samples['smg_http_request_duration_seconds_count{path="/v1/completions"}'] == "4"
        assert samples['smg_router_retries_total{worker_type="decode",reason="status"}'] == "1"
        assert samples['smg_worker_pool_size{worker_type="decode"}'] == "2"
        prefill = f'{{worker_type="prefill",worker="{b.prefill[0].url}"}}'
        assert samples["smg_worker_health" + prefill] == "1"
        assert samples["smg_worker_selection_total" + prefill] == "4"
        assert samples["smg_worker_requests_active" + prefill] == "0"
        assert samples["smg_worker_cb_state" + prefill] == "0"


async def test_metrics_parse_as_prometheus_text():
    from prometheus_client.parser import text_string_to_metric_families

    async with bed() as b:
        await b.ask("/v1/completions", BODY | {"stream": True})
        families = list(text_string_to_metric_families((await b.get("/metrics")).body.decode()))
        assert {family.type for family in families} == {"counter", "gauge", "histogram"}
        assert len({family.name for family in families}) == len(families)


async def test_an_api_key_guards_all_but_probes_and_goes_to_the_workers():
    async with bed(api_key="k") as b:
        for headers in ({}, {"authorization": "Bearer no"}):
            reply = await b.ask("/v1/completions", BODY, headers)
            assert reply.status == 401
            assert reply.json["error"]["type"] == "AuthenticationError"
        assert (await b.get("/readiness")).status == 200
        assert (await b.get("/workers")).status == 401
        assert (await b.ask("/v1/completions", BODY, {"authorization": "Bearer k"})).status == 200
        assert b.decode[0].seen[0].headers["authorization"] == "Bearer k"


async def test_a_client_brings_the_workers_key_where_the_router_has_none():
    async with bed() as b:
        for worker in b.workers:
            worker.key = "Bearer w"
        with_key = {"authorization": "Bearer w"}
        for method, path, body in (
            ("GET", "/v1/models", None),
            ("GET", "/get_model_info", None),
            ("GET", "/health_generate", None),
            ("POST", "/flush_cache", {}),
            ("POST", "/abort_request", {"rid": "r"}),
            ("POST", "/v1/completions", BODY),
        ):
            assert (await b.ask(path, body, method=method)).status == 401, path
            assert (await b.ask(path, body, with_key, method)).status == 200, path
        info = await b.ask("/get_server_info", None, with_key, "GET")
        assert info.json["internal_states"] == [{"port": worker.port} for worker in b.decode]


async def test_stopping_lets_requests_end():
    async with bed(shutdown_grace_s=10.0) as b:
        b.decode[0].gate = asyncio.Event()
        client, idle = await connect(b.router.port), await connect(b.router.port)
        client.send(http_request("/v1/completions", BODY | {"stream": True}))
        await eventually(lambda: b.decode[0].at_gate == 1)
        stopping = asyncio.create_task(b.router.stop())
        await eventually(idle.closed.is_set)
        with pytest.raises(OSError):
            await connect(b.router.port)
        b.decode[0].gate.set()
        assert (await client.reply()).events[-1] == "[DONE]"
        await stopping
        assert client.closed.is_set() or not b.router.connections


async def test_stopping_ends_what_takes_too_long_with_an_error():
    async with bed(shutdown_grace_s=0.0) as b:
        b.decode[0].faults.hang = True
        client = await connect(b.router.port)
        client.send(http_request("/v1/completions", BODY))
        await eventually(lambda: b.decode[0].seen)
        await b.router.stop()
        reply = await client.reply()
        assert reply.status == 503
        assert reply.json["error"]["type"] == "shutting_down"
        assert b.decode[0].aborts


async def test_the_openai_client_works():
    async with bed() as b:
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{b.router.port}/v1", api_key="x", max_retries=0)
        messages = [{"role": "user", "content": "hi"}]
        assert [model.id async for model in client.models.list()] == ["fake"]
        whole = await client.chat.completions.create(model="fake", messages=messages, max_tokens=5)  # type: ignore[arg-type]
        stream = await client.chat.completions.create(
            model="fake", messages=messages, max_tokens=5, stream=True, stream_options={"include_usage": True}  # type: ignore[arg-type]
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
        assert (
            "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
        )
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 5
        b.decode[0].faults.status = 400
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model="fake", messages=messages)  # type: ignore[arg-type]
        await client.close()
