"""The worker's HTTP application on a real port, with a fake rank behind the real channel and the demo model's tokenizer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI
from prometheus_client import CollectorRegistry
from tests.fakes.fake_rank import READY, FakeRank

from baton.engine.args import engine_args
from baton.engine.server.app import build_app
from baton.engine.server.channel import ChannelAddress, ServerChannel
from baton.engine.server.client import EngineClient
from baton.engine.server.context import ServerContext
from baton.engine.server.dialect import Dialect
from baton.engine.server.dispatch import dispatcher_of
from baton.engine.server.engines import Engines
from baton.engine.server.main import HttpServer, bind, chat_template, http_server, warm_up
from baton.engine.server.sglang_dialect import SGLANG
from baton.engine.tokenizer import TextTokenizer, open_tokenizer
from baton.engine.weights.demo import prepare_demo_model

MODEL = "/models/demo"


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    return prepare_demo_model()


@pytest.fixture(scope="session")
def tokenizer(demo_dir: Path) -> TextTokenizer:
    return open_tokenizer(demo_dir)


@dataclass
class Bed:
    """One running worker as a test sees it."""

    url: str
    ctx: ServerContext
    ranks: list[FakeRank]
    """Of each engine (--dp-size)."""
    http: httpx2.AsyncClient
    tokenizer: TextTokenizer

    @property
    def rank(self) -> FakeRank:
        return self.ranks[0]

    def say(self, text: str) -> None:
        """What the ranks answer from now on; an end-of-sequence token follows."""
        token_ids = self.tokenizer.encode(text)
        for rank in self.ranks:
            rank.reply = lambda _: token_ids

    @property
    def openai(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=self.http)

    async def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        return await self.http.post(path, json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until `condition` holds (at most 10 s)."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110  (it is another thread's state)
                await asyncio.sleep(0.001)


Start = Callable[..., "contextlib.AbstractAsyncContextManager[Bed]"]


@pytest.fixture
def start(tokenizer: TextTokenizer) -> Start:
    """`async with start("--flag", ..., dialect=...) as bed`: a worker with these flags."""

    @contextlib.asynccontextmanager
    async def started(*flags: str, dialect: Dialect = SGLANG, **rank_options: Any) -> AsyncIterator[Bed]:
        args = engine_args(["--model", MODEL, *flags])
        addresses = [ChannelAddress.create() for _ in range(args.dp_size)]
        channels = [ServerChannel(one) for one in addresses]
        ranks = [FakeRank(one, lambda _: tokenizer.encode("Hello there, world!"), **rank_options) for one in addresses]
        for rank in ranks:
            rank.is_prefill = args.disaggregation_mode == "prefill"
            rank.start()
        registry = CollectorRegistry()
        text = None if args.skip_tokenizer_init else tokenizer
        metrics = dialect.request_metrics(args, registry)
        mode = args.disaggregation_mode
        vocabulary = text.vocabulary if text else None
        engines = Engines(
            [
                EngineClient(one, vocabulary, mode=mode, metrics=metrics, dp_rank=args.dp_rank + index)
                for index, one in enumerate(channels)
            ]
        )
        engines.start()
        readies = await engines.wait_ready(10)
        engines.dispatch_by(dispatcher_of(args, READY))
        ctx = ServerContext(
            args=args, ready=READY, engines=engines, tokenizer=text, chat_template=chat_template(args, text),
            registry=registry, dialect=dialect,
            scheduler_metrics=dialect.scheduler_metrics(args, readies, 1.0, registry),
        )  # fmt: skip
        assert await warm_up(ctx) is None
        ctx.is_warm = True
        for rank in ranks:
            rank.received.clear()
        server = http_server(build_app(ctx), args, access_log=False)
        bound = bind("127.0.0.1", 0)
        server.shutdown = partial(close_at_once, server)  # type: ignore[method-assign]
        serving = asyncio.create_task(server.serve([bound]))
        while not server.started:  # noqa: ASYNC110  (uvicorn has no event for it)
            await asyncio.sleep(0.001)
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        try:
            async with httpx2.AsyncClient(base_url=url, timeout=20, verify=False) as http:
                yield Bed(url, ctx, ranks, http, tokenizer)
        finally:
            server.force_exit = True
            server.stop()
            await serving
            for rank, channel, address in zip(ranks, channels, addresses, strict=True):
                rank.stop()
                channel.close()
                address.remove()

    return started


async def close_at_once(server: HttpServer, sockets: object = None) -> None:
    """Uvicorn's own way takes a tenth of a second, which a hundred tests would feel."""
    for one in server.servers:
        one.close()
    for connection in list(server.server_state.connections):
        connection.shutdown()


def sse_events(body: str) -> list[str]:
    """The `data:` payloads of a finished stream."""
    return [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
