"""Conversations in random order over pools that are far too small: whatever comes back from whichever tier, answers and
log-probabilities are those of a worker that never evicts, and every page has one owner afterwards."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.chaos import Client, at_rest
from tests.e2e.clients import generate_all
from tests.e2e.service import Process, running
from tests.e2e.test_tiers import TIERS, body, store_flags

pytestmark = [pytest.mark.slow]

NUM_CONVERSATIONS, NUM_TURNS = 10, 10
"""They end with some 10,000 tokens together: the device pool holds 2,048, the host tier 3,072, the store two thirds."""
CONFIGS = {
    "through": ("--hicache-write-policy", "write_through", "--enable-mixed-chunk", "--chunked-prefill-size", "128"),
    "selective": ("--hicache-write-policy", "write_through_selective", "--hicache-eviction-policy", "lfu"),
    "back": ("--hicache-write-policy", "write_back", "--chunked-prefill-size", "256"),
}


def conversations() -> Iterator[list[tuple[list[int], dict[str, Any]]]]:
    """By conversation and turn: the tokens that are new, and what is asked for."""
    for seed in range(NUM_CONVERSATIONS):
        rng = random.Random(seed)
        system = [random.Random(seed % 3).randrange(1000, 40000) for _ in range(150)]
        turns = []
        for turn in range(NUM_TURNS):
            new = [rng.randrange(1000, 40000) for _ in range(rng.randrange(20, 140))]
            fields: dict[str, Any] = {"return_logprob": True} if rng.random() < 0.3 else {}
            if fields and rng.random() < 0.5:
                fields["logprob_start_len"] = rng.randrange(0, 200)
            if seed == 0:
                fields["extra_key"] = "a tenant"
            turns.append((new if turn else system + new, fields))
        yield turns


def order() -> list[tuple[int, int]]:
    """(conversation, turn): turn by turn, so that the others come between two turns of one."""
    rng = random.Random(7)
    return [
        (index, turn) for turn in range(NUM_TURNS) for index in rng.sample(range(NUM_CONVERSATIONS), NUM_CONVERSATIONS)
    ]


@pytest.fixture(scope="module")
def expected(aggregated: Process) -> list[list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Bodies and answers."""

    def one(turns: list[tuple[list[int], dict[str, Any]]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        history: list[int] = []
        done = []
        for index, (new, fields) in enumerate(turns):
            asked = body(history + new, 4 + 7 * (index % 3), **fields)
            answer = generate_all(aggregated.url, [asked], 1)[0]
            history = asked["input_ids"] + answer["output_ids"]
            done.append((asked, answer))
        return done

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, conversations()))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("prefetch", ["best_effort", "wait_complete", "timeout"])
def test_small_pools_change_no_answer(
    demo_model: Path,
    tmp_path: Path,
    expected: list[list[tuple[dict[str, Any], dict[str, Any]]]],
    name: str,
    prefetch: str,
) -> None:
    with running(demo_model, tmp_path) as service:
        flags = [one if one != "wait_complete" else prefetch for one in store_flags(tmp_path / "kv")]
        flags = [one.replace('"2gb"', '"250mb"') for one in flags]
        worker = service.worker("worker", "null", *TIERS, *CONFIGS[name], *flags)
        service.wait_ready()
        lock, hits = threading.Lock(), {"device": 0, "host": 0, "storage": 0}

        def ask(index: int, turn: int) -> None:
            rng = random.Random(f"{name} {prefetch} {index} {turn}")
            asked, answer = expected[index][turn]
            if rng.random() < 0.15:
                client = Client(worker.url, {**asked, "stream": True}).start()
                client.leave()
                client.end()
            if (index, turn) == (NUM_CONVERSATIONS // 2, NUM_TURNS // 2):
                assert worker.post("/clear_hicache_storage_backend", {})[0] == 200
            got = generate_all(worker.url, [asked], 1)[0]
            same(got, answer)
            with lock:
                for tier, tokens in got["meta_info"]["cached_tokens_details"].items():
                    hits[tier] += tokens

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, *zip(*order(), strict=True)))
        at_rest(service)
        assert all(hits.values()), hits


def same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert got["output_ids"] == wanted["output_ids"]
    for key in ("output_token_logprobs", "input_token_logprobs"):
        assert got["meta_info"].get(key) == wanted["meta_info"].get(key), key


def test_prefill_and_decode_with_tiers_change_no_answer(
    demo_model: Path, tmp_path: Path, expected: list[list[tuple[dict[str, Any], dict[str, Any]]]]
) -> None:
    with running(demo_model, tmp_path) as service:
        flags = store_flags(tmp_path / "kv")
        service.worker("prefill-0", "prefill", *TIERS, *flags)
        service.worker("prefill-1", "prefill", *TIERS, *flags)
        offload = ("--max-total-tokens", "2560", "--disaggregation-decode-enable-offload-kvcache")
        service.worker("decode", "decode", *offload, *flags)
        service.wait_ready()
        router = service.router()
        service.wait_ready()

        def ask(index: int, turn: int) -> None:
            asked, answer = expected[index][turn]
            same(generate_all(router.url, [asked], 1)[0], answer)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(ask, *zip(*order(), strict=True)))
        at_rest(service)
