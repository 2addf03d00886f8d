"""The router as one object: listens, gives each request to its handler, watches workers, stops without losing requests."""

import asyncio
import hmac
import logging
import socket
from collections.abc import Coroutine
from random import Random

from baton.protocol.errors import RequestError
from baton.protocol.pod import listen_host
from baton.router import routes
from baton.router.config import RouterConfig, WorkerSpec
from baton.router.core import Core
from baton.router.downstream import ClientConnection, Request
from baton.router.errors import error_body, router_error
from baton.router.exchange import Exchange
from baton.router.health import HealthChecker
from baton.router.httpbytes import JSON_TYPE
from baton.router.kv_feed import KvFeeds
from baton.router.metrics import kv_event_lines
from baton.router.workers import Worker

log = logging.getLogger("baton.router")
GENERATION = frozenset((b"/generate", b"/v1/chat/completions", b"/v1/completions"))
SWEEP_S = 1.0
DRAIN_POLL_S = 0.05


class Router:
    """`start`, then serve until `stop`. Implements `downstream.App`."""

    def __init__(self, config: RouterConfig, rng: Random | None = None) -> None:
        self.config = config
        self.limits = config.limits
        self.loop = asyncio.get_running_loop()
        self.core = Core(config, self.loop, rng or Random())
        self.health = HealthChecker(self.core)
        self.kv_feeds = KvFeeds(self.core)
        self.connections: set[ClientConnection] = set()
        self.closing = False
        self.port = 0
        """The bound port (differs from the configured one when that is 0)."""
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._id_headers = tuple(name.lower().encode() for name in config.request_id_headers)

    async def start(self) -> None:
        """Listen and begin to watch the workers. Raises OSError (address in use), ValueError (a bad worker URL)."""
        for spec in self.config.workers:
            self.core.registry.add(spec)
        self.port = await self._listen(self.config.host, self.config.port)
        if self.config.prometheus_port is not None:
            await self._listen(self.config.prometheus_host, self.config.prometheus_port)
        for worker in self.core.registry.all():
            self._watch(worker)
        self._spawn(self._sweep())
        if self.config.cache_aware.eviction_interval_s > 0:
            self._spawn(self._evict())

    async def _listen(self, host: str, port: int) -> int:
        server = await self.loop.create_server(
            lambda: ClientConnection(self, self.loop), listen_host(host), port, backlog=4096, family=socket.AF_UNSPEC
        )
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Stop accepting, let requests in progress end for `shutdown_grace_s`, then end the rest with an error."""
        self.closing = True
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.sweep(self.loop.time())
        await self._ended(self.core.exchanges, self.config.shutdown_grace_s)
        for exchange in list(self.core.exchanges):
            exchange.shut_down()
        await self._ended(self.core.exchanges, DRAIN_POLL_S * 20)
        await self.core.settle_calls()
        await self.health.stop()
        await self.kv_feeds.stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for connection in list(self.connections):
            connection.close()
        for worker in self.core.registry.all():
            worker.pool.close()

    async def _ended(self, exchanges: set[Exchange], timeout_s: float) -> None:
        """Wait until no request is in progress. Polls: an event would cost every request."""
        give_up_s = self.loop.time() + timeout_s
        while exchanges and self.loop.time() < give_up_s:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_S)

    # Requests

    def on_request(self, request: Request) -> None:
        for name in self._id_headers:
            if (value := request.headers.get(name)) is not None:
                request.request_id = value.decode("latin-1")[:256]
                break
        else:
            request.request_id = self.core.new_id()
            request.request_id_is_ours = True
        path = request.path
        if self.config.api_key is not None and path not in routes.OPEN_ROUTES and not self._is_authorized(request):
            self._error(request, router_error(401, "The API key is missing or wrong (Authorization: Bearer KEY)."))
            return
        if path in GENERATION:
            if request.method not in (b"POST", b"PUT"):
                self._method_not_allowed(request, ["POST"])
                return
            self.core.metrics.http_requests[request.method, path] += 1
            request.exchange = exchange = Exchange(self.core, request)
            exchange.start()
            return
        self._other_route(request)

    def _is_authorized(self, request: Request) -> bool:
        assert self.config.api_key is not None
        given = request.headers.get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + self.config.api_key.encode())

    def _other_route(self, request: Request) -> None:
        path = request.path
        is_worker = path.startswith(b"/workers/")
        methods = routes.ROUTES.get(b"/workers" if is_worker else path)
        if methods is None:
            self._error(request, router_error(404, f"There is no route {request.text_path}."))
            return
        handler = methods.get(b"GET" if request.method == b"HEAD" else request.method)
        if handler is None:
            self._method_not_allowed(request, [method.decode() for method in methods])
            return
        self.core.metrics.http_requests[request.method, b"/workers" if is_worker else path] += 1
        self._spawn(self._handle(handler, request))

    def _method_not_allowed(self, request: Request, allowed: list[str]) -> None:
        text = ", ".join(allowed)
        message = f"{request.text_path} takes {text}, not {request.method.decode('latin-1')}."
        self._error(request, router_error(405, message), b"allow: " + text.encode() + b"\r\n")

    async def _handle(self, handler: routes.Handler, request: Request) -> None:
        try:
            reply = await routes.run(handler, self, request)
        except RequestError as error:
            self._error(request, error)
        except Exception:  # our bug: answered, and reported here
            log.exception("route failed path=%s request_id=%s", request.text_path, request.request_id)
            self._error(request, router_error(500, "Internal error of the router."))
        else:
            if request.connection.current is request:
                request.connection.respond(reply.status, reply.headers, reply.body)

    def _error(self, request: Request, error: RequestError, headers: bytes = b"") -> None:
        if request.connection.current is request:
            headers += JSON_TYPE + b"x-request-id: %b\r\n" % request.request_id.encode("latin-1")
            request.connection.respond(error.info.code, headers, error_body(error.info, request.request_id))

    def on_bad_request(self, connection: ClientConnection, error: RequestError) -> None:
        request_id = self.core.new_id()
        self.core.metrics.http_responses[b"unreadable", error.info.code] += 1
        headers = JSON_TYPE + b"x-request-id: %b\r\n" % request_id.encode()
        connection.respond(error.info.code, headers, error_body(error.info, request_id))

    # Workers

    def add_worker(self, spec: WorkerSpec) -> Worker:
        """Raises ValueError (see `Registry.add`)."""
        worker = self.core.registry.add(spec)
        self._watch(worker)
        log.info("worker added worker=%s role=%s", worker.url, worker.role)
        return worker

    def _watch(self, worker: Worker) -> None:
        self.health.watch(worker)
        self.kv_feeds.watch(worker)

    def drain_worker(self, worker: Worker) -> None:
        """No new requests for it; it is removed when its last one has ended."""
        if not worker.draining:
            worker.draining = True
            self._spawn(self._drain(worker))

    async def _drain(self, worker: Worker) -> None:
        give_up_s = self.loop.time() + self.config.shutdown_grace_s
        while worker.active and worker.draining and self.loop.time() < give_up_s:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_S)
        if not worker.draining:  # it registered again meanwhile
            return
        await self.health.forget(worker)
        await self.kv_feeds.forget(worker)
        self.core.registry.remove(worker)
        log.info("worker removed worker=%s role=%s", worker.url, worker.role)

    # Housekeeping

    def metrics_text(self) -> str:
        registry = self.core.registry
        gauges = {
            "smg_http_connections_active": len(self.connections),
            "smg_router_requests_active": len(self.core.exchanges),
            "smg_router_requests_queued": self.core.admission.num_waiting,
        }
        text = self.core.metrics.render(registry.all(), [str(role) for role in registry.by_role], gauges)
        return text + kv_event_lines(self.kv_feeds.stats())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = self.loop.time()
            for connection in list(self.connections):
                connection.sweep(now_s)

    async def _evict(self) -> None:
        """Keep trees below 3/4 of their bound, so that a request seldom pays for eviction."""
        config = self.config.cache_aware
        while True:
            await asyncio.sleep(config.eviction_interval_s)
            for policy in self.core.registry.policies.values():
                tree = getattr(policy, "tree", None)
                if tree is not None:
                    tree.evict_all(config.max_tree_size * 3 // 4)
