"""CPU per request and added latency of routers, beside each other in one run, in front of fake backends.

Measures `baton router` and, when `--sglang-router-python` names a Python that has `sglang-router`, that router too;
`direct` is the load generator on the backends without a router. Backends do no work, so what is seen is the router.

The figure that survives a busy machine is CPU per request (utime + stime of the router's process from /proc, over the
number of requests); latencies are medians of sequential requests and mean little below 50 us. Rounds are interleaved
(each round measures every router once) and medians over rounds are reported with the minimum and maximum.

    python benchmarks/router.py --sglang-router-python VENV/bin/python
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import httptools
import uvloop

from host import describe_machine

STREAM_EVENTS = 100
EVENT_INTERVAL_S = 0.01
TICK_US = 1e6 / os.sysconf("SC_CLK_TCK")
HOST = "127.0.0.1"
PROMPT = "All work and no play makes a router a dull process. " * 10
START_TIMEOUT_S = 60.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


# Fake backend: answers at once, parses nothing but the framing


def _response(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


ANSWER = _response(
    json.dumps(
        {
            "id": "0" * 32,
            "object": "chat.completion",
            "created": 1700000000,
            "model": "m",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "word " * 20}, "logprobs": None, "finish_reason": "stop", "matched_stop": None}
            ],
            "usage": {"prompt_tokens": 100, "total_tokens": 120, "completion_tokens": 20, "prompt_tokens_details": None},
        },
        separators=(",", ":"),
    ).encode()
)  # fmt: skip
MODEL_INFO = _response(b'{"model_path":"m","tokenizer_path":"m","served_model_name":"m","is_generation":true}')
SERVER_INFO = _response(b'{"model_path":"m","served_model_name":"m","tp_size":1,"dp_size":1,"internal_states":[{}]}')
MODELS = _response(b'{"object":"list","data":[{"id":"m","object":"model","created":1,"owned_by":"sglang"}]}')
SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _event() -> bytes:
    chunk = {
        "id": "0" * 32, "object": "chat.completion.chunk", "created": 1700000000, "model": "m",
        "choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None, "matched_stop": None}],
    }  # fmt: skip
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


EVENT_DATA = _event()
EVENT = b"%x\r\n%b\r\n" % (len(EVENT_DATA), EVENT_DATA)
EVENT_DATA_WITH_IDS = b": tokens 0 12345\n" + EVENT_DATA
EVENT_WITH_IDS = b"%x\r\n%b\r\n" % (len(EVENT_DATA_WITH_IDS), EVENT_DATA_WITH_IDS)
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Backend(asyncio.Protocol):
    """`is_first`: the one that is the prefill worker in PD mode; a prefill's stream has one event."""

    def __init__(self, is_first: bool) -> None:
        self.is_first = is_first
        self.parser = httptools.HttpRequestParser(self)
        self.path = b""
        self.body: list[bytes] = []
        self.wants_ids = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but type

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:  # sglang-router tries whether a worker speaks HTTP/2
            if self.transport is not None:
                self.transport.close()

    def on_message_begin(self) -> None:
        self.path, self.body, self.wants_ids = b"", [], False

    def on_url(self, url: bytes) -> None:
        self.path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.wants_ids = self.wants_ids or name.lower() == b"x-baton-token-ids"

    def on_body(self, data: bytes) -> None:
        self.body.append(data)

    def on_message_complete(self) -> None:
        assert self.transport is not None
        if self.path in (b"/v1/chat/completions", b"/generate"):
            body = b"".join(self.body)
            if b'"stream":true' in body or b'"stream": true' in body:
                is_prefill = self.is_first and b'"bootstrap_room"' in body
                stream = self.stream(self.wants_ids, 1 if is_prefill else STREAM_EVENTS)
                asyncio.get_running_loop().create_task(stream)
            else:
                self.transport.write(ANSWER)
        elif b"model_info" in self.path:
            self.transport.write(MODEL_INFO)
        elif b"server_info" in self.path:
            self.transport.write(SERVER_INFO)
        elif b"models" in self.path:
            self.transport.write(MODELS)
        else:
            self.transport.write(_response(b""))

    async def stream(self, with_ids: bool, num_events: int) -> None:
        if self.transport is not None:
            self.transport.write(SSE_HEAD)
        event = EVENT_WITH_IDS if with_ids else EVENT
        for _ in range(num_events):
            if num_events > 1:
                await asyncio.sleep(EVENT_INTERVAL_S)
            if self.transport is None:
                return
            self.transport.write(event)
        if self.transport is not None:
            self.transport.write(DONE)


