"""Listens to the KV events of workers and keeps the index of the cache_aware policies true to them.

One task per worker: ask it where it publishes (`/get_server_info`: `kv_events_config`, as SGLang's and our workers answer), subscribe,
ask for what was missed (replay), apply. Whatever breaks the sequence (a lost batch, an unreadable one, a new process) makes the
worker's blocks unknown, never wrong. A connection that ends takes its knowledge with it. Neighbours: `kv_index` (what is
known), `protocol.kv_events` (messages). Not here: who gets a request.
"""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import suppress
from socket import AF_INET, AF_INET6, SOCK_STREAM
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from baton.protocol.kv_events import (
    END_SEQ,
    SEQ_BYTES,
    WILDCARD_HOSTS,
    AllBlocksCleared,
    decode_batch,
    endpoint_of,
    split_endpoint,
)
from baton.router.config import KvSource
from baton.router.core import Core
from baton.router.policies import CacheAware
from baton.router.workers import Worker

log = logging.getLogger("baton.router")
ASK_TIMEOUT_S = 10.0
RETRY_S = (0.25, 5.0)
"""Between two questions to a worker that does not answer: at first, at most."""
LOOK_AGAIN_S = 300.0
"""A worker that publishes nothing is asked again after this long, or when it came back."""
REPLAY_TIMEOUT_S = 5.0
"""Between two batches of a replay."""
MAX_MESSAGE_BYTES = 64 * 2**20
QUEUED_BATCHES = 100_000
POLL_MS = 60_000
HEARTBEAT_MS = 10_000
"""A worker whose host is gone closes nothing: three of these without an answer end the connection."""


class KvFeeds:
    """Owns one task per worker of a cache_aware role, from `watch` until `forget`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._context = zmq.asyncio.Context()
        self._tasks: dict[Worker, asyncio.Task[None]] = {}
        self._feeds: dict[Worker, Feed] = {}
        self._wakes: dict[Worker, asyncio.Event] = {}
        for policy in core.registry.policies.values():
            if isinstance(policy, CacheAware):
                policy.on_forget = self._on_forget

    def watch(self, worker: Worker) -> None:
        policy = self._core.registry.policies[worker.role]
        if isinstance(policy, CacheAware):
            self._wakes[worker] = asyncio.Event()
            task = self._core.loop.create_task(self._follow(worker, policy), name=f"kv events of {worker.url}")
            self._tasks[worker] = task

    async def forget(self, worker: Worker) -> None:
        self._wakes.pop(worker, None)
        if (task := self._tasks.pop(worker, None)) is not None:
            task.cancel()
            await asyncio.wait([task])
            self._feeds.pop(worker, None)

    async def stop(self) -> None:
        for worker in list(self._tasks):
            await self.forget(worker)
        self._context.destroy(linger=0)

    def stats(self) -> list[tuple[str, int, dict[str, int]]]:
        """(worker, blocks known, counters) of the workers that are listened to."""
        feeds = {worker.url: feed for worker, feed in self._feeds.items()}  # a server that is both is heard twice
        return [(url, feed.num_blocks, feed.counters) for url, feed in feeds.items()]

    def _on_forget(self, url: str) -> None:
        for worker, wake in self._wakes.items():
            if worker.url == url:
                wake.set()

    async def _follow(self, worker: Worker, policy: CacheAware) -> None:
        wake = self._wakes[worker]
        delay_s = RETRY_S[0]
        while True:
            wake.clear()
            try:
                source = self._core.config.kv_sources.get(worker.url) or await self._ask(worker)
            except (OSError, TimeoutError, ValueError) as error:
                log.debug("kv events: no answer worker=%s reason=%r", worker.url, str(error))
                await _wait(wake, delay_s)
                delay_s = min(delay_s * 2, RETRY_S[1])
                continue
            delay_s = RETRY_S[0]
            if source is None:
                await _wait(wake, LOOK_AGAIN_S)
                continue
            feed = self._feeds.setdefault(worker, Feed(worker.url, policy))
            try:
                await _unless(wake, feed.run(self._context, source))
            except (OSError, TimeoutError, zmq.ZMQError) as error:
                log.warning("kv events: worker=%s endpoint=%s: %s", worker.url, source.endpoint, error)
                await _wait(wake, RETRY_S[1])

    async def _ask(self, worker: Worker) -> KvSource | None:
        """Where `worker` publishes; None: it does not. Raises OSError, TimeoutError; ValueError for an answer that is none."""
        answer = await self._core.call(worker, b"GET", b"/get_server_info", ASK_TIMEOUT_S)
        if answer.status >= 500:
            raise ValueError(f"/get_server_info answered {answer.status}")
        if answer.status != 200:
            return None
        info = msgspec.json.decode(answer.body)
        try:
            return source_of(info, worker)
        except ValueError as error:
            log.warning("kv events: worker=%s: its kv_events_config cannot be used: %s", worker.url, error)
            return None


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


async def _unless(event: asyncio.Event, work: Coroutine[None, None, None]) -> None:
    """Do `work`, but stop when `event` is set."""
    tasks = {asyncio.create_task(work), asyncio.create_task(event.wait())}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in done:
        task.result()


class _Told(msgspec.Struct):
    """A worker's `kv_events_config`; keys that later versions may have are none of our business."""

    publisher: str = "null"
    topic: str = ""
    endpoint: str | None = None
    replay_endpoint: str | None = None


