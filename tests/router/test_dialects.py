"""A router finds out what its workers speak, says so, and refuses the one that does not belong."""

import logging
from functools import partial

import pytest
from tests.fakes.fake_vllm import FakeVllm
from tests.fakes.fake_worker import Fabric, FakeWorker, expected_text
from tests.fakes.router_bed import bed, connect, eventually, http_request

from baton.router.config import BreakerConfig, HealthConfig, WorkerSpec

BODY = {"model": "fake", "prompt": "p", "max_tokens": 4}
BATON = partial(FakeVllm, is_baton=True)


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize(
    ("make", "protocol", "found"),
    [
        (FakeVllm, "vllm", "found=vllm version='0.10.0'"),
        (BATON, "vllm", "found=vllm version='0.10.0+baton.1'"),
        (FakeWorker, "sglang", "found=sglang version=''"),
    ],
)
async def test_the_protocol_is_what_the_workers_speak(make, protocol, found, key, caplog):
    caplog.set_level(logging.INFO, "baton.router")
    async with bed(prefill=2, decode=2, make=partial(make), api_key=key) as b:
        headers = {"authorization": "Bearer k"}
        assert (await b.ask("/v1/completions", BODY, headers)).status == 200
        assert b.router.core.protocol == protocol
        said = [line for line in caplog.messages if "hand-over protocol" in line]
        assert len(said) == 1
        assert found in said[0]
        listed = (await b.ask("/workers", None, headers, "GET")).json["workers"]
        assert {one["dialect"] for one in listed} == {protocol}
        text = (await b.get("/metrics")).body.decode()
        assert f'handovers_total{{protocol="{protocol}",outcome="paired"}} 1' in text
        assert f'baton_router_worker_info{{worker_type="decode",worker="{b.decode[0].url}",dialect="{protocol}"' in text
        assert f"baton_router_prefill_seconds_count {int(protocol == 'vllm')}" in text


@pytest.mark.parametrize("make", [FakeVllm, BATON])
async def test_vllm_with_a_key_that_the_router_does_not_have_is_known_all_the_same(make):
    async with bed(make=make, waits=False) as b:
        for worker in b.workers:
            worker.key = "Bearer w"
        await b.ready()
        assert b.router.core.protocol == "vllm"
        assert (await b.ask("/v1/completions", BODY, {"authorization": "Bearer w"})).status == 200
        assert (await b.ask("/v1/completions", BODY)).status == 401


async def test_a_worker_that_says_nothing_is_taken_for_sglang_s_and_that_is_a_warning(caplog):
    def make(role, fabric):
        worker = FakeWorker(role, fabric)
        worker.small_answer = lambda path: (404, b"")
        return worker

    async with bed(make=make) as b:
        assert b.router.core.protocol == "sglang"
        assert (await b.ask("/v1/completions", BODY)).status == 200
        (said,) = [one for one in caplog.records if "hand-over protocol" in one.getMessage()]
        assert said.levelname == "WARNING"


async def test_what_is_no_vllm_but_has_a_version_is_not_taken_for_it():
    def make(role, fabric):
        worker = FakeVllm(role, fabric)
        worker.owned_by = "tensorrt_llm"
        return worker

    async with bed(make=make) as b:
        assert b.router.core.protocol == "sglang"
        assert b.router.core.registry.all()[0].software.dialect == "unknown"


async def test_an_unknown_worker_is_served_in_the_protocol_that_was_asked_for():
    def make(role, fabric):
        worker = FakeVllm(role, fabric)
        worker.version, worker.owned_by = None, "somebody"
        return worker

    async with bed(make=make, pd_protocol="vllm") as b:
        assert (await b.ask("/v1/completions", BODY)).status == 200
        assert b.decode[0].offers[0].is_taken


