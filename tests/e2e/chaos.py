"""What chaos tests share: states of the hand-over to wait for, clients that note how their request ended, and rest.

A service here is one prefill and one decode worker with short time-outs and small prefill steps, so that each state lasts
long enough to be seen in `/get_server_info`. Nothing sleeps to synchronise: `until` looks at a condition until a deadline.
"""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.e2e.service import Process, Service

T = TypeVar("T")
ENVIRONMENT = {
    "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2",
    "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": "2",
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "6",
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "12",
}
WORKER_FLAGS = ("--chunked-prefill-size", "64", "--log-level-http", "warning")
ROUTER_FLAGS = (
    "--health-check-interval-secs", "1", "--health-check-timeout-secs", "1",
    "--health-failure-threshold", "2", "--health-success-threshold", "1", "--request-timeout-secs", "60",
)  # fmt: skip
QUEUES = (
    "num_running", "num_waiting", "num_prefill_prealloc", "num_prefill_inflight", "num_decode_prealloc",
    "num_decode_transfer", "in_use_pages",
)  # fmt: skip


def until(what: str, look: Callable[[], T], within_s: float = 30.0) -> T:
    """The first true value of `look`; errors of connections count as not yet."""
    deadline = time.monotonic() + within_s
    seen: object = None
    while True:
        try:
            if seen := look():
                return seen
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            seen = error
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what} (last: {seen!r})"
        time.sleep(0.01)


def info(worker: Process) -> dict[str, Any]:
    status, text = worker.get("/get_server_info")
    assert status == 200, text
    return dict(json.loads(text))


def state(worker: Process) -> dict[str, Any]:
    return dict(info(worker)["internal_states"][0])


def at_rest(service: Service) -> None:
    """Every worker holds nothing for anybody and its pages have one owner each."""
    for process in service.processes.values():
        if process.name.startswith("router"):
            continue

        def rests(worker: Process = process) -> bool:
            now = info(worker)
            counts = {name: now["internal_states"][0][name] for name in QUEUES}
            assert now["page_ownership"] == "ok", (worker.name, now["page_ownership"])
            return not any(counts.values())

        until(f"{process.name} is idle and holds no page: {state(process)}", rests)


@dataclass
class Client:
    """One `/generate` request on its own thread. `ends` gets exactly one of "answer", "error", "closed", "broken"."""

    url: str
    body: dict[str, Any]
    ends: list[str] = field(default_factory=list)
    num_events: int = 0
    answer: dict[str, Any] = field(default_factory=dict)
    status: int = 0
    problem: str = ""

    def start(self) -> "Client":
        host, port = self.url.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)), timeout=90)
        self._left = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def leave(self) -> None:
        """Close the connection, as a client does that has lost interest."""
        self._left = True
        with contextlib.suppress(OSError):  # the router was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self, within_s: float = 60.0) -> str:
        self._thread.join(within_s)
        assert not self._thread.is_alive(), f"no end within {within_s:g} s: {self.body}"
        assert len(self.ends) == 1, (self.ends, self.problem)
        return self.ends[0]

    def answered(self, expected: dict[str, Any]) -> None:
        assert self.end() == "answer", (self.status, self.ends, self.problem)
        assert self.answer["text"] == expected["text"]
        assert self.answer["output_ids"] == expected["output_ids"]

    def _run(self) -> None:
        try:
            self._talk()
        except (OSError, http.client.HTTPException) as error:
            self.problem = repr(error)
            self.ends.append("closed" if self._left else "broken")
        finally:
            self._socket.close()

    def _talk(self) -> None:
        payload = json.dumps(self.body).encode()
        head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
        self._socket.sendall(head.encode() + payload)
        response = http.client.HTTPResponse(self._socket)
        response.begin()
        self.status = response.status
        if self.body.get("stream") and self.status == 200:
            self._read_stream(response)
        else:
            text = response.read()
            if self._left and not text:
                self.ends.append("closed")
                return
            self.answer = json.loads(text)
            self._note_error(self.answer)
            self.ends.append("answer" if self.status == 200 else "error")

    def _read_stream(self, response: http.client.HTTPResponse) -> None:
        is_done = False
        for line in response:
            if line.startswith(b"data: [DONE]"):
                is_done = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    self._note_error(event)
                    self.ends.append("error")
                    return
                assert event["text"].startswith(self.answer.get("text", "")), "a stream never takes text back"
                self.answer = event
                self.num_events += 1
        self.ends.append("answer" if is_done else "closed" if self._left else "broken")

    def _note_error(self, answer: dict[str, Any]) -> None:
        if "error" in answer:
            self.problem = json.dumps(answer)
            assert {"type", "code", "message", "stage"} <= set(answer["error"]), answer


def body(length: int, seed: int, *, stream: bool, max_new_tokens: int = 12) -> dict[str, Any]:
    """A prompt of `length` tokens that no other seed shares a page with."""
    input_ids = [(seed * 7919 + index * 31 + index * index % 97) % 40000 + 1000 for index in range(length)]
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    return {"input_ids": input_ids, "stream": stream, "sampling_params": sampling}