def source_of(info: Any, worker: Worker) -> KvSource | None:
    """What `/get_server_info` says of KV events. Raises ValueError for what cannot be followed."""
    text = info.get("kv_events_config") if isinstance(info, dict) else None
    if not isinstance(text, str) or not text:
        return None
    told = msgspec.json.decode(text, type=_Told)
    if told.publisher != "zmq":
        return None
    if info.get("dp_size") not in (None, 1):
        raise ValueError(
            f"its {info['dp_size']} data-parallel engines have a cache each, and these are not followed; what was sent to it counts as cached"
        )
    host = worker.bootstrap_host
    replay = None if told.replay_endpoint is None else _dialled(told.replay_endpoint, host)
    return KvSource(_dialled(told.endpoint, host), replay, told.topic)


def _dialled(endpoint: str | None, host: str) -> str:
    """Where the router reaches what the worker at `host` listens on."""
    if endpoint is None:
        return endpoint_of(None, host.strip("[]"))
    name, port = split_endpoint(endpoint)
    return f"tcp://{host if name in WILDCARD_HOSTS else name}:{port}"


class Feed:
    """What is known of one worker's events."""

    def __init__(self, url: str, policy: CacheAware) -> None:
        self._url = url
        self._policy = policy
        self._next_seq: int | None = None
        """Of the batch that continues what was applied; None: nothing was."""
        self._last_live = -1
        """Of the last batch that came by itself, not by replay."""
        self.counters = {"batches": 0, "gaps": 0, "unreadable": 0}

    @property
    def num_blocks(self) -> int:
        return self._policy.index.num_blocks(self._url) if self._url in self._policy.index else 0

    async def run(self, context: zmq.asyncio.Context, source: KvSource) -> None:
        """Listen until cancelled. Raises OSError or `zmq.ZMQError` for an endpoint that cannot be used."""
        socket = context.socket(zmq.SUB)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        try:
            for option, value in (
                (zmq.LINGER, 0), (zmq.RCVHWM, QUEUED_BATCHES), (zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES),
                (zmq.RECONNECT_IVL, 100), (zmq.RECONNECT_IVL_MAX, 2000), (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
                (zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS),
            ):  # fmt: skip
                socket.set(option, value)
            socket.subscribe(source.topic)
            await _connect(socket, source.endpoint)
            poller = zmq.asyncio.Poller()
            poller.register(socket, zmq.POLLIN)
            poller.register(monitor, zmq.POLLIN)
            while True:
                ready = dict(await poller.poll(POLL_MS))
                # What happened to the connection comes first: a message may be the first of a new process.
                if monitor in ready:
                    event = await recv_monitor_message(monitor)
                    if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                        await self._begin(context, source)
                    else:
                        self._lose()
                elif socket in ready:
                    await self._on_message(context, source, await socket.recv_multipart())
        finally:
            self._lose()
            socket.disable_monitor()
            monitor.close(0)
            socket.close(0)

    async def _begin(self, context: zmq.asyncio.Context, source: KvSource) -> None:
        self._policy.index.add(self._url)
        self._policy.partly_known.add(self._url)
        self._next_seq, self._last_live = None, -1
        await self._catch_up(context, source, 0)
        log.info(
            "kv events are heard worker=%s endpoint=%s from_the_first=%s blocks=%d",
            self._url, source.endpoint, self._url not in self._policy.partly_known, self.num_blocks,
        )  # fmt: skip

    def _lose(self) -> None:
        """The connection ended: the worker may come back as a new process, with nothing."""
        if self._url in self._policy.index:
            log.info("kv events are lost worker=%s", self._url)
            self._policy.index.remove(self._url)
            self._policy.tree.remove(self._url)
        self._policy.partly_known.discard(self._url)

    async def _on_message(self, context: zmq.asyncio.Context, source: KvSource, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != SEQ_BYTES or self._url not in self._policy.index:
            self.counters["unreadable"] += 1
            return
        seq, payload = int.from_bytes(frames[1], "big"), frames[2]
        if seq <= self._last_live:  # a new process behind the same connection (a proxy)
            self._start_at(0)
        self._last_live = seq
        if self._next_seq is not None and seq > self._next_seq:
            self.counters["gaps"] += 1
            await self._catch_up(context, source, self._next_seq)
        if self._next_seq is None or seq > self._next_seq:
            self._start_at(seq)
        if seq == self._next_seq:  # below it: the replay had it
            self._apply(seq, payload)

    async def _catch_up(self, context: zmq.asyncio.Context, source: KvSource, start: int) -> None:
        """Apply what was missed from batch `start` on, where the worker keeps it."""
        if source.replay_endpoint is None:
            return
        try:
            batches = await ask_replay(context, source.replay_endpoint, start)
        except (OSError, TimeoutError, ValueError, zmq.ZMQError) as error:
            log.warning("kv events: no replay worker=%s reason=%r", self._url, str(error) or "no answer in time")
            return
        if start == 0 and not batches:  # it has never had anything
            self._start_at(0)
        for seq, payload in batches:
            if seq != self._next_seq:
                self._start_at(seq)
            self._apply(seq, payload)

    def _start_at(self, seq: int) -> None:
        """Batch `seq` is the next; what was before it is not known, unless nothing was."""
        self._policy.index.clear(self._url)
        self._next_seq = seq
        if seq == 0:
            self._policy.partly_known.discard(self._url)
        else:
            self._policy.partly_known.add(self._url)

    def _apply(self, seq: int, payload: bytes) -> None:
        self.counters["batches"] += 1
        try:
            for event in decode_batch(payload).events:
                if isinstance(event, AllBlocksCleared):
                    self._policy.tree.remove(self._url)
                self._policy.index.apply(self._url, event)
            self._next_seq = seq + 1
        except (ValueError, OverflowError) as error:  # it may have told of blocks that are gone
            self.counters["unreadable"] += 1
            if self.counters["unreadable"] == 1:
                log.warning("kv events: unreadable (said once) worker=%s reason=%r", self._url, str(error)[:300])
            self._start_at(seq + 1)


async def _connect(socket: zmq.asyncio.Socket, endpoint: str) -> None:
    """Names are looked up here, as for HTTP: libzmq would prefer an IPv6 address that nobody listens on. Raises OSError."""
    host, port = split_endpoint(endpoint)
    async with asyncio.timeout(ASK_TIMEOUT_S):
        found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=SOCK_STREAM)
    family, *_, address = min(found, key=lambda one: one[0] != AF_INET)
    socket.set(zmq.IPV6, int(family == AF_INET6))
    socket.connect(f"tcp://[{address[0]}]:{port}" if family == AF_INET6 else f"tcp://{address[0]}:{port}")


async def ask_replay(context: zmq.asyncio.Context, endpoint: str, start: int) -> list[tuple[int, bytes]]:
    """(sequence number, payload) of the batches that the worker still has from `start` on. Raises TimeoutError; ValueError for
    an answer that is none; OSError or `zmq.ZMQError` for an endpoint that cannot be used."""
    batches: list[tuple[int, bytes]] = []
    socket = context.socket(zmq.DEALER)
    try:
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RCVHWM, QUEUED_BATCHES)
        socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        await _connect(socket, endpoint)
        await socket.send_multipart([b"", start.to_bytes(SEQ_BYTES, "big")])
        while True:
            async with asyncio.timeout(REPLAY_TIMEOUT_S):
                frames = await socket.recv_multipart()
            if len(frames) != 3 or len(frames[1]) != SEQ_BYTES:
                raise ValueError("a replay's batch must be a sequence number and a payload")
            if frames[1] == END_SEQ:
                return batches
            batches.append((int.from_bytes(frames[1], "big"), frames[2]))
    finally:
        socket.close(0)
