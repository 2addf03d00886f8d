"""One model on two ranks, started as manifests start them: the answers are those of one rank, and a lost rank is no hang."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.clients import generate_all
from tests.e2e.prompts import mixed_bodies
from tests.e2e.service import Process, Service, request, running
from tests.fakes.ports import free_port

import baton.standins
from baton.protocol.errors import WORKER_LOST

STANDINS = Path(next(iter(baton.standins.__path__)))
CHAT = {
    "messages": [{"role": "user", "content": "What is a relay race?"}],
    "temperature": 0,
    "max_tokens": 40,
    "logprobs": True,
}


def launch(service: Service, name: str, command: str, port: int | None) -> Process:
    """`python3 -m sglang.launch_server`, as one pod of a group runs it."""
    log = service.log_dir / f"{name}.log"
    listen = [] if port is None else ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("ab") as sink:
        popen = subprocess.Popen(
            [sys.executable, "-m", "sglang.launch_server", "--model-path", str(service.model), *command.split(), *listen],
            stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True,
            env={**os.environ, **service.environment, "PYTHONPATH": f"{STANDINS}:{STANDINS.parents[1]}"},
        )  # fmt: skip
    process = Process(name, f"http://127.0.0.1:{port}", popen, log)
    service.processes[name] = process
    return process


@pytest.fixture
def group(demo_model: Path, tmp_path: Path) -> Iterator[Service]:
    """Two nodes with a rank each; the second serves /health alone."""
    with running(demo_model, tmp_path) as service:
        common = f"--tp 2 --nnodes 2 --dist-init-addr 127.0.0.1:{free_port()}"
        launch(service, "node-1", f"{common} --node-rank 1", free_port())
        launch(service, "node-0", f"{common} --node-rank 0 --trust-remote-code --enable-metrics", free_port())
        service.wait_ready()
        yield service


def test_two_nodes_answer_as_one_and_end_as_one(group: Service, aggregated: Process) -> None:
    leader, follower, model = group.processes["node-0"], group.processes["node-1"], str(group.model)
    ours, theirs = (
        json.loads(one.post("/v1/chat/completions", CHAT | {"model": model})[1]) for one in (leader, aggregated)
    )
    assert ours["choices"][0]["message"] == theirs["choices"][0]["message"]
    assert ours["choices"][0]["logprobs"] == theirs["choices"][0]["logprobs"]
    bodies = mixed_bodies(24, seed=5)
    expected = generate_all(aggregated.url, bodies, concurrency=8)
    for body, answer, wanted in zip(bodies, generate_all(leader.url, bodies, 8), expected, strict=True):
        assert answer["output_ids"] == wanted["output_ids"], body
    assert follower.get("/v1/models")[0] == 404, "only the first node serves the API"
    lose_a_rank(leader, follower)


def lose_a_rank(leader: Process, follower: Process) -> None:
    """Under a request: it ends with an error that says a retry may help, and both nodes end with a failure."""
    host, port = leader.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    body = {"text": "Once", "stream": True, "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}}
    connection.request("POST", "/generate", json.dumps(body), {"content-type": "application/json"})
    with contextlib.closing(connection), connection.getresponse() as response:
        assert response.readline().startswith(b"data: ")
        os.killpg(follower.popen.pid, signal.SIGKILL)
        rest = response.read().decode()
    error = json.loads(rest.strip().split("data: ")[-2 if rest.strip().endswith("[DONE]") else -1])["error"]
    assert (error["type"], error["retryable"]) == (WORKER_LOST, True)
    assert "rank 1 (node 1)" in error["message"]
    assert leader.popen.wait(15) == 1
    assert "rank 1 (node 1) is gone" in leader.tail()


def test_a_leader_that_is_told_to_stop_ends_both_nodes_without_failure(group: Service) -> None:
    leader, follower = group.processes["node-0"], group.processes["node-1"]
    leader.popen.terminate()
    assert (leader.popen.wait(15), follower.popen.wait(15)) == (0, 0)
    log = follower.log.read_text()
    assert "rank 0 was told to stop" in log
    for text, names in ((leader.log.read_text(), ("worker", "rank0")), (log, ("node1", "rank1"))):
        assert all(f" {name} baton." in text for name in names) and "__main__" not in text


def test_prefill_ranks_with_a_pool_each_and_decode_stages_that_share_one(
    demo_model: Path, tmp_path: Path, aggregated: Process
) -> None:
    """Two slices of uneven size come together in whole pages."""
    with running(demo_model, tmp_path) as service:
        service.environment |= {"BATON_RANKS_PER_HOST": "2", "BATON_COLLECTIVE": "tcp"}
        prefill = service.worker("prefill-0", "prefill", "--tp", "2")
        del service.environment["BATON_COLLECTIVE"]
        service.worker("decode-0", "decode", "--pp", "2")
        service.wait_ready()
        service.router()
        service.wait_ready()
        bodies = mixed_bodies(24, seed=6)
        expected = generate_all(aggregated.url, bodies, concurrency=8)
        answers = generate_all(service.processes["router"].url, bodies, concurrency=8)
        for body, ours, theirs in zip(bodies, answers, expected, strict=True):
            assert ours["output_ids"] == theirs["output_ids"], body
        assert "ranks=2 stages=1" in prefill.log.read_text()
        assert "ranks=2 stages=2" in service.processes["decode-0"].log.read_text()
        port = json.loads(prefill.get("/get_server_info")[1])["disaggregation_bootstrap_port"]
        query = "/route?engine_rank=-1&target_dp_group=-1&target_pp_rank=-1"
        sizes = {"prefill_attn_tp_size": 2, "prefill_dp_size": 1, "prefill_pp_size": 1}
        assert json.loads(request(f"http://127.0.0.1:{port}", "GET", query)[1]) == sizes
