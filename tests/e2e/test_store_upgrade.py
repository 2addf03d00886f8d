"""Multi-turn chat through `baton up` of the examples with tiers, upgraded in place between two rounds with a real kubectl: the next
round finds in the store what it would have found without the upgrade."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.cluster_bed import Cluster, cluster, until
from tests.e2e.service import request
from tests.fakes.mooncake_service import MISSING
from tests.fakes.ports import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE_SIZE = 16
NUM_CLIENTS = 3


@dataclass
class Client:
    """One conversation. `history` in tokens is what the service has seen of it."""

    messages: list[dict[str, str]]
    history: int = 0
    texts: list[str] = field(default_factory=list)

    def turn(self, url: str) -> tuple[int, int]:
        """Another question and its answer; (tokens that could come from a cache, tokens that did)."""
        body = {"model": "llm", "messages": self.messages, "max_tokens": 8, "temperature": 0}
        status, text = request(url, "POST", "/v1/chat/completions", body, timeout_s=60)
        assert status == 200, text
        answer = json.loads(text)
        usage = answer["usage"]
        possible = self.history // PAGE_SIZE * PAGE_SIZE
        self.history = usage["prompt_tokens"]
        self.texts.append(answer["choices"][0]["message"]["content"])
        self.messages += [
            {"role": "assistant", "content": self.texts[-1]},
            {"role": "user", "content": "And what is the next one?"},
        ]
        return possible, int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("example", "roles"),
    [
        pytest.param("pd-tiers", ("prefill",), id="file"),
        pytest.param(
            "pd-mooncake", ("mooncake-store", "prefill"), id="mooncake",
            marks=[pytest.mark.skipif(bool(MISSING), reason=MISSING), pytest.mark.slow],
        ),
    ],
)  # fmt: skip
def test_an_upgrade_in_place_costs_no_hit(
    demo_model: Path, tmp_path: Path, example: str, roles: tuple[str, ...]
) -> None:
    """The prefill is upgraded too: its own tiers are empty then, and every hit of the last round is the store's."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    clients = [Client([{"role": "user", "content": opening(number)}]) for number in range(NUM_CLIENTS)]
    with cluster(tmp_path / "home") as one:
        one.baton("up", str(EXAMPLES / f"{example}.yaml"), "--publish", f"{example}={port}")
        one.use_env()
        for client in clients:
            assert client.turn(url)[0] == 0
        assert hit_rate(clients, url) >= 1, "undisturbed"
        upgrade(one, example, roles)
        assert hit_rate(clients, url) >= 1, "after the upgrade"
        found = store_metrics(one, f"{example}-prefill-0")
        assert found["pages_read"] > 0
        if example == "pd-mooncake":
            # what was put in the second before the upgrade may have come from the fallback
            assert found["store_objects_read"] > found["store_fallback_objects_read"], "Mooncake kept its objects"
    assert all(len(client.texts) == 3 for client in clients)


def opening(number: int) -> str:
    """Long enough to be looked up in the store (256 tokens), different from the first word on."""
    return (
        f"Client {number} counts: " + ", ".join(f"{number}{word} apples" for word in range(60)) + ". How many is that?"
    )


def hit_rate(clients: list[Client], url: str) -> float:
    """Of whole pages of earlier prompts; above 1 where pages of answers were found too."""
    turns = [client.turn(url) for client in clients]
    return sum(cached for _, cached in turns) / sum(possible for possible, _ in turns)


def upgrade(one: Cluster, group: str, roles: tuple[str, ...]) -> None:
    """Another image for these roles; returns when their pods run it, each in its place."""
    name = f"rolebasedgroups.v1alpha1.workloads.x-k8s.io/{group}"
    order = [role["name"] for role in one.get(name)["spec"]["roles"]]
    pods = {role: f"{group}-{role}-0" for role in roles}
    before = {role: one.get("pod", pod) for role, pod in pods.items()}
    patch = [
        {"op": "replace", "path": f"/spec/roles/{order.index(role)}/template/spec/containers/0/image", "value": IMAGE}
        for role in roles
    ]
    one.kubectl("patch", name, "--type=json", "-p", json.dumps(patch))
    for role, pod in pods.items():
        until(lambda pod=pod: is_upgraded(one.get("pod", pod)), f"{pod} is upgraded", 90)
        now = one.get("pod", pod)
        for where in (("metadata", "uid"), ("status", "podIP"), ("spec", "nodeName")):
            assert now[where[0]][where[1]] == before[role][where[0]][where[1]], "same pod, address and node"


IMAGE = "lmsysorg/sglang:v0.5.7"


def is_upgraded(pod: dict[str, Any]) -> bool:
    status = pod["status"]["containerStatuses"][0]
    return bool(status["image"] == IMAGE and status["restartCount"] == 1 and status["ready"])


def store_metrics(one: Cluster, pod: str) -> dict[str, float]:
    """Values of sglang:hicache_storage_*, by what the star stands for, since the pod's container started."""
    address = one.get("pod", pod)["status"]["podIP"]
    status, text = request(f"http://{address}:8000", "GET", "/metrics", None, timeout_s=10)
    assert status == 200
    prefix = "sglang:hicache_storage_"
    lines = [line.removeprefix(prefix) for line in text.splitlines() if line.startswith(prefix)]
    return {line.partition("{")[0]: float(line.split()[-1]) for line in lines}
