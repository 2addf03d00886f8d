"""KV events: what a worker tells of its prefix cache, in the messages that vLLM and SGLang publish over ZeroMQ.

A PUB socket sends three frames: topic, sequence number (8 bytes, big endian), a msgpack `EventBatch`. A ROUTER socket, where
there is one, answers 8 bytes of a sequence number with the batches kept from there on, and ends with `END_SEQ`. Structs are
arrays (SGLang, vLLM up to 0.11); `decode_batch` also reads the maps of later vLLM. Neighbours: `engine.kv_events` publishes,
`router.kv_feed` listens. Not here: sockets.
"""

from typing import Any

import msgspec

DEFAULT_PORT = 5557
END_SEQ = b"\xff" * 8
"""Sequence number -1: the end of a replay; its payload is empty."""
SEQ_BYTES = 8
MAX_SEQ = 2**63 - 1
WILDCARD_HOSTS = frozenset(("*", "0.0.0.0", "[::]"))

BlockHash = int | bytes
"""A signed 64-bit number (SGLang, older vLLM, ours) or bytes (later vLLM)."""


class KvEvent(msgspec.Struct, array_like=True, tag=True, gc=False):
    """The first element of each event is its class's name."""


class BlockStored(KvEvent):
    """Blocks that can be reused from now on, each following the one before it, the first following `parent_block_hash`."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    """None: the first block is the start of a sequence."""
    token_ids: list[int]
    """Of all blocks, one after another."""
    block_size: int
    """Tokens."""
    lora_id: int | None = None
    medium: str | None = None
    """Which tier: "GPU", "CPU_PINNED", ...; None: not told, the device."""
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    """One entry a block: what beside tokens the block belongs to (cache_salt, LoRA name, images)."""
    group_idx: int | None = None
    """vLLM: which group of layers of a hybrid model."""


class BlockRemoved(KvEvent):
    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(KvEvent):
    """The cache is empty."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True, gc=False):
    """What one step changed. `ts`: Unix time in seconds."""

    ts: float
    events: list[Event]
    attn_dp_rank: int | None = None


class _Stored(msgspec.Struct, tag="BlockStored"):
    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class _MapBatch(msgspec.Struct):
    ts: float
    events: list[_Stored | _Removed | _Cleared]
    data_parallel_rank: int | None = None


_decode_arrays = msgspec.msgpack.Decoder(EventBatch).decode
_decode_maps = msgspec.msgpack.Decoder(_MapBatch).decode
_encode = msgspec.msgpack.Encoder().encode
_NUM_FIELDS = {BlockStored: 5, BlockRemoved: 1, AllBlocksCleared: 0}
"""Fields that every publisher sends. Later ones were added at the end over time, and are sent where they say something."""


def encode_batch(batch: EventBatch) -> bytes:
    """The bytes that SGLang 0.5.6 sends for the same events."""
    rows: list[list[Any]] = []
    for event in batch.events:
        row = [type(event).__name__, *msgspec.structs.astuple(event)]
        while row[-1] is None and len(row) > 1 + _NUM_FIELDS[type(event)]:
            row.pop()
        rows.append(row)
    return _encode((batch.ts, rows, batch.attn_dp_rank))


def decode_batch(payload: bytes) -> EventBatch:
    """Raises `msgspec.DecodeError` (also a `ValueError`) for anything that is not a batch."""
    first = payload[:1]
    if first < b"\x80" or (b"\x90" <= first < b"\xde"):  # a fixarray, as every batch of arrays is
        return _decode_arrays(payload)
    maps = _decode_maps(payload)
    events: list[Event] = []
    for event in maps.events:
        values = msgspec.structs.astuple(event)
        kind = {_Stored: BlockStored, _Removed: BlockRemoved, _Cleared: AllBlocksCleared}[type(event)]
        events.append(kind(*values))
    return EventBatch(maps.ts, events, maps.data_parallel_rank)


class KvEventsConfig(msgspec.Struct, frozen=True):
    """The value of `--kv-events-config`; names and defaults are SGLang's and vLLM's, except for `endpoint`'s host."""

    publisher: str = "null"
    """"zmq", or "null": no events."""
    topic: str = ""
    endpoint: str | None = None
    """None: port 5557 of the worker's own --host."""
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    """Batches kept for replay."""
    hwm: int = 100_000
    """Batches kept for a subscriber that is slow."""
    max_queue_size: int = 100_000
    """Batches kept for the publishing thread."""

    @property
    def is_on(self) -> bool:
        return self.publisher != "null"


def parse_kv_events_config(text: str) -> KvEventsConfig:
    """Raises ValueError naming the key that is wrong. Keys that nobody knows are wrong too."""
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError as error:
        raise ValueError(f"must be a JSON object: {error}") from None
    if unknown := sorted(set(raw) - set(KvEventsConfig.__struct_fields__)):
        raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(KvEventsConfig.__struct_fields__)}")
    try:
        config = msgspec.json.decode(text, type=KvEventsConfig)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    if config.publisher not in ("zmq", "null"):
        raise ValueError(f"publisher must be zmq or null, got {config.publisher!r}")
    for name in ("buffer_steps", "hwm", "max_queue_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    for name in ("endpoint", "replay_endpoint"):
        if (endpoint := getattr(config, name)) is not None:
            try:
                split_endpoint(endpoint)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return config


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """(host, port) of `tcp://host:port`; an IPv6 host keeps its brackets. Raises ValueError."""
    host, colon, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not colon or not host:
        raise ValueError(f"must be tcp://HOST:PORT, got {endpoint!r}")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{port!r} is no port, in {endpoint!r}")
    return host, int(port)


def endpoint_of(given: str | None, host: str, dp_rank: int = 0) -> str:
    """The endpoint of one data-parallel rank: ports are counted up from the given one. `host` stands where none is given."""
    name, port = split_endpoint(given) if given is not None else (f"[{host}]" if ":" in host else host, DEFAULT_PORT)
    if port + dp_rank > 65535:
        raise ValueError(f"port {port} plus data-parallel rank {dp_rank} is no port")
    return f"tcp://{name}:{port + dp_rank}"
