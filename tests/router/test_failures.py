"""What goes wrong before an answer: error pass-through, retries, breakers, deadlines, clients that leave."""

import asyncio

import pytest
from tests.fakes.fake_worker import expected_text
from tests.fakes.router_bed import FAST_RETRY, bed, connect, eventually, http_request

from baton.router.config import BreakerConfig, HealthConfig, LimitsConfig, RetryConfig

BODY = {"model": "fake", "prompt": "p", "max_tokens": 4}
NO_RETRY = RetryConfig(max_retries=0, migration_limit=0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("status", [400, 422, 500, 503])
async def test_the_status_and_body_of_a_worker_s_error_reach_the_client(side, status, stream):
    async with bed(retry=NO_RETRY) as b:
        faulty = getattr(b, side)[0]
        faulty.faults.status = status
        if side == "prefill":
            b.decode[0].faults.hang = True  # it would wait for a transfer that never comes
        reply = await b.ask("/v1/completions", BODY | {"stream": stream})
        assert reply.status == status
        assert reply.body == faulty.faults.error_body


async def test_a_prefill_error_aborts_decode():
    async with bed() as b:
        b.prefill[0].faults.status = 400
        reply = await b.ask("/v1/completions", BODY)
        assert reply.status == 400
        await eventually(lambda: b.decode[0].aborts and b.decode[0].disconnects)
        assert b.decode[0].aborts[0]["rid"] == b.decode[0].seen[0].body["rid"]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_retryable_status_is_tried_on_another_pair(side, status):
    async with bed(prefill=2, decode=2) as b:
        getattr(b, side)[0].faults.status = status
        for _ in range(4):
            reply = await b.ask("/v1/completions", BODY)
            assert reply.status == 200
            assert reply.json["choices"][0]["text"] == expected_text("p", 0, 4)


async def test_our_workers_word_beats_the_status():
    async with bed(decode=2) as b:
        for worker in b.decode:
            worker.faults.status = 500
            worker.faults.error_headers = "x-baton-retryable: 0\r\nx-baton-error-stage: decode\r\n"
        assert (await b.ask("/v1/completions", BODY)).status == 500
        assert len(b.decode[0].seen) + len(b.decode[1].seen) == 1


async def test_retries_end_and_the_last_error_is_passed_on():
    async with bed(decode=1, retry=RetryConfig(max_retries=2, initial_backoff_s=0.001)) as b:
        b.decode[0].faults.status = 500
        reply = await b.ask("/v1/completions", BODY)
        assert reply.status == 500
        assert len(b.decode[0].seen) == 3


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_dead_worker_is_gone_round(side):
    async with bed(prefill=2, decode=2) as b:
        getattr(b, side)[0].kill()
        for _ in range(6):
            assert (await b.ask("/v1/completions", BODY)).status == 200


async def test_a_worker_that_dies_without_an_answer_is_gone_round():
    async with bed(prefill=1, decode=2) as b:
        b.decode[0].faults.die_before_answer = 1
        reply = await b.ask("/v1/completions", BODY)
        assert reply.json["choices"][0]["text"] == expected_text("p", 0, 4)


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_no_healthy_worker_is_a_503_that_names_the_side(side):
    async with bed(retry=RetryConfig(migration_wait_s=3600)) as b:  # for those for whom there was one
        getattr(b, side)[0].kill()
        worker = b.router.core.registry.by_role[side][0]
        b.router.core.wake(worker)
        await eventually(lambda: not worker.healthy)
        reply = await b.ask("/v1/completions", BODY)
        error = reply.json["error"]
        assert reply.status == 503
        assert error["type"] == "no_healthy_worker"
        assert f"no healthy {side} worker" in error["message"]
        assert error["stage"] == "router"
        assert error["retryable"] is True
        assert error["request_id"] == reply.headers["x-request-id"]


async def test_a_full_queue_opens_no_breaker():
    async with bed(breaker=BreakerConfig(failure_threshold=1), retry=NO_RETRY) as b:
        for worker in b.workers:
            worker.faults.status, worker.faults.status_count = 503, 5
        for _ in range(5):
            assert (await b.ask("/v1/completions", BODY)).status == 503
        for worker in b.workers:
            worker.faults.status_count = 0
        assert (await b.ask("/v1/completions", BODY)).status == 200
        assert {worker.breaker.state for worker in b.router.core.registry.all()} == {"closed"}


async def test_a_broken_worker_gets_no_more_requests():
    async with bed(decode=2, breaker=BreakerConfig(failure_threshold=2)) as b:
        b.decode[0].faults.status = 500
        for _ in range(10):
            assert (await b.ask("/v1/completions", BODY)).status == 200
        assert len(b.decode[0].seen) == 2


async def test_open_breakers_never_make_the_service_unavailable():
    async with bed(breaker=BreakerConfig(failure_threshold=1), retry=NO_RETRY) as b:
        b.decode[0].faults.status, b.decode[0].faults.status_count = 500, 3
        for _ in range(3):
            assert (await b.ask("/v1/completions", BODY)).status == 500
        assert (await b.ask("/v1/completions", BODY)).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_aborts_both_sides(stream):
    async with bed() as b:
        b.prefill[0].faults.no_transfer = True
        client = await connect(b.router.port)
        client.send(http_request("/v1/completions", BODY | {"stream": stream}))
        await eventually(lambda: b.prefill[0].seen and b.decode[0].seen)
        client.close()
        for worker in (b.prefill[0], b.decode[0]):
            await eventually(lambda worker=worker: worker.aborts and worker.disconnects)
            assert worker.aborts[0]["rid"] == worker.seen[0].body["rid"]
        await eventually(lambda: not b.router.core.exchanges)
        assert all(worker.active == 0 for worker in b.router.core.registry.all())


async def test_leaving_in_mid_stream_aborts_every_prompt_of_a_batch():
    async with bed() as b:
        b.decode[0].gate, b.decode[0].gate_at = asyncio.Event(), 2
        client = await connect(b.router.port)
        client.send(http_request("/v1/completions", BODY | {"stream": True, "prompt": ["a", "b"], "n": 2}))
        await client.body_with(b"data: ")
        client.close()
        await eventually(lambda: b.decode[0].aborts)
        sent = b.decode[0].seen[0].body["rid"]
        assert all(rid.startswith(b.decode[0].aborts[0]["rid"]) for rid in sent)


async def test_the_deadline_ends_a_hanging_request_and_says_where_it_was():
    async with bed(request_timeout_s=0.05) as b:
        b.decode[0].faults.hang = True
        reply = await b.ask("/v1/completions", BODY)
        assert reply.status == 504
        assert reply.json["error"]["type"] == "deadline_exceeded"
        assert reply.json["error"]["stage"] == "decode"
        b.decode[0].faults.hang, b.prefill[0].faults.hang = False, True
        assert (await b.ask("/v1/completions", BODY)).json["error"]["stage"] == "prefill"
        assert {worker.breaker.state for worker in b.router.core.registry.all()} == {"closed"}


async def test_the_deadline_of_a_caller_is_kept_and_handed_on():
    async with bed() as b:
        await b.ask("/v1/completions", BODY, {"x-baton-timeout-s": "5"})
        assert 0 < float(b.decode[0].seen[0].headers["x-baton-timeout-s"]) <= 5
        b.decode[0].faults.hang = True
        assert (await b.ask("/v1/completions", BODY, {"x-baton-timeout-s": "0.05"})).status == 504
        assert (await b.ask("/v1/completions", BODY, {"x-baton-timeout-s": "soon"})).status == 400


async def test_the_deadline_ends_a_begun_stream_with_an_error_event():
    async with bed(request_timeout_s=0.2) as b:
        b.decode[0].gate, b.decode[0].gate_at = asyncio.Event(), 2
        reply = await b.ask("/v1/completions", BODY | {"stream": True})
        assert reply.status == 200
        assert reply.events[-1]["error"]["type"] == "deadline_exceeded"


async def test_abort_by_rid_ends_the_request():
    async with bed() as b:
        b.decode[0].faults.hang = True
        asking = asyncio.create_task(b.ask("/v1/completions", BODY | {"rid": "job-7"}))
        await eventually(lambda: b.decode[0].seen)
        assert (await b.ask("/abort_request", {"rid": "job-"})).status == 200
        reply = await asking
        assert reply.status == 499
        assert reply.json["error"]["type"] == "aborted"
        assert {"rid": "job-"} in b.prefill[0].aborts, "also passed on to every worker"


@pytest.mark.parametrize("stream", [False, True])
async def test_prefill_logprobs_are_joined_to_the_answer_of_decode(stream):
    async with bed() as b:
        body = {"text": "p", "return_logprob": True, "stream": stream, "sampling_params": {"max_new_tokens": 3}}
        reply = await b.ask("/generate", body)
        answers = [event for event in reply.events if event != "[DONE]"] if stream else [reply.json]
        assert len(answers) == (3 if stream else 1)
        for answer in answers:
            assert answer["meta_info"]["input_token_logprobs"] == [[-1.0, 1, None]]


async def test_max_concurrent_requests_and_its_queue():
    limits = LimitsConfig(max_concurrent=1, queue_size=1)
    async with bed(limits=limits, retry=FAST_RETRY) as b:
        b.decode[0].gate = asyncio.Event()
        stream = BODY | {"stream": True}
        first = asyncio.create_task(b.ask("/v1/completions", stream))
        await eventually(lambda: b.decode[0].at_gate == 1)
        second = asyncio.create_task(b.ask("/v1/completions", stream))
        await eventually(lambda: b.router.core.admission.num_waiting == 1)
        third = await b.ask("/v1/completions", stream)
        assert third.status == 429
        assert third.json["error"]["type"] == "queue_full"
        b.decode[0].gate.set()
        assert (await first).status == (await second).status == 200
        assert b.router.core.admission.in_progress == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_on_a_frozen_worker_go_elsewhere(stream):
    """The worker's sockets stay open, but nothing is answered: neither requests nor health checks."""
    health = HealthConfig(interval_s=0.01, retry_interval_s=0.01, timeout_s=0.02, failure_threshold=2)
    async with bed(decode=2, health=health) as b:
        frozen, other = b.decode
        frozen.gate, frozen.gate_at = asyncio.Event(), 2
        frozen.faults.hang = not stream
        asking = asyncio.create_task(b.ask("/v1/completions", BODY | {"stream": stream}))
        await eventually(lambda: frozen.at_gate if stream else frozen.seen)
        frozen.frozen = True
        reply = await asking
        answers = [event for event in reply.events if event != "[DONE]"] if stream else [reply.json]
        assert "".join(answer["choices"][0]["text"] for answer in answers) == expected_text("p", 0, 4)
        assert len(other.seen) == 1


async def test_a_failed_transfer_avoids_the_prefill_worker_too():
    async with bed(prefill=2, decode=2) as b:
        b.decode[0].faults.status, b.decode[0].faults.status_count = 500, 1
        b.decode[0].faults.error_headers = "x-baton-retryable: 1\r\nx-baton-error-stage: transfer\r\n"
        assert (await b.ask("/v1/completions", BODY)).status == 200
        assert len(b.prefill[1].seen) == len(b.decode[1].seen) == 1


async def test_a_retry_avoids_the_worker_that_failed_whatever_the_policy_likes():
    async with bed(decode=2, decode_policy="cache_aware") as b:
        assert (await b.ask("/v1/completions", BODY)).status == 200
        liked = next(worker for worker in b.decode if worker.seen)
        liked.faults.status = 500
        assert (await b.ask("/v1/completions", BODY)).status == 200
        assert len(liked.seen) == 2


async def test_a_refused_connection_takes_a_worker_out_at_once():
    async with bed() as b:
        worker = b.router.core.registry.by_role["decode"][0]
        b.router.core.on_connect_failure(worker, "refused")
        assert not worker.is_available


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("found_by", ["this request, on a new connection", "this request, on a kept one", "another"])
async def test_a_request_for_which_there_was_a_pair_waits_for_its_worker_to_come_back(found_by, side, stream):
    """However the loss shows: the answer breaks off, the connection looks stale, or another request saw it first."""
    async with bed(health=HealthConfig(retry_interval_s=0.01, success_threshold=1)) as b:
        victim = getattr(b, side)[0]
        worker = b.router.core.registry.by_role[side][0]
        if found_by != "this request, on a new connection":
            assert (await b.ask("/v1/completions", BODY)).status == 200  # leaves connections that are used again
        for one in b.workers:
            one.faults.hang = True
            one.seen.clear()
        client = await connect(b.router.port)
        client.send(http_request("/v1/completions", BODY | {"stream": stream}))
        await eventually(lambda: b.prefill[0].seen and b.decode[0].seen)
        if found_by == "another":
            b.router.core.on_connect_failure(worker, "refused")
        port = victim.port
        victim.kill()
        await eventually(lambda: not worker.healthy and worker.active == 0)
        for one in b.workers:
            one.faults.hang = False
        await victim.start(port)
        reply = await client.reply()
        answers = [event for event in reply.events if event != "[DONE]"] if stream else [reply.json]
        assert "".join(answer["choices"][0]["text"] for answer in answers) == expected_text("p", 0, 4), reply.body


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_request_that_finds_its_only_worker_gone_waits_for_it_to_come_back(side):
    async with bed(health=HealthConfig(retry_interval_s=0.01, success_threshold=1)) as b:
        victim = getattr(b, side)[0]
        victim.kill()
        asking = asyncio.create_task(b.ask("/v1/completions", BODY))
        await eventually(lambda: not b.router.core.registry.by_role[side][0].healthy)
        await victim.start(victim.port)
        assert (await asking).json["choices"][0]["text"] == expected_text("p", 0, 4)


async def test_a_request_waits_for_its_worker_only_so_long():
    async with bed(retry=RetryConfig(initial_backoff_s=0.001, migration_wait_s=0.02)) as b:
        b.decode[0].kill()
        reply = await b.ask("/v1/completions", BODY)
        assert reply.status == 503
        assert "no healthy decode worker" in reply.json["error"]["message"]


async def test_the_deadline_of_a_request_that_waits_for_its_worker_says_who_is_missing():
    async with bed(request_timeout_s=0.05) as b:
        b.decode[0].kill()
        reply = await b.ask("/v1/completions", BODY)
        assert reply.status == 504
        assert "no healthy decode worker" in reply.json["error"]["message"]


async def test_without_retries_nobody_waits():
    async with bed(retry=NO_RETRY) as b:
        b.decode[0].kill()
        assert (await b.ask("/v1/completions", BODY)).status == 503
