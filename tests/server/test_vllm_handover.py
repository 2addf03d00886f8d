"""vLLM's hand-over: what a prefill server answers a proxy, and what a decode server makes of it."""

import asyncio
from typing import Any

import pytest
from tests.server.conftest import MODEL, Start
from tests.server.test_vllm import vllm

from baton.engine.flags import FlagError
from baton.engine.vllm.args import engine_flags, kv_mode, vllm_args
from baton.protocol.hops import STAGE_HEADER
from baton.protocol.rank import FAKE_BOOTSTRAP_HOST, Bootstrap, Submit, part_of

USER = [{"role": "user", "content": "Say hello."}]
ASK_PREFILL = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
    "remote_host": None, "remote_port": None,
}  # fmt: skip
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"model": MODEL, "messages": USER}),
    ("/v1/completions", {"model": MODEL, "prompt": "Say hello."}),
]


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_a_prefill_server_answers_before_it_computes_and_goes_on(
    start: Start, path: str, body: dict[str, Any]
) -> None:
    flags = ("--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", "5600")
    async with vllm(start, *flags, own_host="10.0.0.1") as bed:
        bed.rank.credits = 0  # nothing is computed, as before the decode server has come
        asked = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": ASK_PREFILL}
        answer = (await bed.post(path, asked)).json()
        await bed.until(lambda: bool(bed.rank.received_of(Submit)))
        [submit] = bed.rank.received_of(Submit)
        assert submit.bootstrap == Bootstrap(
            "10.0.0.1", 5600, answer["kv_transfer_params"]["remote_block_ids"][0], "prefill"
        )
        assert answer["kv_transfer_params"] | {"remote_block_ids": []} == {
            "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "baton:10.0.0.1:5600",
            "remote_block_ids": [], "remote_host": "10.0.0.1", "remote_port": 5600, "tp_size": 1,
        }  # fmt: skip
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 0
        assert bed.ctx.engines.num_in_flight == 1, "the answer did not end the sequence"
        bed.rank.give(1)
        await bed.until(lambda: not bed.ctx.background)
        assert bed.ctx.engines.num_in_flight == 0


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_a_decode_server_meets_the_prefill_that_the_params_name(
    start: Start, path: str, body: dict[str, Any]
) -> None:
    async with vllm(start, "--disaggregation-mode", "decode") as bed:
        params = {
            "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "baton:10.0.0.1:5600",
            "remote_block_ids": [77], "remote_host": "10.0.0.1", "remote_port": "5600", "tp_size": 1,
        }  # fmt: skip
        answer = (await bed.post(path, {**body, "kv_transfer_params": params})).json()
        assert answer["kv_transfer_params"] is None
        await bed.post(path, body)
        first, second = bed.rank.received_of(Submit)
        assert first.bootstrap == Bootstrap("10.0.0.1", 5600, 77, "decode")
        assert second.bootstrap is not None
        assert second.bootstrap.host == FAKE_BOOTSTRAP_HOST, "without params it serves the whole request"


async def test_a_kv_both_server_does_what_each_request_says(start: Start) -> None:
    path, body = ROUTES[0]
    flags = ("--disaggregation-mode", "both", "--disaggregation-bootstrap-port", "5600", "--enable-metrics")
    async with vllm(start, *flags, own_host="10.0.0.1") as bed:
        bed.rank.credits = 0
        asked = {**body, "max_tokens": 1, "kv_transfer_params": ASK_PREFILL, "request_id": "one"}
        params = (await bed.post(path, asked)).json()["kv_transfer_params"]
        bed.rank.give(100)
        decoded = (await bed.post(path, {**body, "kv_transfer_params": params, "request_id": "one"})).json()
        plain = (await bed.post(path, {**body, "max_tokens": 3})).json()
        native = await bed.post("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 3}})
        assert [decoded["kv_transfer_params"], plain["kv_transfer_params"], native.status_code] == [None, None, 200]
        room = params["remote_block_ids"][0]
        submits = bed.rank.received_of(Submit)
        assert [part_of("both", one.bootstrap) for one in submits] == ["prefill", "decode", "null", "null"]
        assert [one.bootstrap for one in submits[:2]] == [
            Bootstrap("10.0.0.1", 5600, room, "prefill"), Bootstrap("10.0.0.1", 5600, room, "decode"),
        ]  # fmt: skip
        assert "vllm:num_requests_running" in (await bed.http.get("/metrics")).text


async def test_a_kv_both_server_refuses_sglangs_fields_which_do_not_say_the_half(start: Start) -> None:
    async with vllm(start, "--disaggregation-mode", "both") as bed:
        fields = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 5600, "bootstrap_room": 7}
        for path, body in (*ROUTES, ("/generate", {"text": "a"})):
            answer = await bed.post(path, {**body, **fields})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "bootstrap_room")