@pytest.mark.parametrize(
    ("makes", "settings"),
    [
        ([FakeVllm, FakeVllm, FakeWorker], {"pd_protocol": "vllm"}),
        ([FakeWorker, FakeWorker, FakeVllm], {"pd_protocol": "sglang"}),
    ],
)
async def test_a_worker_of_another_protocol_gets_no_request_and_is_named(makes, settings, caplog):
    kinds = iter(makes)
    health = HealthConfig(retry_interval_s=0.01)
    async with bed(
        2, 1, make=lambda role, fabric: next(kinds)(role, fabric), waits=False, health=health, **settings
    ) as b:
        odd = b.router.core.registry.by_role["decode"][0]
        await eventually(lambda: odd.healthy is False)
        await eventually(lambda: all(one.healthy for one in b.router.core.registry.by_role["prefill"]))
        missing = (await b.get("/readiness")).json["missing"]
        assert odd.url in missing["decode"]
        assert "a group has one" in missing["decode"]
        reply = await b.ask("/v1/completions", BODY)
        assert reply.status == 503
        assert "a group has one" in reply.json["error"]["message"]
        calls = b.decode[0].calls["/health"]
        await eventually(lambda: b.decode[0].calls["/health"] > calls + 2)
        refused = [one.getMessage() for one in caplog.records if one.levelname == "ERROR"]
        assert len(refused) == 1, "said once"
        assert odd.url in refused[0]
        assert not b.decode[0].seen


async def test_the_first_worker_decides_and_a_later_one_of_the_other_kind_is_refused():
    async with bed(make=FakeVllm) as b:
        other = await FakeWorker("decode", b.fabric).start()
        assert (await b.ask("/workers", {"url": other.url, "worker_type": "decode"})).status == 202
        worker = b.router.core.registry.by_role["decode"][1]
        await eventually(lambda: worker.healthy is False)
        assert "speaks sglang's protocol" in worker.problem
        for _ in range(3):
            assert (await b.ask("/v1/completions", BODY)).status == 200
        assert not other.seen
        await other.stop()


async def test_a_group_that_is_replaced_as_a_whole_may_be_of_the_other_kind():
    health = HealthConfig(retry_interval_s=0.01, interval_s=0.01, failure_threshold=1, success_threshold=1)
    async with bed(make=FakeWorker, health=health) as b:
        ports = [worker.port for worker in b.workers]
        for worker in b.workers:
            worker.kill()
        await eventually(lambda: not any(one.healthy for one in b.router.core.registry.all()))
        fabric = Fabric()
        new = [
            await FakeVllm(role, fabric).start(port) for role, port in zip(("prefill", "decode"), ports, strict=True)
        ]
        await b.ready()
        assert b.router.core.protocol == "vllm"
        reply = await b.ask("/v1/completions", BODY)
        assert reply.json["choices"][0]["text"] == expected_text("p", 0, 4)
        for worker in new:
            await worker.stop()
            assert not worker.violations


async def test_baton_s_workers_take_sglang_s_protocol_from_who_asks_for_it():
    """In vLLM's dialect, as started by `vllm serve`, with a bootstrap port given to the router."""

    def make(role, fabric):
        worker = FakeWorker(role, fabric)
        worker.small_answer = BATON(role, fabric).small_answer
        return worker

    async with bed(make=make, pd_protocol="sglang") as b:
        assert (await b.ask("/v1/completions", BODY)).status == 200
        assert b.decode[0].seen[0].body["bootstrap_port"] == 9000


# One server as prefill and as decode (kv_both)


@pytest.mark.parametrize("make", [FakeVllm, BATON])
async def test_workers_that_are_both_hand_over_to_each_other(make):
    async with bed(0, 0, both=2, make=make, prefill_policy="random", decode_policy="random") as b:
        for stream in (False, True) * 4:
            assert (await b.ask("/v1/completions", BODY | {"stream": stream})).status == 200
        offers = b.both[0].offers
        assert len(offers) == 8
        assert all(offer.is_taken for offer in offers)
        for worker in b.both:
            prefills = {seen.body["request_id"] for seen in worker.seen if worker.makes_one_token(seen.body)}
            decodes = {seen.body["request_id"] for seen in worker.seen if not worker.makes_one_token(seen.body)}
            assert not prefills & decodes, "never to itself"


