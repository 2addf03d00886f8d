"""Prefixes come back from host memory and from the store, also after the worker that computed them is gone, and never change an
answer."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.chaos import at_rest
from tests.e2e.clients import generate_all
from tests.e2e.service import Process, Service, running

PROMPTS = [[random.Random(seed).randrange(1000, 40000) for _ in range(600)] for seed in range(8)]
"""4,800 tokens: the device pool of these tests holds 2,048, the host tier 3,072, the store all."""
TIERS = ("--max-total-tokens", "2048", "--enable-hierarchical-cache", "--hicache-ratio", "1.5")


def store_flags(directory: Path) -> tuple[str, ...]:
    settings = {"path": str(directory), "capacity": "2gb", "prefetch_threshold": 16}
    return (
        "--hicache-storage-backend", "file", "--hicache-storage-backend-extra-config", json.dumps(settings),
        "--hicache-storage-prefetch-policy", "wait_complete",
    )  # fmt: skip


def body(input_ids: list[int], max_new_tokens: int = 6, **fields: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    return {"input_ids": input_ids, "sampling_params": sampling, **fields}


def details(answer: dict[str, Any]) -> dict[str, int]:
    meta = answer["meta_info"]
    found: dict[str, int] = meta["cached_tokens_details"]
    assert sum(found.values()) == meta["cached_tokens"]
    return found


@pytest.fixture(scope="module")
def expected(aggregated: Process) -> list[list[int]]:
    return [one["output_ids"] for one in generate_all(aggregated.url, map(body, PROMPTS), 4)]


@pytest.fixture
def service(demo_model: Path, tmp_path: Path) -> Iterator[Service]:
    with running(demo_model, tmp_path) as one:
        yield one


def test_what_the_device_evicted_comes_back_from_host_memory(service: Service, expected: list[list[int]]) -> None:
    worker = service.worker("worker", "null", *TIERS)
    service.wait_ready()
    some = PROMPTS[:5]  # 3,000 tokens: more than the device holds, no more than the host
    for _ in range(2):
        answers = [generate_all(worker.url, [body(one)], 1)[0] for one in some]
        assert [one["output_ids"] for one in answers] == expected[:5]
    assert all(details(one) == {"device": 0, "host": 592, "storage": 0} for one in answers[:3])
    at_rest(service)


def test_a_killed_worker_finds_its_pages_in_the_store(
    service: Service, expected: list[list[int]], tmp_path: Path
) -> None:
    service.worker("worker", "null", *TIERS, *store_flags(tmp_path / "kv"))
    service.wait_ready()
    worker = service.processes["worker"]
    answers = generate_all(worker.url, map(body, PROMPTS), 2)
    assert [one["output_ids"] for one in answers] == expected
    worker.kill()
    worker = service.restart("worker")
    service.wait_ready()
    answers = generate_all(worker.url, map(body, PROMPTS), 2)
    assert [one["output_ids"] for one in answers] == expected
    # The kill may have cost the last writes; the first prompts were written long before.
    assert [details(one)["storage"] for one in answers[:4]] == [592] * 4
    worker.stop()  # this time it may finish its writes
    worker = service.restart("worker")
    service.wait_ready()
    answers = generate_all(worker.url, map(body, PROMPTS), 2)
    assert [details(one)["storage"] for one in answers] == [592] * len(PROMPTS)
    salted = generate_all(worker.url, [body(PROMPTS[0], extra_key="another tenant")], 1)[0]
    assert salted["meta_info"]["cached_tokens"] == 0
    assert salted["output_ids"] == expected[0]
    at_rest(service)


def test_the_store_can_be_emptied(service: Service, tmp_path: Path) -> None:
    worker = service.worker("worker", "null", *TIERS, *store_flags(tmp_path / "kv"))
    service.wait_ready()
    generate_all(worker.url, [body(PROMPTS[0])], 1)
    assert worker.post("/clear_hicache_storage_backend", {})[0] == 200
    assert worker.post("/flush_cache", {})[0] == 200
    answer = generate_all(worker.url, [body(PROMPTS[0])], 1)[0]
    assert answer["meta_info"]["cached_tokens"] == 0


def test_the_next_turn_finds_what_decode_generated(service: Service, aggregated: Process, tmp_path: Path) -> None:
    flags = store_flags(tmp_path / "kv")
    service.worker("prefill", "prefill", "--enable-hierarchical-cache", *flags)
    service.worker("decode", "decode", "--disaggregation-decode-enable-offload-kvcache", *flags)
    service.wait_ready()
    router = service.router()
    service.wait_ready()
    first = generate_all(router.url, [body(PROMPTS[0], 100)], 1)[0]
    turn = PROMPTS[0] + first["output_ids"] + PROMPTS[1][:40]
    service.processes["decode"].stop()  # the end of its writes
    service.restart("decode")
    service.wait_ready()
    second = generate_all(router.url, [body(turn)], 1)[0]
    assert second["output_ids"] == generate_all(aggregated.url, [body(turn)], 1)[0]["output_ids"]
    # Pages of 16: the prefill had 37 of the prompt; the 6 behind them were completed by decode.
    assert details(second) == {"device": 592, "host": 0, "storage": 96}
    at_rest(service)
