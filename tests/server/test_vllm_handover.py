"""vLLM's hand-over: what a prefill server answers a proxy, and what a decode server makes of it."""

from typing import Any

import pytest
from tests.server.conftest import MODEL, Start
from tests.server.test_vllm import vllm

from baton.engine.flags import FlagError
from baton.engine.vllm.args import engine_flags, kv_mode, vllm_args
from baton.protocol.rank import FAKE_BOOTSTRAP_HOST, Bootstrap, Submit

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
        assert submit.bootstrap == Bootstrap("10.0.0.1", 5600, answer["kv_transfer_params"]["remote_block_ids"][0])
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
        assert first.bootstrap == Bootstrap("10.0.0.1", 5600, 77)
        assert second.bootstrap is not None
        assert second.bootstrap.host == FAKE_BOOTSTRAP_HOST, "without params it serves the whole request"


@pytest.mark.parametrize(
    ("mode", "params", "problem"),
    [
        ("prefill", None, "do_remote_decode must be true"),
        ("decode", {"do_remote_decode": True}, "this server is no kv_producer"),
        ("null", {"do_remote_decode": True}, "this server is no kv_producer"),
        ("null", {"do_remote_prefill": True}, "kv_role kv_consumer"),
        ("decode", {"do_remote_prefill": True, "remote_engine_id": "f00"}, "no Baton prefill server"),
        ("decode", {"do_remote_prefill": True, "remote_engine_id": "baton:a:1"}, "remote_host and one of remote_block_ids"),
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


@pytest.mark.parametrize(("role", "mode"), [("kv_producer", "prefill"), ("kv_consumer", "decode")])
def test_roles_of_the_transfer_config(role: str, mode: str) -> None:
    args = vllm_args(["--model", "m", "--kv-transfer-config", f'{{"kv_connector":"NixlConnector","kv_role":"{role}"}}'])
    assert kv_mode(args) == mode
    assert f"--disaggregation-mode={mode}" in engine_flags(args, side_channel_port=7000)
    assert ("--disaggregation-bootstrap-port=7000" in engine_flags(args, side_channel_port=7000)) == (mode == "prefill")


@pytest.mark.parametrize(
    ("config", "problem"),
    [("{}", "kv_role must be kv_producer or kv_consumer, got None"), ("[]", "must be a JSON object"),
     ("{", "must be a JSON object"), ('{"kv_role":"kv_both"}', "say kv_producer on the prefill servers")],
)  # fmt: skip
def test_a_transfer_config_that_cannot_be_is_refused_by_name(config: str, problem: str) -> None:
    with pytest.raises(FlagError) as caught:
        vllm_args(["--model", "m", "--kv-transfer-config", config])
    [line] = caught.value.problems
    assert line.startswith("--kv-transfer-config: ")
    assert problem in line
