"""The Mooncake store against a real master and store on loopback, and its configuration."""

import contextlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.fakes.mooncake_service import MooncakeService, needs_mooncake, until
from tests.fakes.store_conformance import CHECKS, OBJECT_BYTES, MakeStore

from baton.kvcache.stores.base import StoreConfig, StoreError
from baton.kvcache.stores.loopback import loopback_only, open_listeners
from baton.kvcache.stores.mooncake import MooncakeStore
from baton.kvcache.stores.mooncake_config import read_config

NUM_OBJECTS = 4


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MooncakeService]:
    one = MooncakeService(tmp_path_factory.mktemp("mooncake"))
    try:
        one.start_master()
        one.start_store()
        yield one
    finally:
        one.close()


@pytest.fixture(scope="module")
def store(service: MooncakeService) -> Iterator[MooncakeStore]:
    one = open_store(service)
    yield one
    one.close()


def open_store(service: MooncakeService, **extra: Any) -> MooncakeStore:
    return MooncakeStore(
        StoreConfig(object_bytes=OBJECT_BYTES, extra={"master_server_address": service.address, **extra})
    )


def objects(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (NUM_OBJECTS, OBJECT_BYTES), dtype=np.uint8)


class KeptOpen:
    """A store for one check: connecting and closing take a second each, so all checks use one client."""

    def __init__(self, store: MooncakeStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def close(self) -> None: ...


@needs_mooncake
@pytest.mark.parametrize("check", CHECKS)
def test_it_is_a_store(check: Callable[[MakeStore], None], store: MooncakeStore) -> None:
    store.clear()
    check(lambda: KeptOpen(store))


@needs_mooncake
def test_a_discarded_object_can_be_put_again(store: MooncakeStore) -> None:
    memory = objects(1)
    written = memory.copy()
    store.register(memory)
    assert store.batch_put(["a", "a"], [memory[0], memory[1]]) == [True, True]
    store.discard(["a", "absent"])
    assert store.batch_exists(["a"]) == 0
    assert store.batch_put(["a"], [memory[2]]) == [True]
    assert store.batch_get(["a"], [memory[0]]) == [True]
    assert (memory[0] == written[2]).all()
    assert store.batch_get([], []) == store.batch_put([], []) == []


@needs_mooncake
def test_clear_forgets_our_objects_and_those_of_nobody_else(service: MooncakeService, store: MooncakeStore) -> None:
    theirs = open_store(service, extra_backend_tag="other")
    memory = objects(3)
    store.register(memory)
    try:
        assert store.batch_put(["a"], [memory[0]]) == theirs.batch_put(["a"], [memory[1]]) == [True]
        store.clear()
        assert store.batch_exists(["a"]) == 0
        assert theirs.batch_exists(["a"]) == 1, "another tag is another store"
    finally:
        theirs.close()


@needs_mooncake
def test_a_store_whose_master_comes_later_is_used_then(tmp_path: Path) -> None:
    service = MooncakeService(tmp_path)
    memory = objects(5)
    with pytest.raises(StoreError, match="no master at"):
        open_store(service, check_server=True)
    store = open_store(service)
    store.register(memory)
    try:
        with pytest.raises(StoreError, match="no master at"):
            store.batch_exists(["a"])
        assert store.stats()["connected"] == 0
        service.start_master()
        service.start_store()
        until(lambda: store.batch_put(["a"], [memory[0]]) == [True], "a service that has just started takes an object")
        assert store.stats()["connected"] == 1
    finally:
        store.close()
        service.close()


@needs_mooncake
def test_the_client_hears_only_this_machine(service: MooncakeService) -> None:
    before = open_listeners()
    store = open_store(service)
    try:
        opened = open_listeners() - before
        assert opened, "what this test is about"
        for descriptor in opened:
            hears_only_this_machine(descriptor)
    finally:
        store.close()


def test_a_filtered_listener_hears_only_this_machine() -> None:
    for family, wildcard in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        with socket.socket(family) as listener:
            listener.bind((wildcard, 0))
            listener.listen()
            assert listener.fileno() in open_listeners()
            loopback_only(listener.fileno())
            hears_only_this_machine(listener.fileno())


def hears_only_this_machine(descriptor: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as one:
        port = int(one.getsockname()[1])
        targets = ["127.0.0.1", "127.3.4.5", *(["::1"] if one.family == socket.AF_INET6 else [])]
    for target in targets:
        socket.create_connection((target, port), 5).close()
    address = own_address()
    if address is not None:
        with pytest.raises(TimeoutError):
            socket.create_connection((address, port), 0.2).close()


def own_address() -> str | None:
    """An address of this machine that is not loopback; no packet is sent to find it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect(("192.0.2.1", 9))
        return str(one.getsockname()[0])
    return None


def test_the_first_source_that_names_a_master_wins(tmp_path: Path) -> None:
    file = tmp_path / "mooncake.json"
    file.write_text(json.dumps({"master_server_address": "file:1", "global_segment_size": "4gb"}))
    environ = {"MOONCAKE_MASTER": "environment:1", "MOONCAKE_PROTOCOL": "rdma", "MOONCAKE_LOCAL_HOSTNAME": "10.0.0.1"}
    with_file = {**environ, "SGLANG_HICACHE_MOONCAKE_CONFIG_PATH": str(file)}
    extra = {"master_server_address": "extra:1", "global_segment_size": 4096}

    found = read_config(extra, 4, with_file)
    assert (found.master_server_address, found.global_segment_size, found.protocol) == ("extra:1", 1024, "tcp")
    found = read_config({}, 4, with_file)
    assert (found.master_server_address, found.global_segment_size, found.protocol) == ("file:1", 1 << 30, "tcp")
    found = read_config({"extra_backend_tag": "blue"}, 1, environ)
    assert (found.master_server_address, found.protocol, found.local_hostname) == ("environment:1", "rdma", "10.0.0.1")
    assert found.extra_backend_tag == "blue", "a key of ours beside a source that names the master"
    assert found.global_segment_size == 0


@pytest.mark.parametrize(
    ("extra", "environ", "words"),
    [
        ({}, {}, "MOONCAKE_MASTER"),
        ({"master_server_address": "a:1", "segment": 1}, {}, "unknown key 'segment'"),
        ({"master_server_address": "a"}, {}, "master_server_address wants host:port"),
        ({"master_server_address": "a:1", "global_segment_size": "4 apples"}, {}, "global_segment_size is '4 apples'"),
        ({}, {"MOONCAKE_MASTER": "a:1", "MOONCAKE_CHECK_SERVER": "perhaps"}, "check_server is 'perhaps'"),
        ({}, {"SGLANG_HICACHE_MOONCAKE_CONFIG_PATH": "/no/such.json"}, "/no/such.json"),
    ],
)
def test_a_bad_configuration_is_named(extra: dict[str, Any], environ: dict[str, str], words: str) -> None:
    with pytest.raises(StoreError, match=re.escape(words)):
        read_config(extra, 1, environ)


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ("libibverbs.so.1: cannot open shared object file: No such file or directory", "apt-get install libibverbs1"),
        ("No module named 'mooncake'", "mooncake-transfer-engine-non-cuda"),
    ],
)
def test_a_missing_package_is_named(problem: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> None:
        raise ImportError(problem)

    monkeypatch.setattr("baton.kvcache.stores.mooncake.importlib.import_module", refuse)
    with pytest.raises(StoreError, match=re.escape(words)):
        MooncakeStore(StoreConfig(object_bytes=8, extra={"master_server_address": "127.0.0.1:1"}))
