"""A worker of two engines behind one port: who gets what, what is asked of all, and what one's end means."""

import asyncio
import json
import re

import pytest
from tests.server.conftest import Bed, Start, sse_events

from baton.engine.server.vllm_dialect import VllmDialect
from baton.protocol.rank import Abort, FlushCache, Submit

TWO = ("--dp-size", "2")


def counts(bed: Bed) -> list[int]:
    """Sequences that each engine has got."""
    return [len(rank.received_of(Submit)) for rank in bed.ranks]


async def test_requests_take_turns_and_choices_share_an_engine(start: Start) -> None:
    async with start(*TWO) as bed:
        for prompt in ("a", "b", "c", "d"):
            answer = await bed.post("/generate", {"text": prompt})
            assert answer.json()["text"] == "Hello there, world!"
        assert counts(bed) == [2, 2]
        answer = await bed.post("/v1/completions", {"model": "/models/demo", "prompt": ["a", "b"], "n": 3})
        assert [one["index"] for one in answer.json()["choices"]] == list(range(6))
        assert counts(bed) == [5, 5]
        assert bed.ctx.engines.num_in_flight == 0


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"data_parallel_rank": 1}, {}),
        ({"routed_dp_rank": 1}, {}),
        ({"routed_dp_rank": 1, "data_parallel_rank": 0}, {}),
        ({}, {"X_data_parallel_rank": "1"}),
    ],
)
async def test_a_request_may_name_its_engine(start: Start, body: dict[str, int], headers: dict[str, str]) -> None:
    async with start(*TWO) as bed:
        for _ in range(2):
            assert (await bed.post("/generate", {"text": "a", **body}, **headers)).status_code == 200
        chat = {"model": "/models/demo", "messages": [{"role": "user", "content": "a"}], **body}
        assert (await bed.post("/v1/chat/completions", chat, **headers)).status_code == 200
        assert counts(bed) == [0, 3]
        assert (await bed.http.get("/get_server_info")).json()["ignored_request_fields"] == {}


async def test_engines_that_there_are_not_are_named(start: Start) -> None:
    async with start(*TWO) as bed:
        answer = await bed.post("/generate", {"text": "a", "data_parallel_rank": 2})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "data_parallel_rank")
        answer = await bed.post("/generate", {"text": "a"}, X_data_parallel_rank="one")
        assert "X-data-parallel-rank must be a whole number, got 'one'" in answer.json()["error"]["message"]
        assert counts(bed) == [0, 0]


async def test_the_room_picks_the_engine_of_a_prefill(start: Start) -> None:
    async with start(*TWO, "--disaggregation-mode", "prefill") as bed:
        body = {"text": "a", "bootstrap_host": "10.0.0.2"}
        for room in (4, 7, 9):
            await bed.post("/generate", {**body, "bootstrap_room": room})
        assert [[one.bootstrap.room for one in rank.received_of(Submit)] for rank in bed.ranks] == [[4], [7, 9]]  # type: ignore[attr-defined]
        answer = await bed.post("/generate", {**body, "bootstrap_room": 4, "data_parallel_rank": 1})
        assert (answer.status_code, counts(bed)) == (200, [2, 2]), "the decode side's engine"


async def test_vllms_hand_over_meets_on_the_engine_of_its_room(start: Start) -> None:
    """The prefill server makes the room up, computes on the engine that the room means, and answers with it."""
    config = ("--disaggregation-mode", "prefill")
    async with start(*TWO, *config, dialect=VllmDialect()) as bed:
        for _ in range(8):
            body = {
                "model": "/models/demo",
                "prompt": "a",
                "max_tokens": 1,
                "kv_transfer_params": {"do_remote_decode": True},
            }
            [room] = (await bed.post("/v1/completions", body)).json()["kv_transfer_params"]["remote_block_ids"]
            await bed.until(lambda: bed.ctx.engines.num_in_flight == 0)
            assert bed.ranks[room % 2].received_of(Submit)[-1].bootstrap.room == room  # type: ignore[attr-defined]


async def test_state_is_told_of_each_engine(start: Start) -> None:
    async with start(*TWO, "--enable-metrics") as bed:
        bed.ranks[1].credits = 0
        waiting = asyncio.create_task(bed.post("/generate", {"text": "a", "data_parallel_rank": 1}))
        await bed.until(lambda: counts(bed) == [0, 1])
        assert [(one["dp_rank"], one["num_reqs"]) for one in (await bed.http.get("/get_load")).json()] == [
            (0, 0),
            (1, 1),
        ]
        info = (await bed.http.get("/get_server_info")).json()
        assert (info["dp_size"], [one["num_running"] for one in info["internal_states"]]) == (2, [0, 1])
        assert info["page_ownership"] == "ok"
        text = (await bed.http.get("/metrics")).text
        running = re.findall(r'sglang:num_running_reqs\{dp_rank="(\d)".*\} (\S+)', text)
        assert running == [("0", "0.0"), ("1", "1.0")]
        bed.ranks[1].give(100)
        await waiting


