"""Two engines behind one port: the answers of one engine, work for both, hand-over from both, and one end for both."""

import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.e2e.service import Process, running

from baton.engine.distributed.topology import RANKS_PER_HOST

PROMPTS = [
    f"{number} friends went to the market to buy fruit, bread and cheese for the week, and came home with"
    for number in ("Two", "Three", "Four", "Five", "Six", "Seven")
]


def answers(process: Process) -> list[Any]:
    """Greedy, in one batch."""
    body = {"text": PROMPTS, "sampling_params": {"max_new_tokens": 12, "temperature": 0}}
    status, text = process.post("/generate", body)
    assert status == 200, text
    return [one["output_ids"] for one in json.loads(text)]


def cached_pages(process: Process) -> list[int]:
    """Of each engine."""
    info = json.loads(process.get("/get_server_info")[1])
    assert info["page_ownership"] == "ok"
    return [one["evictable_pages"] for one in info["internal_states"]]


def test_two_engines_answer_as_one_and_share_the_work(aggregated: Process, demo_model: Path, tmp_path: Path) -> None:
    with running(demo_model, tmp_path) as service:
        service.environment = {RANKS_PER_HOST: "2"}
        flags = ("--dp-size", "2", "--max-total-tokens", "4096")
        two = service.worker("two", "null", *flags)
        prefill = service.worker("prefill", "prefill", *flags)
        service.worker("decode", "decode", *flags)
        router = service.router()
        service.wait_ready()
        expected = answers(aggregated)
        assert answers(two) == expected
        assert answers(router) == expected
        assert min(cached_pages(two)) > 0, "an engine got nothing"
        for _ in range(20):
            if min(cached_pages(prefill)) > 0:  # rooms are drawn
                break
            assert answers(router) == expected
        assert min(cached_pages(prefill)) > 0, "an engine got nothing"
        os.kill(two.rank_pids()[1], signal.SIGKILL)
        assert two.popen.wait(15) == 1
        assert "engine 1 of this worker is lost" in two.log.read_text()