async def test_the_only_one_of_both_serves_alone():
    async with bed(0, 0, both=1, make=FakeVllm) as b:
        reply = await b.ask("/v1/completions", BODY)
        assert reply.json["choices"][0]["text"] == expected_text("p", 0, 4)
        (seen,) = b.both[0].seen
        assert "kv_transfer_params" not in seen.body


async def test_of_two_that_are_both_one_may_die():
    async with bed(0, 0, both=2, make=FakeVllm) as b:
        b.both[0].kill()
        for _ in range(4):
            assert (await b.ask("/v1/completions", BODY)).status == 200


async def test_what_one_does_as_decode_does_not_speak_against_it_as_prefill():
    async with bed(0, 0, both=2, make=FakeVllm, breaker=BreakerConfig(failure_threshold=1)) as b:
        b.both[1].faults.status = 500  # asked as decode first: the other one was chosen for prefill
        assert (await b.ask("/v1/completions", BODY)).status == 200
        assert [one.breaker.state for one in b.router.core.registry.by_role["decode"]] == ["closed", "open"]


async def test_one_that_is_both_is_listed_twice_and_removed_at_once():
    async with bed(0, 0, both=2, make=FakeVllm) as b:
        listed = (await b.get("/workers")).json["workers"]
        assert [one["worker_type"] for one in listed] == ["prefill", "prefill", "decode", "decode"]
        url = b.both[0].url
        assert (await b.ask("/workers", {"url": url}, method="DELETE")).status == 202
        await eventually(lambda: len(b.router.core.registry.all()) == 2)
        assert (await b.ask("/flush_cache")).status == 200
        assert b.both[1].calls["/reset_prefix_cache"] == 1, "asked once"
        assert (await b.ask("/v1/completions", BODY)).status == 200


async def test_sglang_s_workers_are_never_both():
    worker = await FakeWorker("regular").start()
    specs = (WorkerSpec(worker.url, "prefill"), WorkerSpec(worker.url, "decode"))
    async with bed(0, 0, workers=specs, waits=False) as b:
        await eventually(lambda: all(one.healthy is False for one in b.router.core.registry.all()))
        assert "kv_both" in (await b.get("/readiness")).json["missing"]["decode"]
    await worker.stop()


async def test_regular_workers_of_any_kind_share_a_router_and_are_ended_as_each_can():
    kinds = iter([FakeVllm, FakeWorker])
    async with bed(regular=2, make=lambda role, fabric: next(kinds)(role, fabric)) as b:
        for worker in b.regular:
            worker.faults.hang = True
        clients = [await connect(b.router.port) for _ in b.regular]
        for client in clients:
            client.send(http_request("/v1/completions", BODY))
        await eventually(lambda: all(worker.seen for worker in b.regular))
        for client in clients:
            client.close()
        await eventually(lambda: all(worker.disconnects for worker in b.regular) and b.regular[1].aborts)
        assert [one["dialect"] for one in (await b.get("/workers")).json["workers"]] == ["vllm", "sglang"]


# The router's other routes


@pytest.mark.parametrize("make", [FakeVllm, BATON])
async def test_fan_outs_ask_for_what_the_workers_have(make):
    async with bed(make=make) as b:
        assert (await b.get("/health_generate")).body == b"OK"
        assert (await b.ask("/abort_request", {"rid": "r"})).status == 200
        assert [worker.calls["/health_generate"] for worker in b.workers] == [0, 0]
        assert [bool(worker.aborts) for worker in b.workers] == [make is BATON] * 2
        assert (await b.get("/v1/models")).json["data"][0]["owned_by"] == "vllm"
        info = (await b.get("/get_server_info")).json
        assert make is BATON or info["decode"] == [{"version": "0.10.0"}]
