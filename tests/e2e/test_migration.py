"""A prefill and a decode worker die in the middle of a hundred streams: every stream ends as if nothing had happened."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.e2e.clients import stream_chat
from tests.e2e.prompts import TOPICS
from tests.e2e.service import Process, running

NUM_STREAMS = 100
TOKENS_BEFORE_THE_KILL = 600


def chat_body(index: int, model: str) -> dict[str, Any]:
    question = f"Tell me something about {TOPICS[index % len(TOPICS)]}, in style number {index}."
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 24 + index % 17,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }


def test_no_stream_fails_or_changes_when_a_prefill_and_a_decode_worker_are_killed(
    demo_model: Path, aggregated: Process, tmp_path: Path
) -> None:
    bodies = [chat_body(index, str(demo_model)) for index in range(NUM_STREAMS)]
    with ThreadPoolExecutor(16) as pool:
        expected = list(pool.map(lambda body: stream_chat(aggregated.url, body), bodies))
    with running(demo_model, tmp_path) as service:
        for mode in ("prefill", "decode"):
            for index in range(2):
                service.worker(f"{mode}-{index}", mode)
        service.wait_ready()
        router = service.router()
        service.wait_ready()
        lock, num_events, killed = threading.Lock(), 0, threading.Event()

        def on_event(_: dict[str, Any]) -> None:
            nonlocal num_events
            with lock:
                num_events += 1
                if num_events < TOKENS_BEFORE_THE_KILL or killed.is_set():
                    return
                killed.set()
            service.processes["decode-0"].kill()
            service.processes["prefill-0"].kill()

        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            answers = list(pool.map(lambda body: stream_chat(router.url, body, on_event), bodies))
        assert killed.is_set()
        assert "migrat" in router.get("/metrics")[1]
        for body, (text, events), (wanted, wanted_events) in zip(bodies, answers, expected, strict=True):
            assert text == wanted, body
            assert {event["id"] for event in events} == {events[0]["id"]}, "one response has one id"
            for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
                assert events[-1]["usage"][key] == wanted_events[-1]["usage"][key], body
        for name in ("prefill-1", "decode-1"):
            assert service.processes[name].popen.poll() is None, "the survivors survive"
