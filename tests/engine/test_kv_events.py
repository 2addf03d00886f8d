"""KV events on the wire: the very bytes that vLLM and SGLang publish, and a publisher that never waits and can replay."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import msgspec
import pytest
import zmq
from tests.fakes.ports import free_port

from baton.engine.kv_events import KvEventPublisher, KvEventsError
from baton.kvcache.keyed_cache import Cleared, Removed, Stored
from baton.kvcache.page_keys import PageKeys, key_as_int64
from baton.protocol.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventBatch,
    KvEventsConfig,
    decode_batch,
    encode_batch,
    endpoint_of,
    parse_kv_events_config,
)

WAIT_MS = 10_000
KEYS = [bytes([n]) * 32 for n in range(4)]
# Written by hand from the msgpack specification and SGLang 0.5.6's field order:
# [1.5, [["BlockStored", [1, -2], None, [1, 2, 3, 4], 2, None], ["BlockRemoved", [2**40]], ["AllBlocksCleared"]], 0]
WIRE = (
    b"\x93" b"\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00" b"\x93"
    b"\x96" b"\xabBlockStored" b"\x92\x01\xfe" b"\xc0" b"\x94\x01\x02\x03\x04" b"\x02" b"\xc0"
    b"\x92" b"\xacBlockRemoved" b"\x91\xcf\x00\x00\x01\x00\x00\x00\x00\x00"
    b"\x91" b"\xb0AllBlocksCleared"
    b"\x00"
)  # fmt: skip
BATCH = EventBatch(
    1.5, [BlockStored([1, -2], None, [1, 2, 3, 4], 2), BlockRemoved([2**40]), AllBlocksCleared()], attn_dp_rank=0
)


@contextmanager
def publisher(page_size: int = 2, **settings: object) -> Iterator[KvEventPublisher]:
    settings = {"endpoint": f"tcp://127.0.0.1:{free_port()}", **settings}
    with closing(KvEventPublisher(KvEventsConfig("zmq", **settings), "127.0.0.1", page_size)) as found:  # type: ignore[arg-type]
        yield found


@contextmanager
def subscriber(endpoint: str, kind: int = zmq.SUB, topic: str = "") -> Iterator["zmq.Socket[bytes]"]:
    with zmq.Context() as context, context.socket(kind) as found:
        found.set(zmq.LINGER, 0)
        found.set(zmq.RCVTIMEO, WAIT_MS)
        if kind == zmq.SUB:
            found.subscribe(topic)
        found.connect(endpoint)
        yield found


def replay(endpoint: str, start: int) -> list[tuple[int, EventBatch]]:
    with subscriber(endpoint, zmq.DEALER) as asker:
        asker.send_multipart([b"", start.to_bytes(8, "big")])
        found: list[tuple[int, EventBatch]] = []
        while True:
            _, seq, payload = asker.recv_multipart()
            if seq == b"\xff" * 8:
                assert payload == b""
                return found
            found.append((int.from_bytes(seq, "big"), decode_batch(payload)))


def test_the_bytes_are_sglangs_and_vllms():
    assert encode_batch(BATCH) == WIRE
    assert decode_batch(WIRE) == BATCH


def test_fields_that_later_versions_added_are_read_and_unknown_ones_skipped():
    row = ["BlockStored", [7], 5, [1, 2], 2, None, "CPU_PINNED", "lora", [["salt"]], 0, "sliding", 128, "new"]
    (event,) = decode_batch(msgspec.msgpack.encode([1.0, [row], 3, "new"])).events
    assert event == BlockStored([7], 5, [1, 2], 2, None, "CPU_PINNED", "lora", [["salt"]], 0)


def test_the_maps_of_later_vllm_are_read():
    stored = {"type": "BlockStored", "block_hashes": [b"\x01" * 32], "parent_block_hash": None, "token_ids": [1, 2],
              "block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": None, "kv_cache_spec_kind": "full"}  # fmt: skip
    removed = {"type": "BlockRemoved", "block_hashes": [b"\x01" * 32], "medium": "GPU"}
    batch = decode_batch(msgspec.msgpack.encode({"ts": 2.0, "events": [stored, removed, {"type": "AllBlocksCleared"}]}))
    assert batch.events == [
        BlockStored([b"\x01" * 32], None, [1, 2], 2, None, "GPU"), BlockRemoved([b"\x01" * 32], "GPU"), AllBlocksCleared(),
    ]  # fmt: skip


@pytest.mark.parametrize("payload", [b"", b"\x93", b"junk", b"\xc1", b"\x90", b"\x80", WIRE[:-1], b"\xff" * 9])
def test_what_is_no_batch_is_a_value_error(payload):
    with pytest.raises(ValueError):
        decode_batch(payload)


def test_a_subscriber_gets_what_the_cache_tells_with_its_blocks_named_by_their_keys():
    keys = PageKeys("model", "bfloat16", 2)
    chain = keys.extend(keys.root("tenant"), [1, 2, 3, 4])
    with publisher(topic="kv", replay_endpoint=f"tcp://127.0.0.1:{free_port()}") as found:
        with subscriber(found.endpoint, topic="kv") as listener:
            seen: list[bytes] = []
            while not seen:  # until the subscription has arrived
                found.publish([Stored(chain, None, [1, 2, 3, 4], "tenant")])
                if listener.poll(20):
                    seen = listener.recv_multipart()
            assert seen[0] == b"kv"
            assert len(seen[1]) == 8
        found.publish([Stored([KEYS[1]], KEYS[0], [5, 6], "tenant"), Removed([KEYS[1]]), Cleared()])
        batches = [batch for _, batch in replay(found.replay_endpoint, 0)]
    hashes = [key_as_int64(key) for key in chain]
    assert batches[0].events == [BlockStored(hashes, None, [1, 2, 3, 4], 2, extra_keys=[["tenant"], None])]
    ours, parent = key_as_int64(KEYS[1]), key_as_int64(KEYS[0])
    assert batches[-1].events == [BlockStored([ours], parent, [5, 6], 2), BlockRemoved([ours]), AllBlocksCleared()]
    assert batches[0].attn_dp_rank == 0


def test_replay_gives_the_kept_batches_from_the_asked_one_on():
    with publisher(replay_endpoint=f"tcp://127.0.0.1:{free_port()}", buffer_steps=4) as found:
        for number in range(6):
            found.publish([Stored([KEYS[0]], None, [number, number], None)])
        found.publish([])  # nothing changed: no batch
        while len(replay(found.replay_endpoint, 0)) < 4:
            pass
        assert [seq for seq, _ in replay(found.replay_endpoint, 0)] == [2, 3, 4, 5]
        assert [batch.events[0].token_ids[0] for _, batch in replay(found.replay_endpoint, 4)] == [4, 5]
        assert replay(found.replay_endpoint, 6) == []


def test_a_replay_request_that_is_none_does_not_stop_the_publisher():
    with publisher(replay_endpoint=f"tcp://127.0.0.1:{free_port()}") as found:
        with subscriber(found.replay_endpoint, zmq.DEALER) as asker:
            asker.send_multipart([b"", b"short"])
            asker.send_multipart([b"alone"])
        found.publish([Cleared()])
        while not replay(found.replay_endpoint, 0):
            pass


def test_a_full_queue_drops_batches_and_leaves_a_gap_instead_of_waiting(monkeypatch):
    monkeypatch.setattr(KvEventPublisher, "_run", lambda self: self._from_rank.poll(WAIT_MS))  # a thread that hangs
    monkeypatch.setattr("baton.engine.kv_events.JOIN_S", 0.05)
    with publisher(max_queue_size=2) as found:
        for _ in range(50):
            found.publish([Cleared()])
        assert found.num_dropped >= 40


def test_an_endpoint_in_use_is_an_error_that_names_flag_and_key():
    with (
        publisher() as found,
        pytest.raises(KvEventsError, match=r"--kv-events-config: endpoint tcp://127.0.0.1:\d+: "),
    ):
        KvEventPublisher(KvEventsConfig("zmq", endpoint=found.endpoint), "127.0.0.1", 2)


def test_the_default_endpoint_is_the_workers_own_address_and_ranks_count_up():
    assert endpoint_of(None, "127.0.0.7") == "tcp://127.0.0.7:5557"
    assert endpoint_of(None, "::1", 2) == "tcp://[::1]:5559"
    assert endpoint_of("tcp://*:6000", "127.0.0.7", 3) == "tcp://*:6003"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nonsense", "must be a JSON object"),
        ("[]", "must be a JSON object"),
        ('{"publisher":"kafka"}', "publisher must be zmq or null, got 'kafka'"),
        ('{"publisher":"zmq","endpont":"tcp://*:1"}', "unknown key 'endpont'"),
        ('{"publisher":"zmq","hwm":"many"}', r"\$\.hwm"),
        ('{"publisher":"zmq","buffer_steps":0}', "buffer_steps must be at least 1"),
        ('{"publisher":"zmq","endpoint":"udp://*:1"}', "endpoint: must be tcp://HOST:PORT"),
        ('{"publisher":"zmq","replay_endpoint":"tcp://*:99999"}', "replay_endpoint: '99999' is no port"),
    ],
)
def test_a_bad_config_names_its_key(text, problem):
    with pytest.raises(ValueError, match=problem):
        parse_kv_events_config(text)


def test_sglangs_config_is_understood():
    config = parse_kv_events_config(
        '{"publisher":"zmq","topic":"","endpoint":"tcp://*:5557","buffer_steps":100,"hwm":9}'
    )
    assert (config.is_on, config.endpoint, config.buffer_steps, config.hwm) == (True, "tcp://*:5557", 100, 9)
    assert not parse_kv_events_config("{}").is_on
