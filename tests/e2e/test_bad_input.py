"""Whatever a client sends, it gets a 4xx that names the field, and the worker goes on serving."""

import json
from typing import Any

import pytest
from tests.e2e.service import Process, Service, request, running
from tests.fakes.ports import free_port

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("/generate", {"text": "word " * 9000}, 400, "longer than"),
        ("/generate", {"text": "hi", "sampling_params": {"temperature": "warm"}}, 400, "temperature"),
        ("/generate", {"text": "hi", "sampling_params": {"top_p": 7}}, 400, "top_p"),
        ("/generate", {"sampling_params": {}}, 400, "text"),
        ("/generate", {"input_ids": [1, 2, 10**9]}, 400, "input_ids"),
        ("/generate", b'{"text": "\xff\xfe"}', 400, "UTF-8"),
        ("/generate", b'{"text": ', 400, "JSON"),
        ("/generate", b'{"text": "' + b"x" * (33 << 20) + b'"}', 413, "32"),
        (CHAT, {"model": "no-such-model", "messages": MESSAGES}, 404, "no-such-model"),
        (CHAT, {"messages": "hello"}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": -1}, 400, "max_tokens"),
        ("/v1/completions", {"max_tokens": 4}, 400, "prompt"),
        ("/no/such/path", {}, 404, "/no/such/path"),
    ],
    ids=lambda value: str(value)[:24] if not isinstance(value, bytes) else "bytes",
)
def test_a_bad_request_names_what_is_wrong(aggregated: Process, path: str, body: Any, status: int, named: str) -> None:
    if path == CHAT and isinstance(body, dict):
        body = {"model": json.loads(aggregated.get("/v1/models")[1])["data"][0]["id"], **body}
    got, text = aggregated.post(path, body)
    assert got == status, text
    assert named in text
    assert aggregated.post("/generate", {"text": "a b c", "sampling_params": {"max_new_tokens": 2}})[0] == 200


def test_the_router_passes_a_workers_refusal_on(disaggregated: Service) -> None:
    url = disaggregated.processes["router"].url
    status, text = request(url, "POST", "/generate", {"text": "hi", "sampling_params": {"top_p": 7}})
    assert status == 400
    assert "top_p" in text
    status, text = request(url, "POST", "/generate", b"{not json")
    assert status == 400


def test_the_router_says_which_side_is_missing(tmp_path: Any, demo_model: Any) -> None:
    with running(demo_model, tmp_path) as service:
        dead = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
        router = service.router("--prefill", dead[0], "8998", "--decode", dead[1])
        service.wait_ready("/liveness")
        status, text = router.post("/generate", {"text": "hi"})
        assert status == 503
        assert "prefill" in json.loads(text)["error"]["message"]
