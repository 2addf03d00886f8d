"""Clients for end-to-end tests: many requests at once over plain sockets, streams read to their end."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

from tests.e2e.service import request


def generate_all(url: str, bodies: Iterable[dict[str, Any]], concurrency: int) -> list[dict[str, Any]]:
    """Answers of `/generate` in order; every status must be 200."""

    def one(body: dict[str, Any]) -> dict[str, Any]:
        status, text = request(url, "POST", "/generate", body, timeout_s=300)
        assert status == 200, f"{status} {text[:500]}"
        return dict(json.loads(text))

    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(one, bodies))


def stream_chat(url: str, body: dict[str, Any], on_event: Any = None) -> tuple[str, list[dict[str, Any]]]:
    """Text and events of one chat stream; fails on an error event or a stream that does not end with [DONE]."""
    host, port = url.removeprefix("http://").split(":")
    connection = HTTPConnection(host, int(port), timeout=300)
    payload = json.dumps({**body, "stream": True})
    connection.request("POST", "/v1/chat/completions", payload, {"content-type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, f"{response.status} {response.read()[:500]!r}"
    events: list[dict[str, Any]] = []
    is_done = False
    for line in response:
        if line.startswith(b"data: [DONE]"):
            is_done = True
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            assert "error" not in event, event
            events.append(event)
            if on_event is not None:
                on_event(event)
        else:
            assert line.strip() == b"", f"unexpected line for a client: {line!r}"
    connection.close()
    assert is_done, "the stream ended without [DONE]"
    text = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
    return text, events
