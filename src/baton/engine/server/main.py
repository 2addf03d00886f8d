"""One worker's HTTP process: sockets, servers, warm-up, signals, and the end when the rank ends.

`run_server` is the front door; `launch` starts the rank processes beside it and calls it. Start order: the bootstrap server
(prefill ranks register there while they start), every engine's `Ready`, the HTTP port (open port = weights are loaded, which
is what TCP probes of existing manifests mean), one warm-up request for each engine, ready. No torch is imported in this process.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn
import uvloop
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from baton.engine.args import EngineArgs, start_notes
from baton.engine.errors import ModelError
from baton.engine.server.admin import fake_bootstrap
from baton.engine.server.app import build_app
from baton.engine.server.channel import ChannelAddress, ServerChannel
from baton.engine.server.client import EngineClient, RankLostError
from baton.engine.server.context import ServerContext
from baton.engine.server.dialect import Dialect
from baton.engine.server.dispatch import dispatcher_of
from baton.engine.server.edge import LimitedHttpProtocol
from baton.engine.server.engines import Engines, common_ready
from baton.engine.server.sglang_dialect import SGLANG
from baton.engine.tokenizer import TextTokenizer, open_tokenizer
from baton.protocol.pod import listen_host
from baton.protocol.rank import Ready, Submit
from baton.protocol.sampling import SamplingParams
from baton.text.chat_template import ChatTemplate
from baton.transfer.bootstrap import bootstrap_app

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 1800.0
WARMUP_TIMEOUT_S = 1800.0
DRAIN_TIMEOUT_S = 25
"""How long requests may go on after SIGTERM; Kubernetes kills after 30 s."""
LAST_WORDS_S = 1.0
"""Before the end of the drain: requests that still run hear then why they end."""
STORE_DRAIN_TIMEOUT_S = 4.0
KEEP_ALIVE_S = 120
FATAL_GRACE_S = 0.2
"""The rank's last words may still be on their way when its process has ended."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises OSError naming the address."""
    family, kind, protocol, _, address = socket.getaddrinfo(listen_host(host), port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}") from None
    return bound


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """The first rank of one engine: where it is talked to, and its process."""

    address: ChannelAddress
    rank_pid: int


def run_server(
    args: EngineArgs,
    engines: Sequence[EngineProcess],
    *,
    http_socket: socket.socket,
    bootstrap_socket: socket.socket | None = None,
    model_path: Path | None = None,
    dialect: Dialect = SGLANG,
) -> int:
    """Serve until SIGTERM, SIGINT or the end of a rank. Returns the exit status: 0 after a signal, 1 after a failure.

    `bootstrap_socket` is for prefill workers. `model_path` is where `args.model_path` lies on this machine.
    """
    if bootstrap_socket is not None:
        # Connections queue from now on: the rank may register before the server has started.
        bootstrap_socket.listen()
    model_path = model_path or Path(args.model_path)
    worker = Worker(args, engines, http_socket, bootstrap_socket, model_path, dialect)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(worker.run())


class HttpServer(uvicorn.Server):
    """Leaves signals to `Worker`, which owns two servers, and wakes once a second instead of ten times."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Finish the requests that run, then return from `serve`."""
        self.should_exit = True
        self._stop.set()

    async def main_loop(self) -> None:
        seconds = 0
        while not await self.on_tick(10 * seconds):  # uvicorn counts tenths; the tick renews the Date header
            seconds = (seconds + 1) % 86400
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), 1.0)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def http_server(app: ASGIApp, args: EngineArgs, *, access_log: bool) -> HttpServer:
    config = uvicorn.Config(
        app, loop="none", http=LimitedHttpProtocol, ws="none", lifespan="off", log_config=None,
        log_level=args.log_level_http or args.log_level, access_log=access_log, server_header=False, proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=DRAIN_TIMEOUT_S,
    )  # fmt: skip
    return HttpServer(config)


