"""One model over a leader and a worker pod, under the real kubectl: our examples, other people's manifests as they stand, and a worker
that is killed while clients wait."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.clients import generate_all
from tests.e2e.cluster_bed import Cluster, cluster, kill, pids_with, until
from tests.e2e.service import Process, request
from tests.e2e.test_cluster_manifests import SHARED, forwarded, needs_shared
from tests.fakes.ports import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
CHAT = {
    "messages": [{"role": "user", "content": "test"}], "max_tokens": 30, "temperature": 0.7, "top_p": 0.9, "seed": 10,
}  # fmt: skip
KEYS = {
    "sglang": ["id", "object", "created", "model", "choices", "usage"],
    "vllm": ["id", "object", "created", "model", "choices", "usage", "prompt_logprobs", "kv_transfer_params"],
}
"""Of a chat answer, in order: each project's own."""


@pytest.fixture(scope="module")
def running(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("nodes") / "home") as one:
        one.baton("up")
        one.use_env()
        yield one


def chat(one: Cluster, model: str, service: str) -> dict[str, Any]:
    local = free_port()
    with forwarded(one, service, f"{local}:8000"):
        url = f"http://127.0.0.1:{local}"
        status, text = request(url, "POST", "/v1/chat/completions", {"model": model, **CHAT}, timeout_s=90)
    assert status == 200, text
    return dict(json.loads(text))


@needs_shared
def test_manifests_for_two_gpu_nodes_serve_as_they_stand(demo_model: Path, tmp_path: Path) -> None:
    """A cluster each, side by side: both manifests call their Service the same, and wait half a minute before they probe."""
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(serve_as_it_stands, name, tmp_path / name) for name in KEYS]:
            done.result()


def serve_as_it_stands(name: str, home: Path) -> None:
    with cluster(home) as one:
        one.baton("up")
        one.use_env()
        one.kubectl("create", "-f", str(SHARED / "llm-model.yaml"))
        one.kubectl("create", "-f", str(SHARED / f"{name}_multi.yaml"))
        wanted = "--for=jsonpath={.status.readyReplicas}=1"
        one.kubectl("wait", wanted, f"lws/{name}-multi-nodes", "--timeout=180s")
        answer = chat(one, "/models/Qwen3-32B", "svc/multi-nodes-service")
    assert list(answer) == KEYS[name]
    assert answer["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize("name", ["sglang", "vllm"])
def test_a_killed_worker_brings_the_group_back(running: Cluster, aggregated: Process, name: str) -> None:
    running.baton("up", str(EXAMPLES / f"multi-node-{name}.yaml"), "--timeout", "180")
    address = running.get("service", f"{name}-front")["spec"]["clusterIP"]
    url = f"http://{address}:8000"
    body = {"model": "llm", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}
    alone = {"text": body["prompt"], "sampling_params": {"temperature": 0, "max_new_tokens": 24}}
    expected = generate_all(aggregated.url, [alone], 1)[0]["text"]

    def answer() -> str | None:
        status, text = request(url, "POST", "/v1/completions", body)
        return str(json.loads(text)["choices"][0]["text"]) if status == 200 else None

    assert answer() == expected, "two ranks give what one does"
    worker = running.get("pod", f"{name}-0-1")["metadata"]["uid"]
    leader = running.get("pod", f"{name}-0")["metadata"]["uid"]
    events = stream(url, {**body, "max_tokens": 2000, "ignore_eos": True})
    next(events)
    for pid in pids_with(f"BATON_CONTAINER={worker}/"):
        kill(pid)
    last = [*events][-1:]
    assert last == ["[DONE]"] or not last or "error" in last[0], "a stream ends, it does not hang"

    def recreated() -> bool:
        found = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in running.get("pods")["items"]}
        return {found.get(f"{name}-0"), found.get(f"{name}-0-1")}.isdisjoint({leader, worker, None})

    until(recreated, "both pods are new", 60)
    running.kubectl("wait", "--for=jsonpath={.status.readyReplicas}=1", f"lws/{name}", "--timeout=180s")
    assert until(lambda: answer_or_none(answer), "the service answers again") == expected
    reason = running.kubectl("get", "events", "--field-selector", f"involvedObject.name={name}")
    assert "RecreateGroup" in reason
    running.kubectl("delete", "-f", str(EXAMPLES / f"multi-node-{name}.yaml"))


def answer_or_none(answer: Any) -> str | None:
    try:
        return answer()  # type: ignore[no-any-return]
    except OSError:
        return None


def stream(url: str, body: dict[str, Any]) -> Iterator[str]:
    """Data of a stream's events, as they come; a connection that closes ends it."""
    host, port = url.removeprefix("http://").split(":")
    connection = HTTPConnection(host, int(port), timeout=60)
    connection.request(
        "POST", "/v1/completions", json.dumps({**body, "stream": True}), {"content-type": "application/json"}
    )
    try:
        for line in connection.getresponse():
            if line.startswith(b"data: "):
                yield line[6:].decode().strip()
    except (OSError, HTTPException):
        return
    finally:
        connection.close()