def run_backend(port: int, is_first: bool) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: Backend(is_first), HOST, port, backlog=1024)
        await server.serve_forever()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    uvloop.run(serve())


# Load generator


def request_bytes(stream: bool) -> bytes:
    body = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 20, "stream": stream}
    ).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )


class Client(asyncio.Protocol):
    """Sends `request` again and again; counts answers by their framing."""

    def __init__(self, request: bytes, is_stream: bool) -> None:
        self.request = request
        self.is_stream = is_stream
        self.buffer = b""
        self.done: asyncio.Future[float] | None = None
        self.first_at = 0.0
        self.events = 0
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but type

    def connection_lost(self, exc: Exception | None) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(ConnectionError("closed"))

    def send(self) -> asyncio.Future[float]:
        assert self.transport is not None
        self.buffer = b""
        self.first_at = 0.0
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(self.request)
        return self.done

    def data_received(self, data: bytes) -> None:
        assert self.done is not None
        if self.is_stream:
            if not self.first_at and b"data:" in data:
                self.first_at = time.perf_counter()
            self.events += data.count(b"data: {")
            self.buffer = self.buffer[-16:] + data
            if self.buffer.endswith(b"0\r\n\r\n"):
                self.done.set_result(time.perf_counter())
            return
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end].lower()
        if not head.startswith(b"http/1.1 200"):
            self.done.set_exception(RuntimeError(self.buffer[:300].decode()))
            return
        length = int(head[head.index(b"content-length:") + 15 :].split(b"\r\n", 1)[0])
        if len(self.buffer) >= end + 4 + length:
            self.done.set_result(time.perf_counter())


async def connected(port: int, stream: bool) -> Client:
    request = request_bytes(stream)
    _, client = await asyncio.get_running_loop().create_connection(lambda: Client(request, stream), HOST, port)
    return client


async def closed_loop(ports: list[int], concurrency: int, count: int) -> float:
    """Seconds for `count` non-streaming requests."""
    clients = [await connected(ports[index % len(ports)], False) for index in range(concurrency)]
    left = count

    async def drive(client: Client) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await client.send()

    begin = time.perf_counter()
    await asyncio.gather(*map(drive, clients))
    seconds = time.perf_counter() - begin
    for client in clients:
        assert client.transport is not None
        client.transport.close()
    return seconds


async def sequential(ports: list[int], count: int) -> float:
    """Median latency in us of one request after another."""
    client = await connected(ports[0], False)
    latencies: list[float] = []
    for _ in range(count):
        begin = time.perf_counter()
        latencies.append(await client.send() - begin)
    assert client.transport is not None
    client.transport.close()
    return statistics.median(latencies) * 1e6


async def streams(ports: list[int], concurrency: int, rounds: int) -> tuple[int, float]:
    """(events received, median time to the first event in ms) of `concurrency` streams, `rounds` times on each
    connection."""
    clients = [await connected(ports[index % len(ports)], True) for index in range(concurrency)]
    firsts: list[float] = []

    async def drive(client: Client) -> None:
        for _ in range(rounds):
            begin = time.perf_counter()
            await client.send()
            firsts.append(client.first_at - begin)

    await asyncio.gather(*map(drive, clients))
    events = sum(client.events for client in clients)
    expected = concurrency * rounds * STREAM_EVENTS
    if events != expected:
        raise RuntimeError(f"{events} events instead of {expected}")
    for client in clients:
        assert client.transport is not None
        client.transport.close()
    return events, statistics.median(firsts) * 1e3


# Routers under test


class Target:
    """One router process (or none: direct)."""

    def __init__(self, name: str, command: list[str], port: int | None, direct: list[int]) -> None:
        self.name = name
        self.ports = direct if port is None else [port]
        self.process = (
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) if command else None
        )
        self.samples: dict[str, list[float]] = {}

    def cpu_us(self) -> float:
        if self.process is None:
            return 0.0
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * TICK_US

    def rss_mb(self) -> float:
        if self.process is None:
            return 0.0
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    async def ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                await closed_loop(self.ports, 1, 1)
                return
            except (OSError, RuntimeError) as error:
                if time.monotonic() > deadline or (self.process is not None and self.process.poll() is not None):
                    raise RuntimeError(f"{self.name} does not answer: {error}") from None
                await asyncio.sleep(0.2)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.samples.setdefault(name, []).append(value)