class Worker:
    """Everything of one HTTP process, from start to end."""

    def __init__(
        self,
        args: EngineArgs,
        engines: Sequence[EngineProcess],
        http_socket: socket.socket,
        bootstrap_socket: socket.socket | None,
        model_path: Path,
        dialect: Dialect,
    ) -> None:
        self._args = args
        self._dialect = dialect
        self._rank_pids = [one.rank_pid for one in engines]
        self._http_socket = http_socket
        self._bootstrap_socket = bootstrap_socket
        self._model_path = model_path
        self._started = time.monotonic()
        self._channels = [ServerChannel(one.address) for one in engines]
        self._registry = CollectorRegistry()
        self._stop = asyncio.Event()
        self._servers: list[HttpServer] = []
        self._ctx: ServerContext | None = None

    async def run(self) -> int:
        """Exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        try:
            async with asyncio.TaskGroup() as group:
                bootstrap = None
                if self._bootstrap_socket is not None:
                    server = http_server(bootstrap_app(), self._args, access_log=False)
                    bootstrap = (server, group.create_task(server.serve([self._bootstrap_socket]), name="bootstrap"))
                main = group.create_task(self._run_rank_side(), name="worker")
                status = await main
                if bootstrap is not None:
                    bootstrap[0].stop()
            return status
        finally:
            for channel in self._channels:
                channel.close()

    async def _run_rank_side(self) -> int:
        """Wait for the ranks, then serve. Turns every failure to start into one log line."""
        try:
            tokenizer = None if self._args.skip_tokenizer_init else await asyncio.to_thread(self._open_tokenizer)
            engines = self._engines(tokenizer)
            with self._watched_processes(engines):
                engines.start()
                readies = await self._ready_or_stop(engines)
                if readies is None:
                    return 0
                context = self._context(engines, tokenizer, readies)
                return await self._serve(context)
        except (ModelError, RankLostError, OSError) as error:
            logger.error("the worker cannot start: %s", error)
            return 1

    def _open_tokenizer(self) -> TextTokenizer:
        return open_tokenizer(Path(self._args.tokenizer_path) if self._args.tokenizer_path else self._model_path)

    def _engines(self, tokenizer: TextTokenizer | None) -> Engines:
        metrics = None
        if self._args.enable_metrics:
            metrics = self._dialect.request_metrics(self._args, self._registry)
        mode = self._args.disaggregation_mode
        vocabulary = tokenizer.vocabulary if tokenizer else None
        return Engines(
            [
                EngineClient(channel, vocabulary, mode=mode, metrics=metrics, dp_rank=dp_rank)
                for dp_rank, channel in enumerate(self._channels, start=self._args.dp_rank)
            ]
        )

    async def _ready_or_stop(self, engines: Engines) -> list[Ready] | None:
        """What each engine has loaded; None when a signal came first."""
        ready = asyncio.create_task(engines.wait_ready(READY_TIMEOUT_S), name="wait-ready")
        stop = asyncio.create_task(self._stop.wait(), name="wait-stop")
        try:
            await asyncio.wait({ready, stop}, return_when=asyncio.FIRST_COMPLETED)
            return ready.result() if ready.done() else None
        finally:
            ready.cancel()
            stop.cancel()

    def _context(self, engines: Engines, tokenizer: TextTokenizer | None, readies: Sequence[Ready]) -> ServerContext:
        ready = common_ready(readies)
        engines.dispatch_by(dispatcher_of(self._args, ready))
        for note in start_notes(self._args, ready.device.partition(":")[0]):
            logger.warning("%s", note)
        startup_s = time.monotonic() - self._started
        self._ctx = ServerContext(
            args=self._args,
            ready=ready,
            engines=engines,
            tokenizer=tokenizer,
            chat_template=chat_template(self._args, tokenizer),
            dialect=self._dialect,
            registry=self._registry,
            scheduler_metrics=self._dialect.scheduler_metrics(self._args, readies, startup_s, self._registry),
            sampling_defaults=tokenizer.sampling_defaults
            if tokenizer and self._args.sampling_defaults == "model"
            else {},
        )
        return self._ctx

    async def _serve(self, ctx: ServerContext) -> int:
        server = http_server(build_app(ctx), self._args, access_log=True)
        self._servers.append(server)
        ctx.engines.on_lost = server.stop
        if self._stop.is_set():
            return 0
        if ctx.engines.lost_reason is not None:
            raise RankLostError(ctx.engines.lost_reason)
        async with asyncio.TaskGroup() as group:
            watchdog = group.create_task(ctx.engines.watch(self._args.watchdog_timeout), name="watchdog")
            beats = group.create_task(ctx.engines.watch_beats(), name="beats")
            warm_up = group.create_task(self._warm_up(ctx, server), name="warm-up")
            await server.serve([self._http_socket])
            await self._finish_early_answered(ctx)
            await self._drain_store(ctx)
            watchdog.cancel()
            beats.cancel()
            warm_up.cancel()
        return 1 if ctx.engines.lost_reason is not None else 0

    async def _finish_early_answered(self, ctx: ServerContext) -> None:
        """Who was sent to a decode server has an answer, but not yet its KV. Bounded: the rest ends before the drain does."""
        if ctx.background:
            logger.info(
                "stopping when what was promised to decode servers is handed over requests=%d", len(ctx.background)
            )
            await asyncio.wait(ctx.background, timeout=DRAIN_TIMEOUT_S)

    async def _drain_store(self, ctx: ServerContext) -> None:
        """Let the ranks finish their writes to the store before they end."""
        if ctx.engines.lost_reason is None and self._args.hicache_storage_backend is not None:
            try:
                await ctx.engines.drain_store(STORE_DRAIN_TIMEOUT_S)
            except RankLostError as error:
                logger.warning("ending before the store has all pages: %s; they will be computed again", error)

    async def _warm_up(self, ctx: ServerContext, server: HttpServer) -> None:
        """One request through every engine, then ready."""
        if not self._args.skip_server_warmup:
            error = await warm_up(ctx)
            if error is not None:
                ctx.engines.fail(f"the warm-up request failed: {error}")
                server.stop()
                return
        ctx.is_warm = True
        host, port = self._http_socket.getsockname()[:2]
        logger.info("serving at http://%s:%s model=%s", host, port, self._args.name)
        logger.info("The server is fired up and ready to roll!")

    def _on_signal(self) -> None:
        is_second = self._stop.is_set()
        self._stop.set()
        if self._ctx is not None:
            self._ctx.is_stopping = True
            reason = "the worker was told to stop, and this request ran longer than it may wait"
            delay_s = 0.0 if is_second else DRAIN_TIMEOUT_S - LAST_WORDS_S
            asyncio.get_running_loop().call_later(delay_s, self._ctx.engines.end_all, reason)
        for server in self._servers:
            server.stop()
            server.force_exit = is_second

    @contextlib.contextmanager
    def _watched_processes(self, engines: Engines) -> Generator[None, None, None]:
        """Learn of a rank's death from the kernel, without polling."""
        loop = asyncio.get_running_loop()
        watched: list[int] = []

        def on_exit(descriptor: int, pid: int, client: EngineClient) -> None:
            loop.remove_reader(descriptor)
            loop.call_later(FATAL_GRACE_S, client.fail, f"its process {pid} ended")

        try:
            for pid, client in zip(self._rank_pids, engines.clients, strict=True):
                try:
                    descriptor = os.pidfd_open(pid)
                except ProcessLookupError:
                    raise RankLostError(f"its process {pid} ended") from None
                watched.append(descriptor)
                loop.add_reader(descriptor, on_exit, descriptor, pid, client)
            yield
        finally:
            for descriptor in watched:
                loop.remove_reader(descriptor)
                os.close(descriptor)


