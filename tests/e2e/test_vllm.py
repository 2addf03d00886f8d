"""vLLM's commands as its manifests and guides call them: one server, and one model over two nodes with its helper script."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.e2e.service import request
from tests.fakes.ports import free_port

import baton

STANDINS = Path(baton.__file__).parent / "standins"
SCRIPT = STANDINS / "vllm/examples/online_serving/multi-node-serving.sh"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@contextlib.contextmanager
def started(directory: Path, name: str, command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A shell command as in a pod of a vLLM image, with a /tmp of its own; ended with all it started."""
    own = directory / name
    own.mkdir()
    path = f"{STANDINS / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": f"{STANDINS}:{STANDINS.parents[1]}", "TMPDIR": str(own)}
    with (directory / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            ["sh", "-c", command], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def wait_healthy(url: str, directory: Path, path: str = "/health") -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if request(url, "GET", path)[0] == 200:
                return
        time.sleep(0.1)
    raise AssertionError("\n".join(one.read_text() for one in directory.glob("*.log")))


def answer(url: str, model: str) -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    done = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=16, temperature=0)  # type: ignore[arg-type]
    assert done.id.startswith("chatcmpl-")
    return str(done.choices[0].message.content)


@pytest.mark.timeout(120)
def test_vllm_serve(demo_model: Path, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = (
        f"exec vllm serve {demo_model} --host 127.0.0.1 --port {port} --served-model-name llm alias --max-model-len 2k"
    )
    with started(tmp_path, "server", command) as server:
        wait_healthy(url, tmp_path)
        assert "Paris" in answer(url, "alias")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        assert [(one.id, one.max_model_len) for one in client.models.list().data] == [("llm", 2000), ("alias", 2000)]  # type: ignore[attr-defined]
        server.terminate()
        assert server.wait(20) == 0


@pytest.mark.timeout(180)
def test_a_model_over_two_nodes_as_the_manifest_starts_it(demo_model: Path, tmp_path: Path) -> None:
    port, ray_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    lead = f"bash {SCRIPT} leader --ray_cluster_size=2 --ray_port={ray_port}"
    serve = f"python3 -m vllm.entrypoints.openai.api_server --host 127.0.0.1 --port {port} --model {demo_model} --tensor-parallel-size 2"
    work = f"bash {SCRIPT} worker --ray_address=127.0.0.1 --ray_port={ray_port}"
    lead = f"{lead}; {serve}; echo ended with $?"
    with started(tmp_path, "worker", work) as worker, started(tmp_path, "leader", lead):
        wait_healthy(url, tmp_path)
        assert "Paris" in answer(url, str(demo_model))
        log = tmp_path / "leader.log"
        assert "All ray workers are active and the ray cluster is initialized successfully." in log.read_text()
        assert "2 ranks over 2 nodes, as node 0" in log.read_text()
        os.killpg(worker.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while "ended with 1" not in log.read_text():
            assert time.monotonic() < deadline, f"the server outlives its node\n{log.read_text()}"
            time.sleep(0.1)


@pytest.mark.timeout(120)
def test_prefill_and_decode_servers_behind_a_proxy_of_vllms_protocol_and_behind_our_router(
    demo_model: Path, tmp_path: Path
) -> None:
    """The proxy asks the prefill first and takes its `kv_transfer_params` to the decode, as vLLM's example proxy does."""
    ports = {role: free_port() for role in ("kv_producer", "kv_consumer", "router")}
    side_channel_port = free_port()
    urls = {role: f"http://127.0.0.1:{port}" for role, port in ports.items()}

    def command(role: str) -> str:
        config = json.dumps({"kv_connector": "NixlConnector", "kv_role": role})
        serve = f"vllm serve {demo_model} --served-model-name llm --host 127.0.0.1 --port {ports[role]}"
        return f"VLLM_NIXL_SIDE_CHANNEL_PORT={side_channel_port} exec {serve} --kv-transfer-config '{config}'"

    def ask(role: str, **fields: object) -> dict[str, Any]:
        body = {"model": "llm", "messages": QUESTION, "max_tokens": 24, "temperature": 0, **fields}
        status, answer = request(urls[role], "POST", "/v1/chat/completions", body)
        assert status == 200, answer
        return dict(json.loads(answer))

    with started(tmp_path, "prefill", command("kv_producer")), started(tmp_path, "decode", command("kv_consumer")):
        for role in ("kv_producer", "kv_consumer"):
            wait_healthy(urls[role], tmp_path)
        wanted = {"do_remote_decode": True, "do_remote_prefill": False}
        params = ask("kv_producer", max_tokens=1, kv_transfer_params=wanted)["kv_transfer_params"]
        handed = ask("kv_consumer", kv_transfer_params=params)["choices"][0]["message"]["content"]
        metrics = request(urls["kv_producer"], "GET", "/metrics")[1]
        assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="llm"} 1.0' in str(metrics)
        assert "Paris" in handed
        assert handed == ask("kv_consumer")["choices"][0]["message"]["content"], "the same as without a prefill server"
        launch = f"exec python3 -m sglang_router.launch_router --host 127.0.0.1 --port {ports['router']}"
        given = {
            "vllm": f"--prefill {urls['kv_producer']} --decode {urls['kv_consumer']}",  # found out by the router
            "sglang": f"--prefill {urls['kv_producer']} {side_channel_port} --decode {urls['kv_consumer']}",
        }
        for protocol, workers in given.items():
            with started(tmp_path, protocol, f"{launch} {workers}"):
                wait_healthy(urls["router"], tmp_path, "/readiness")
                routed = ask("router", n=2, logprobs=True)
                assert routed["id"].startswith("chatcmpl-")
                alone = ask("kv_consumer", n=2, logprobs=True)
                assert routed["choices"] == alone["choices"], f"by {protocol}'s protocol as by one worker"
                assert routed["usage"] == alone["usage"]
                client = openai.OpenAI(base_url=f"{urls['router']}/v1", api_key="none", max_retries=0)
                chunks = client.chat.completions.create(
                    model="llm", messages=QUESTION, max_tokens=24, temperature=0, stream=True
                )  # type: ignore[call-overload]
                assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == handed
                counted = f'baton_router_handovers_total{{protocol="{protocol}",outcome="paired"}} 2'
                assert counted in request(urls["router"], "GET", "/metrics")[1]


@pytest.mark.timeout(120)
def test_kv_both_servers_hand_over_to_each_other_behind_a_proxy_of_vllms_protocol_and_behind_our_router(
    demo_model: Path, tmp_path: Path
) -> None:
    """The proxy asks a server to prefill and takes its `kv_transfer_params` to another, as vLLM's example proxy does."""
    ports = {name: free_port() for name in ("a", "b", "router")}
    urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}

    def command(name: str) -> str:
        config = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both"})
        serve = f"vllm serve {demo_model} --served-model-name llm --host 127.0.0.1 --port {ports[name]}"
        return f"VLLM_NIXL_SIDE_CHANNEL_PORT={free_port()} exec {serve} --kv-transfer-config '{config}'"

    def ask(name: str, country: str, **fields: object) -> dict[str, Any]:
        messages = [{"role": "user", "content": f"What is the capital of {country}?"}]
        body = {"model": "llm", "messages": messages, "max_tokens": 24, "temperature": 0, **fields}
        status, answer = request(urls[name], "POST", "/v1/chat/completions", body)
        assert status == 200, answer
        return dict(json.loads(answer))

    def text(document: dict[str, Any]) -> str:
        return str(document["choices"][0]["message"]["content"])

    def prefilled(name: str, country: str) -> dict[str, Any]:
        wanted = {"do_remote_decode": True, "do_remote_prefill": False}
        return dict(ask(name, country, max_tokens=1, kv_transfer_params=wanted)["kv_transfer_params"])

    def handed_over(prefill: str, decode: str, country: str) -> str:
        return text(ask(decode, country, kv_transfer_params=prefilled(prefill, country)))

    def info(name: str) -> dict[str, Any]:
        return dict(json.loads(request(urls[name], "GET", "/get_server_info")[1]))

    with started(tmp_path, "a", command("a")) as a, started(tmp_path, "b", command("b")):
        wait_healthy(urls["a"], tmp_path)
        wait_healthy(urls["b"], tmp_path)
        pairs = (("a", "b", "France"), ("b", "a", "Italy"), ("a", "a", "Spain"), ("b", "a", "Japan"))
        with ThreadPoolExecutor(len(pairs)) as pool:  # all at once
            answers = dict(zip(pairs, pool.map(lambda pair: handed_over(*pair), pairs), strict=True))
        assert "Paris" in answers[pairs[0]]
        for (_, decode, country), answer in answers.items():
            assert answer == text(ask("b" if decode == "a" else "a", country)), "the same as without a hand-over"
        routing = f"exec vllm-router --vllm-pd-disaggregation --host 127.0.0.1 --port {ports['router']}"
        routing += f" --prefill {urls['a']} {urls['b']} --decode {urls['a']} {urls['b']}"
        with started(tmp_path, "router", routing):
            wait_healthy(urls["router"], tmp_path, "/readiness")
            routed = ask("router", "France")
            assert routed["id"].startswith("chatcmpl-")
            assert text(routed) == answers[pairs[0]]
        for name in ("a", "b"):
            state = info(name)["internal_states"][0]
            assert state["kv_transfer_bootstrap_ms"] > 0, "KV came from the other one"
            assert state["num_transfer_failed_total"] == 0
            assert info(name)["page_ownership"] == "ok"
        promised = prefilled("a", "Egypt")
        a.terminate()
        a_log = tmp_path / "a.log"
        deadline = time.monotonic() + 20
        while "promised to decode servers" not in a_log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "Cairo" in text(ask("b", "Egypt", kv_transfer_params=promised)), "it keeps its word before it ends"
        assert a.wait(20) == 0