async def test_one_engine_has_no_number_in_sglangs_metrics(start: Start) -> None:
    async with start("--enable-metrics") as bed:
        assert "dp_rank" not in (await bed.http.get("/metrics")).text


async def test_vllms_metrics_number_the_engines(start: Start) -> None:
    async with start(*TWO, "--dp-rank", "4", "--enable-metrics", dialect=VllmDialect()) as bed:
        body = {"model": "/models/demo", "prompt": "a", "max_tokens": 3}
        for _ in range(3):
            await bed.post("/v1/completions", body)
        text = (await bed.http.get("/metrics")).text
        tokens = re.findall(r'vllm:generation_tokens_total\{engine="(\d)".*\} (\S+)', text)
        assert tokens == [("4", "6.0"), ("5", "3.0")]
        assert re.findall(r'vllm:request_success_total\{engine="(\d)",finished_reason="length".*\} (\S+)', text) == [
            ("4", "2.0"), ("5", "1.0"),
        ]  # fmt: skip
        assert re.findall(r'vllm:num_requests_running\{engine="(\d)"', text) == ["4", "5"]


async def test_health_is_that_of_all(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.engine.server.admin.HEALTH_WAIT_S", 0.01)
    async with start(*TWO) as bed:
        assert (await bed.http.get("/health_generate")).status_code == 200
        assert counts(bed) == [1, 1]
        bed.ranks[1].is_hung = True
        assert (await bed.http.get("/health")).status_code == 200
        monkeypatch.setattr("baton.engine.server.admin.CALL_TIMEOUT_S", 0.005)
        assert (await bed.http.get("/health")).status_code == 503
        assert (await bed.http.get("/health_generate")).status_code == 503


async def test_caches_are_flushed_on_all_and_who_cannot_is_named(start: Start) -> None:
    async with start(*TWO, "--hicache-storage-backend", "file", "--enable-hierarchical-cache") as bed:
        assert (await bed.http.post("/flush_cache")).status_code == 200
        assert [len(rank.received_of(FlushCache)) for rank in bed.ranks] == [1, 1]
        bed.ranks[1].flush_ok = False
        assert (await bed.http.post("/flush_cache")).status_code == 400
        assert "engine 1" in (await bed.http.post("/clear_hicache_storage_backend")).text


async def test_an_abort_finds_its_sequences_wherever_they_are(start: Start) -> None:
    async with start(*TWO) as bed:
        for rank in bed.ranks:
            rank.credits = 0
        body = {"text": ["a", "b", "c"], "rid": ["r1", "r2", "r3"]}
        request = asyncio.create_task(bed.post("/generate", body))
        await bed.until(lambda: counts(bed) == [2, 1])
        again = await bed.post("/generate", {"text": "a", "rid": "r2"})
        assert (again.status_code, again.json()["error"]["param"]) == (400, "rid")
        await bed.post("/abort_request", {"rid": "r"})
        assert [one["meta_info"]["finish_reason"]["type"] for one in (await request).json()] == ["abort"] * 3
        assert [len(rank.received_of(Abort)) for rank in bed.ranks] == [2, 1]


async def test_a_client_that_goes_away_ends_its_sequences_on_all(start: Start) -> None:
    async with start(*TWO) as bed:
        for rank in bed.ranks:
            rank.credits = 1
        async with bed.http.stream("POST", "/generate", json={"text": ["a", "b"], "stream": True}) as stream:
            assert (await anext(stream.aiter_lines())).startswith("data: ")
        await bed.until(lambda: bed.ctx.engines.num_in_flight == 0)
        await bed.until(lambda: all(rank.received_of(Abort) for rank in bed.ranks))


async def test_one_lost_engine_takes_the_others_with_it(start: Start) -> None:
    async with start(*TWO) as bed:
        ended: list[None] = []
        bed.ctx.engines.on_lost = lambda: ended.append(None)
        bed.ranks[0].credits = 1
        body = {"text": "a", "stream": True, "data_parallel_rank": 0}
        async with bed.http.stream("POST", "/generate", json=body) as stream:
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            bed.ctx.engines.clients[1].fail("its process 7 ended")
            events = sse_events("\n".join([line async for line in lines]))
        error = json.loads(events[-2])["error"]
        assert (error["code"], error["retryable"]) == (503, True)
        assert "engine 1 of this worker is lost: its process 7 ended" in error["message"]
        assert (await bed.http.get("/health")).status_code == 503
        assert ended