def chat_template(args: EngineArgs, tokenizer: TextTokenizer | None) -> ChatTemplate | None:
    """--chat-template's file, else the model's own. Raises `ModelError` for one that does not parse."""
    if tokenizer is None:
        return None
    source = tokenizer.chat_template
    if args.chat_template is not None:
        try:
            source = Path(args.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise ModelError(f"--chat-template {args.chat_template}: {error.strerror}") from None
    if source is None:
        return None
    try:
        return ChatTemplate(source, tokenizer.special_tokens)
    except Exception as error:  # a template is foreign code to Jinja's parser: any error means it cannot be used
        raise ModelError(
            f"{args.chat_template or args.model_path}: the chat template does not parse: {error}"
        ) from None


async def warm_up(ctx: ServerContext) -> str | None:
    """SGLang's warm-up request, on every engine. Returns what went wrong, or None."""
    vocab_size = ctx.ready.vocab_size
    submits = [
        Submit(
            rid=f"WARM_UP_{index}",
            input_ids=[token_id for token_id in range(4) if token_id < vocab_size],
            sampling=SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True),
            bootstrap=fake_bootstrap(ctx, 2**63 - 1),
            timeout_s=WARMUP_TIMEOUT_S,
        )
        for index in range(ctx.engines.count)
    ]
    job = ctx.engines.submit_to_each(submits)
    try:
        async with asyncio.timeout(WARMUP_TIMEOUT_S):
            while not job.is_done:
                await job.changed()
    except TimeoutError:
        return f"no answer within {WARMUP_TIMEOUT_S:.0f} s"
    finally:
        job.close("warm-up is over")
    return job.error.message if job.error is not None else None