def targets_for(args: argparse.Namespace, mode: str, policy: str, backends: list[int]) -> list[Target]:
    urls = [f"http://{HOST}:{port}" for port in backends]
    if mode == "pd":
        workers = ["--pd-disaggregation", "--prefill", urls[0], "8998", "--decode", urls[1]]
    else:
        workers = ["--worker-urls", *urls]
    common = [*workers, "--host", HOST, "--policy", policy]
    found = [Target("direct", [], None, backends)]
    port = free_port()
    found.append(
        Target("baton", [sys.executable, "-m", "baton.router.launch", *common, "--port", str(port), "--log-level", "warn"], port, [])
    )  # fmt: skip
    if args.sglang_router_python:
        port, metrics = free_port(), free_port()
        command = [args.sglang_router_python, "-m", "sglang_router.launch_router", *common, "--port", str(port)]
        command += ["--prometheus-host", HOST, "--prometheus-port", str(metrics), "--log-level", "warn"]
        found.append(Target("sglang-router", command, port, []))
    return found


async def measure(target: Target, args: argparse.Namespace) -> None:
    """One round of one target."""
    await closed_loop(target.ports, args.concurrency, args.requests // 10)
    before = target.cpu_us()
    seconds = await closed_loop(target.ports, args.concurrency, args.requests)
    used = target.cpu_us() - before
    target.add(cpu_us_per_request=used / args.requests, requests_per_s=args.requests / seconds)
    target.add(latency_p50_us=await sequential(target.ports, args.sequential))
    before = target.cpu_us()
    events, first_ms = await streams(target.ports, args.streams, 2)
    target.add(cpu_us_per_event=(target.cpu_us() - before) / events, first_event_p50_ms=first_ms)
    target.add(rss_mb=target.rss_mb())


async def run_mode(args: argparse.Namespace, mode: str, policy: str, backends: list[int]) -> dict[str, Any]:
    targets = targets_for(args, mode, policy, backends)
    try:
        for target in targets:
            await target.ready()
        for round_ in range(args.rounds):
            for target in targets[round_ % len(targets) :] + targets[: round_ % len(targets)]:
                await measure(target, args)
    finally:
        for target in targets:
            target.stop()
    result: dict[str, Any] = {}
    for target in targets:
        result[target.name] = {
            name: {
                "median": round(statistics.median(values), 2),
                "min": round(min(values), 2),
                "max": round(max(values), 2),
            }
            for name, values in target.samples.items()
        }
    base = result["direct"]["latency_p50_us"]["median"]
    for name in result:
        if name != "direct":
            result[name]["added_latency_p50_us"] = round(result[name]["latency_p50_us"]["median"] - base, 1)
            show(mode, policy, name, result[name])
    return result


def show(mode: str, policy: str, name: str, row: dict[str, Any]) -> None:
    print(
        f"{mode:8} {policy:12} {name:14} CPU {row['cpu_us_per_request']['median']:6.1f} us/request  "
        f"{row['cpu_us_per_event']['median']:5.1f} us/event  +{row['added_latency_p50_us']:6.1f} us p50  "
        f"first event {row['first_event_p50_ms']['median']:5.1f} ms  {row['requests_per_s']['median']:7.0f} req/s  "
        f"{row['rss_mb']['median']:5.0f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sglang-router-python", help="a Python with sglang-router installed; left out: not measured")
    parser.add_argument("--modes", nargs="+", default=["regular", "pd"], choices=["regular", "pd"])
    parser.add_argument("--policies", nargs="+", default=["round_robin", "cache_aware"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=6000, help="non-streaming requests a round")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--sequential", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "router.json")
    args = parser.parse_args()
    ports = [free_port(), free_port()]
    backends = [
        multiprocessing.Process(target=run_backend, args=(port, port == ports[0]), daemon=True) for port in ports
    ]
    for backend in backends:
        backend.start()
    results: dict[str, Any] = {}
    try:
        for mode in args.modes:
            for policy in args.policies:
                results[f"{mode}/{policy}"] = uvloop.run(run_mode(args, mode, policy, ports))
    finally:
        for backend in backends:
            backend.terminate()
    document = {
        "command": "python benchmarks/router.py --sglang-router-python VENV/bin/python --rounds " + str(args.rounds),
        "machine": describe_machine(),
        "settings": {name: value for name, value in vars(args).items() if name not in ("json", "sglang_router_python")},
        "results": results,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {args.json}")


if __name__ == "__main__":
    main()
