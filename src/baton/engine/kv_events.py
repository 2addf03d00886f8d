"""Publishes a rank's KV events: `publish` numbers and encodes a batch, a thread of its own sends it and serves replays.

The rank's loop never waits for a subscriber: a batch that finds the thread's queue full is dropped, and since its number is
used up, subscribers see a gap and ask for a replay or start afresh. Neighbours: `protocol.kv_events` (messages),
`kvcache.keyed_cache` (where events come from). Not here: which pages there are.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import zmq

from baton.engine.args import EngineArgs
from baton.kvcache.keyed_cache import Cleared, KeyedCache, KvEvent, Removed, Stored
from baton.kvcache.page_keys import key_as_int64
from baton.kvcache.prefix_cache import PrefixCache
from baton.protocol.errors import BatonError
from baton.protocol.kv_events import (
    END_SEQ,
    SEQ_BYTES,
    WILDCARD_HOSTS,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    EventBatch,
    KvEventsConfig,
    encode_batch,
    endpoint_of,
    split_endpoint,
)
from baton.protocol.pod import listen_host

logger = logging.getLogger(__name__)

JOIN_S = 2.0
REPLAY_SEND_S = 1.0
"""How long one slow asker of a replay may hold up the thread."""


class KvEventsError(BatonError):
    """The endpoint of --kv-events-config cannot be used."""


class KvEventPublisher:
    """One rank's publisher. Any thread may call `publish`, one at a time. Raises `KvEventsError` when it cannot bind."""

    def __init__(self, config: KvEventsConfig, host: str, page_size: int, dp_rank: int = 0) -> None:
        self._page_size = page_size
        self._dp_rank = dp_rank
        self._topic = config.topic.encode()
        self._next_seq = 0
        self.num_dropped = 0
        """Batches lost here because the thread could not keep up."""
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        """(sequence number, payload) of the last batches; the thread's."""
        self._context = zmq.Context()
        try:
            self._pub = self._context.socket(zmq.PUB)
            self._pub.set_hwm(config.hwm)
            self.endpoint = _open(self._pub, endpoint_of(config.endpoint, host, dp_rank), "endpoint", host)
            self._replay: zmq.Socket[bytes] | None = None
            self.replay_endpoint: str | None = None
            if config.replay_endpoint is not None:
                self._replay = self._context.socket(zmq.ROUTER)
                self._replay.set(zmq.SNDTIMEO, int(REPLAY_SEND_S * 1000))
                self._replay.set(zmq.ROUTER_MANDATORY, 1)
                wanted = endpoint_of(config.replay_endpoint, host, dp_rank)
                self.replay_endpoint = _open(self._replay, wanted, "replay_endpoint", host, always_binds=True)
            self._from_rank = self._context.socket(zmq.PULL)
            self._from_rank.set(zmq.RCVHWM, config.max_queue_size)
            self._from_rank.bind("inproc://batches")
            self._to_thread = self._context.socket(zmq.PUSH)
            self._to_thread.set(zmq.SNDHWM, config.max_queue_size)
            self._to_thread.connect("inproc://batches")
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()
        logger.info("kv events endpoint=%s replay=%s", self.endpoint, self.replay_endpoint)

    def publish(self, events: Sequence[KvEvent]) -> None:
        """What changed in one step (nothing: no batch). Never waits."""
        if not events:
            return
        wire = [_wire_event(event, self._page_size) for event in events]
        payload = encode_batch(EventBatch(time.time(), wire, self._dp_rank))
        seq, self._next_seq = self._next_seq, self._next_seq + 1
        try:
            self._to_thread.send_multipart((seq.to_bytes(SEQ_BYTES, "big"), payload), zmq.NOBLOCK)
        except zmq.Again:
            self.num_dropped += 1
            if self.num_dropped == 1:
                logger.warning("kv events are dropped: the publishing thread does not keep up (said once)")

    def close(self) -> None:
        """Send what is queued, for `JOIN_S` at most, and end the thread."""
        self._to_thread.set(zmq.SNDTIMEO, int(JOIN_S * 1000))
        try:
            self._to_thread.send(b"")
        except zmq.Again:
            logger.warning("kv events: the publishing thread hangs; what it holds is lost")
        self._thread.join(JOIN_S)
        self._context.destroy(linger=200)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._from_rank, zmq.POLLIN)
        if self._replay is not None:
            poller.register(self._replay, zmq.POLLIN)
        while True:
            try:
                ready = dict(poller.poll())
                if self._from_rank in ready and not self._send_queued():
                    return
                if self._replay is not None and self._replay in ready:
                    self._serve_replay(self._replay)
            except zmq.ContextTerminated:
                return
            except zmq.ZMQError as error:  # one peer's trouble: the others still want their events
                logger.warning("kv events: %s", error)

    def _send_queued(self) -> bool:
        """False: the publisher is closing."""
        while True:
            try:
                frames = self._from_rank.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            if len(frames) == 1:
                return False
            seq, payload = frames
            self._kept.append((seq, payload))
            self._pub.send_multipart((self._topic, seq, payload))

    def _serve_replay(self, socket: "zmq.Socket[bytes]") -> None:
        frames = socket.recv_multipart(zmq.NOBLOCK)
        if len(frames) != 3 or len(frames[2]) != SEQ_BYTES:
            logger.warning("kv events: a replay request must be %d bytes of a sequence number", SEQ_BYTES)
            return
        asker, _, start = frames
        for seq, payload in self._kept:
            if seq >= start:  # big endian: bytes compare as numbers
                socket.send_multipart((asker, b"", seq, payload))
        socket.send_multipart((asker, b"", END_SEQ, b""))


def open_kv_events(args: EngineArgs, cache: PrefixCache, page_size: int) -> Callable[[], None] | None:
    """What publishes the cache's changes since the last call; None: nobody asked for them. Raises `KvEventsError`."""
    config = args.kv_events
    if config is None or not isinstance(cache, KeyedCache):
        return None
    publisher = KvEventPublisher(config, listen_host(args.host), page_size, args.dp_rank)
    return lambda: publisher.publish(cache.take_kv_events())


def _wire_event(event: KvEvent, page_size: int) -> Event:
    match event:
        case Stored(keys, parent_key, token_ids, extra_key):
            # As vLLM tells a cache_salt: with the first block, since the others descend from it.
            tells_extra = extra_key is not None and parent_key is None
            return BlockStored(
                [key_as_int64(key) for key in keys],
                None if parent_key is None else key_as_int64(parent_key),
                token_ids,
                page_size,
                extra_keys=[[extra_key], *[None] * (len(keys) - 1)] if tells_extra else None,
            )
        case Removed(keys):
            return BlockRemoved([key_as_int64(key) for key in keys])
        case Cleared():
            return AllBlocksCleared()


def _open(socket: "zmq.Socket[bytes]", endpoint: str, key: str, host: str, *, always_binds: bool = False) -> str:
    """Bind to an address of this worker, connect to any other (vLLM's and SGLang's rule for collectors). The endpoint in use."""
    address, port = split_endpoint(endpoint)
    if address in WILDCARD_HOSTS:
        endpoint = f"tcp://{listen_host('0.0.0.0')}:{port}"
    binds = always_binds or address in WILDCARD_HOSTS or address.strip("[]") == host
    if ":" in address:
        socket.set(zmq.IPV6, 1)
    try:
        if binds:
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise KvEventsError(f"--kv-events-config: {key} {endpoint}: {error}") from None
    return endpoint
