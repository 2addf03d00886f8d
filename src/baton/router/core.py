"""What all requests of one router share: workers, admission, metrics, randomness, and calls of the router's own.

Holds no request's state; `exchange` does. Nothing here touches a client connection.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec

from baton.protocol.errors import RequestError
from baton.router.admission import Admission
from baton.router.body import RequestView
from baton.router.config import PdProtocol, RouterConfig
from baton.router.errors import router_error
from baton.router.kv_index import Prompt
from baton.router.metrics import Metrics
from baton.router.policies import CacheAware, make_policy
from baton.router.prompts import open_prompt_reader
from baton.router.retry import Answer, Failure
from baton.router.upstream import Collector
from baton.router.workers import Registry, Worker

if TYPE_CHECKING:
    from baton.router.attempt import Attempt
    from baton.router.downstream import Request
    from baton.router.exchange import Exchange

log = logging.getLogger("baton.router")
ABORT_TIMEOUT_S = 5.0
LAST_CALLS_S = 0.5
"""How long the router's own end waits for aborts on their way."""
CALL_LIMIT_BYTES = 16 * 2**20


class Core:
    """`wake` is called with a worker whose health should be looked at now."""

    def __init__(self, config: RouterConfig, loop: asyncio.AbstractEventLoop, rng: Random) -> None:
        self.config = config
        self.loop = loop
        self.rng = rng
        self.metrics = Metrics(config.duration_buckets_s)
        self.admission = Admission(config.limits)
        self.exchanges: set[Exchange] = set()
        names = {"prefill": config.prefill_policy, "decode": config.decode_policy}
        policies = {
            role: make_policy(names.get(role, config.decode_policy), config.cache_aware, rng)
            for role in (("prefill", "decode") if config.pd else ("regular",))
        }
        self.registry = Registry(policies, config.breaker, config.limits.connect_timeout_s)  # type: ignore[arg-type]
        self.protocol: PdProtocol | None = config.pd_protocol
        """None: no worker was healthy yet."""
        self._kv_indexes = [policy.index for policy in policies.values() if isinstance(policy, CacheAware)]
        self.wake: Callable[[Worker], None] = lambda worker: None
        self.prompts = open_prompt_reader(config.tokenizer, config.chat_template)
        self.authorization = b"authorization: Bearer %b\r\n" % config.api_key.encode() if config.api_key else b""
        self._calls: set[asyncio.Task[None]] = set()

    # Choosing

    @property
    def wants_prompts(self) -> bool:
        """Whether some worker's cache is known by tokens, so that reading a prompt's tokens pays."""
        return any(self._kv_indexes)

    def pick_pair(
        self, view: RequestView, exclude: Collection[str], prompt: Prompt | None = None
    ) -> tuple[Worker | None, Worker] | None:
        """(prefill, decode), or (None, regular); None when a side has nobody."""
        if prompt is not None:
            prompt.release()
        now_s = self.loop.time()
        key = view.cache_key
        if not self.config.pd:
            worker = self.registry.pick("regular", key, exclude, now_s, prompt)
            return (None, worker) if worker is not None else None
        prefill = self.registry.pick("prefill", key, exclude, now_s, prompt)
        if prefill is None:
            return None
        if prefill.is_both:  # two servers where there are two: a hand-over to oneself is none
            exclude = {*exclude, prefill.url}
        decode = self.registry.pick("decode", key, exclude, now_s, prompt)
        return (prefill, decode) if decode is not None else None

    def who_is_missing(self) -> str:
        """Each role with nobody healthy and why; empty: ready."""
        return "; ".join(f"no healthy {role} worker ({why})" for role, why in self.registry.missing().items())

    def nobody_there(self) -> RequestError:
        message = f"The request cannot be served: {self.who_is_missing()}."
        return router_error(503, message, kind="no_healthy_worker", retryable=True)

    def new_room(self) -> int:
        return self.rng.getrandbits(63)

    def new_id(self) -> str:
        """32 hex digits; unique, not secret."""
        return f"{self.rng.getrandbits(128):032x}"

    # What tries teach

    def on_connect_failure(self, worker: Worker, reason: str) -> None:
        """Nobody listens there: not healthy until a check says otherwise."""
        if self.config.health.enabled and worker.healthy:
            worker.healthy = False
            worker.problem = reason
            log.warning("worker is gone worker=%s role=%s reason=%r", worker.url, worker.role, reason)
        self.wake(worker)

    def progress_on(self, worker: Worker) -> "dict[Attempt, int]":
        """Tries on their way at `worker`, each with a number that grows as the worker sends."""
        found: dict[Attempt, int] = {}
        for exchange in self.exchanges:
            attempt = exchange.attempt
            if attempt is not None and (reads := attempt.progress_on(worker)) is not None:
                found[attempt] = reads
        return found

    def on_failure(self, failure: Failure, blamed: bool) -> None:
        result = str(failure.answer.status) if failure.answer is not None else failure.kind
        self.metrics.upstream_responses[failure.role, failure.url, result] += 1
        worker = self.registry.of_role(failure.url, failure.role)
        if worker is None:
            return
        if blamed:
            worker.breaker.on_failure(self.loop.time())
        if failure.kind == "stale" or failure.is_worker_lost:
            self.wake(worker)
        if failure.is_peer_lost and failure.peer_url:
            for peer in self.registry.find(failure.peer_url):
                self.wake(peer)

    def on_exchange_end(self, exchange: "Exchange", request: "Request", status: int, streamed: bool) -> None:
        duration_s = self.loop.time() - request.received_s
        self.metrics.ended(request.path, status, duration_s)
        if self.config.access_log:
            log.info(
                "request method=%s path=%s status=%d duration_ms=%.1f bytes=%d stream=%s request_id=%s workers=%s",
                request.method.decode(), request.text_path, status, duration_s * 1e3, request.connection.bytes_out,
                streamed, request.request_id, exchange.pair,
            )  # fmt: skip

    # Calls of the router's own

    def authorization_for(self, client: "Request") -> bytes:
        """The header line that workers get with what this client asked for: its own key, or else the router's."""
        given = client.headers.get(b"authorization")
        return self.authorization if given is None else b"authorization: %b\r\n" % given

    async def call(
        self,
        worker: Worker,
        method: bytes,
        path: bytes,
        timeout_s: float,
        body: bytes = b"",
        authorization: bytes | None = None,
    ) -> Answer:
        """One small request to a worker, with the router's own key unless `authorization` (a header line) is given.
        Raises OSError (with ConnectionError) or TimeoutError."""
        async with asyncio.timeout(timeout_s):
            connection = worker.pool.get_idle() or await worker.pool.connect()
            collector = Collector(CALL_LIMIT_BYTES)
            head = worker.head(method + b" " + path)
            head += self.authorization if authorization is None else authorization
            if body:
                head += b"content-type: application/json\r\n"
            if body or method == b"POST":
                head += b"content-length: %d\r\n" % len(body)
            connection.send(head + b"\r\n", body, collector)
            try:
                return Answer(*await collector.answer)
            except asyncio.CancelledError:
                connection.close()
                raise

    def abort(self, worker: Worker, rid: str | list[str], authorization: bytes) -> None:
        """Tell a worker, without waiting, that a request is given up. A batch's ids are sent one by one."""
        if not worker.software.takes_aborts:
            return
        self.metrics.aborts += 1
        task = self.loop.create_task(self._abort(worker, rid, authorization), name=f"abort at {worker.url}")
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _abort(self, worker: Worker, rid: str | list[str], authorization: bytes) -> None:
        for one in [rid] if isinstance(rid, str) else rid:
            # A worker that is gone holds nothing to abort; its health is checked elsewhere.
            with contextlib.suppress(OSError, TimeoutError):
                body = msgspec.json.encode({"rid": one, "abort_all": False})
                await self.call(worker, b"POST", b"/abort_request", ABORT_TIMEOUT_S, body, authorization)

    async def settle_calls(self) -> None:
        """Wait for aborts on their way (at shutdown)."""
        if not self._calls:
            return
        _, late = await asyncio.wait(self._calls, timeout=LAST_CALLS_S)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)

    async def fan_out(
        self,
        method: bytes,
        path: bytes,
        timeout_s: float,
        body: bytes = b"",
        workers: list[Worker] | None = None,
        authorization: bytes | None = None,
    ) -> dict[str, Answer | str]:
        """The same call to every worker: url -> its answer, or why there is none."""

        async def one(worker: Worker) -> Answer | str:
            try:
                return await self.call(worker, method, worker.software.path(path), timeout_s, body, authorization)
            except TimeoutError:
                return f"no answer within {timeout_s:g} s"
            except OSError as error:
                return str(error) or type(error).__name__

        known = self.registry.all() if workers is None else workers
        targets = list({worker.url: worker for worker in known}.values())
        answers: list[Any] = await asyncio.gather(*(one(worker) for worker in targets))
        return {worker.url: answer for worker, answer in zip(targets, answers, strict=True)}