async def test_errors_of_a_kv_both_server_name_the_half_that_it_was(start: Start) -> None:
    path, body = ROUTES[0]
    async with vllm(start, "--disaggregation-mode", "both") as bed:
        bed.rank.credits = 0
        params = {
            "do_remote_prefill": True,
            "remote_engine_id": "baton:a:1",
            "remote_host": "a",
            "remote_port": 1,
            "remote_block_ids": [1],
        }
        answers = [asyncio.create_task(bed.post(path, {**body, "kv_transfer_params": one})) for one in (params, None)]
        await bed.until(lambda: bed.ctx.engines.num_in_flight == 2)
        bed.ctx.engines.end_all("told to stop")
        assert [(await one).headers[STAGE_HEADER] for one in answers] == ["decode", "server"]


@pytest.mark.parametrize(
    ("mode", "params", "problem"),
    [
        ("prefill", None, "do_remote_decode must be true"),
        ("decode", {"do_remote_decode": True}, "this server is no kv_producer"),
        ("null", {"do_remote_decode": True}, "this server is no kv_producer"),
        ("null", {"do_remote_prefill": True}, "kv_role kv_consumer"),
        ("decode", {"do_remote_prefill": True, "remote_engine_id": "f00"}, "no Baton prefill server"),
        ("decode", {"do_remote_prefill": True, "remote_engine_id": "baton:a:1"}, "remote_host and one of remote_block_ids"),
        ("both", {"do_remote_prefill": True, "do_remote_decode": True}, "one half of a request, not both"),
        ("decode", {"do_remote_prefill": 1}, "kv_transfer_params: Expected `bool`"),
        ("decode", {"do_remote_prefill": True, "remote_engine_id": "baton:a:1", "remote_host": "a", "remote_block_ids": [1],
                    "remote_port": "x"}, "remote_port must be a port number"),
    ],
)  # fmt: skip
async def test_what_cannot_be_handed_over_is_refused(
    start: Start, mode: str, params: dict[str, Any] | None, problem: str
) -> None:
    async with vllm(start, "--disaggregation-mode", mode) as bed:
        answer = await bed.post("/v1/completions", {"prompt": "a", "kv_transfer_params": params})
        assert answer.status_code == 400
        assert problem in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "kv_transfer_params"


@pytest.mark.parametrize(("role", "mode"), [("kv_producer", "prefill"), ("kv_consumer", "decode"), ("kv_both", "both")])
def test_roles_of_the_transfer_config(role: str, mode: str) -> None:
    args = vllm_args(["--model", "m", "--kv-transfer-config", f'{{"kv_connector":"NixlConnector","kv_role":"{role}"}}'])
    assert kv_mode(args) == mode
    assert f"--disaggregation-mode={mode}" in engine_flags(args, side_channel_port=7000)
    assert ("--disaggregation-bootstrap-port=7000" in engine_flags(args, side_channel_port=7000)) == (mode != "decode")


@pytest.mark.parametrize(
    ("config", "problem"),
    [("{}", "kv_role must be one of kv_producer, kv_consumer, kv_both, got None"), ("[]", "must be a JSON object"),
     ("{", "must be a JSON object"), ('{"kv_role":["kv_both"]}', "kv_role must be one of")],
)  # fmt: skip
def test_a_transfer_config_that_cannot_be_is_refused_by_name(config: str, problem: str) -> None:
    with pytest.raises(FlagError) as caught:
        vllm_args(["--model", "m", "--kv-transfer-config", config])
    [line] = caught.value.problems
    assert line.startswith("--kv-transfer-config: ")
    assert problem in line
