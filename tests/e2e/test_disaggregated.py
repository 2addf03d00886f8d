"""Prefill and decode on separate workers answer exactly as one worker does."""

import json
import random

from tests.e2e.clients import generate_all
from tests.e2e.prompts import mixed_bodies
from tests.e2e.service import Process, Service, request


def test_greedy_output_equals_the_aggregated_engine_token_for_token(
    aggregated: Process, disaggregated: Service
) -> None:
    bodies = mixed_bodies(200)
    expected = generate_all(aggregated.url, bodies, concurrency=8)
    answers = generate_all(disaggregated.processes["router"].url, bodies, concurrency=24)
    for body, ours, theirs in zip(bodies, answers, expected, strict=True):
        assert ours["output_ids"] == theirs["output_ids"], body
        assert ours["text"] == theirs["text"], body
        assert ours["meta_info"]["finish_reason"] == theirs["meta_info"]["finish_reason"], body
        assert ours["meta_info"]["prompt_tokens"] == theirs["meta_info"]["prompt_tokens"], body


def test_both_prefill_workers_and_both_radix_trees_are_used(disaggregated: Service) -> None:
    url = disaggregated.processes["router"].url
    prompt = {"input_ids": [random.Random(3).randrange(1000, 40000) for _ in range(700)]}
    body = {**prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    first, second = (generate_all(url, [body], 1)[0] for _ in range(2))
    assert first["output_ids"] == second["output_ids"]
    assert first["meta_info"]["cached_tokens"] == 0
    assert second["meta_info"]["cached_tokens"] >= 640


def test_logprobs_and_seeds_cross_the_hand_over(aggregated: Process, disaggregated: Service) -> None:
    body = {
        "text": "The quick brown fox",
        "sampling_params": {"temperature": 0.8, "top_p": 0.9, "seed": 11, "max_new_tokens": 12},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 3,
    }
    alone = generate_all(aggregated.url, [body], 1)[0]
    pair = generate_all(disaggregated.processes["router"].url, [body], 1)[0]
    assert pair["output_ids"] == alone["output_ids"]
    for key in ("input_token_logprobs", "output_token_logprobs", "output_top_logprobs"):
        assert pair["meta_info"][key] == alone["meta_info"][key], key


def test_pages_have_one_owner_after_everything(disaggregated: Service) -> None:
    for name, process in disaggregated.processes.items():
        if name != "router":
            status, text = process.get("/get_server_info")
            assert status == 200
            assert json.loads(text)["page_ownership"] == "ok", (name, text)


def test_a_worker_refuses_a_request_without_a_room(disaggregated: Service) -> None:
    for name in ("prefill-0", "decode-0"):
        status, text = disaggregated.processes[name].post("/generate", {"text": "hi"})
        assert status == 400
        assert "Disaggregated request received without boostrap room id" in text


def test_requests_go_on_while_others_are_aborted(disaggregated: Service) -> None:
    url = disaggregated.processes["router"].url
    long = {
        "text": "Once upon a time",
        "rid": "to-abort",
        "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True},
    }
    import threading

    outcome: list[str] = []
    thread = threading.Thread(target=lambda: outcome.append(request(url, "POST", "/generate", long)[1]))
    thread.start()
    while "to-abort" not in str(outcome) and not outcome:
        status, _ = request(url, "POST", "/abort_request", {"rid": "to-abort"})
        assert status == 200
        thread.join(0.2)
    assert "abort" in outcome[0].lower()
    assert generate_all(url, mixed_bodies(3), 3)
