"""A router and fake workers in one loop, and a small HTTP client that shows exactly what a client receives."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any, cast

import httptools
from tests.fakes.fake_worker import Fabric, FakeWorker

from baton.router.app import Router
from baton.router.config import HealthConfig, RetryConfig, RouterConfig, WorkerSpec

WAIT_S = 20.0
"""Bound of any wait; reached only when a test fails."""
FAST_RETRY = RetryConfig(initial_backoff_s=0.001, max_backoff_s=0.01, migration_wait_s=5.0)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Decoded `data:` events; [DONE] as a string. Fails on anything else in the stream."""
        found: list[Any] = []
        assert self.body.endswith(b"\n\n"), self.body[-80:]
        for event in self.body.decode().split("\n\n")[:-1]:
            assert event.startswith("data: "), f"not a whole event: {event!r}"
            found.append("[DONE]" if event == "data: [DONE]" else json.loads(event[6:]))
        return found


class Client(asyncio.Protocol):
    """One connection. `request` sends and waits for the whole answer; parts can be driven by hand."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.transport: asyncio.Transport | None = None
        self.headers: dict[str, str] = {}
        self.body = b""
        self.closed = asyncio.Event()
        self.news = asyncio.Event()
        self.replies: asyncio.Queue[Reply] = asyncio.Queue()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but type

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        self.news.set()

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)
        self.news.set()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        if self.parser.get_status_code() < 200:
            self.headers = {}
            return
        self.replies.put_nowait(Reply(self.parser.get_status_code(), self.headers, self.body))
        self.headers, self.body = {}, b""

    def send(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    async def reply(self) -> Reply:
        """The next whole answer; ConnectionError if the connection ends first."""
        async with asyncio.timeout(WAIT_S):
            while self.replies.empty():
                if self.closed.is_set():
                    raise ConnectionError("closed by the router")
                self.news.clear()
                await self.news.wait()
        return self.replies.get_nowait()

    async def body_with(self, marker: bytes) -> None:
        """Until the body so far holds `marker`."""
        async with asyncio.timeout(WAIT_S):
            while marker not in self.body:
                self.news.clear()
                await self.news.wait()

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


async def connect(port: int) -> Client:
    _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
    return client


def http_request(path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "POST") -> bytes:
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "host: router", f"content-length: {len(data)}"]
    if data:
        lines.append("content-type: application/json")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


async def eventually(condition: Any) -> None:
    """Yield to the loop until `condition()` holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - whatever the condition watches has no event
            await asyncio.sleep(0.001)


@dataclass
class Bed:
    router: Router
    fabric: Fabric
    prefill: list[FakeWorker]
    decode: list[FakeWorker]
    regular: list[FakeWorker]
    both: list[FakeWorker]

    @property
    def workers(self) -> list[FakeWorker]:
        return [*self.prefill, *self.decode, *self.regular, *self.both]

    async def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = "POST"
    ) -> Reply:
        client = await connect(self.router.port)
        try:
            client.send(http_request(path, body, headers, method))
            return await client.reply()
        finally:
            client.close()

    async def get(self, path: str) -> Reply:
        return await self.ask(path, method="GET")

    async def ready(self) -> None:
        await eventually(lambda: all(worker.healthy for worker in self.router.core.registry.all()))


@asynccontextmanager
async def bed(
    prefill: int = 1,
    decode: int = 1,
    regular: int = 0,
    both: int = 0,
    *,
    sends_token_ids: bool = True,
    make: Callable[[str, Fabric], FakeWorker] | None = None,
    waits: bool = True,
    **settings: Any,
) -> AsyncIterator[Bed]:
    """A running router before running workers; `settings` are fields of `RouterConfig`. `make`: of another kind; `both`: workers
    that are given as prefill and as decode."""
    fabric = Fabric()
    roles = ["prefill"] * prefill + ["decode"] * decode + ["both"] * both if not regular else ["regular"] * regular
    if make is None:
        make = partial(FakeWorker, sends_token_ids=sends_token_ids)
    workers = [await make(role, fabric).start() for role in roles]
    specs = tuple(
        WorkerSpec(worker.url, role, 9000 + index if role == "prefill" else None)  # type: ignore[arg-type]
        for index, worker in enumerate(workers)
        for role in (("prefill", "decode") if worker.role == "both" else (worker.role,))
    )
    base = RouterConfig(
        port=0, pd=not regular, workers=specs, retry=FAST_RETRY, shutdown_grace_s=0.0,
        prefill_policy="round_robin", decode_policy="round_robin", health=HealthConfig(retry_interval_s=0.02),
    )  # fmt: skip
    router = Router(replace(base, **settings), Random(7))
    await router.start()
    by_role = ([w for w in workers if w.role == role] for role in ("prefill", "decode", "regular", "both"))
    found = Bed(router, fabric, *by_role)
    try:
        if waits:
            await found.ready()
        yield found
    finally:
        await router.stop()
        for worker in workers:
            await worker.stop()
    assert not [problem for worker in workers for problem in worker.violations]
