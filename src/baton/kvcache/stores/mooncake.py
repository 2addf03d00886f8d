"""Mooncake as a store: the real client, without a copy of the bytes.

Owns one client of a Mooncake cluster (master and stores are services of their own): when it connects, which answers mean
"not there" and which "not well", and that it waits no longer than it must. Not here: where the configuration comes from
(`mooncake_config`), what the bytes are (`seal`, `objects`), time-outs and the breaker around every call (`worker`).

Seen of client 0.3.13, which this file is built around: its set-up tries for 90 s when there is no master, and calls on a client
whose set-up failed crash the process, so a set-up is tried only when the master's port answers and a failed client is dropped. A
dead master costs 4.3 s a call, hence the same look at the port after each failure. A restarted master or store is found again by
the client itself. It listens on all addresses, whatever it is told: see `loopback`.
"""

import importlib
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton.kvcache.stores.base import Object, StoreConfig, StoreError
from baton.kvcache.stores.loopback import loopback_only, open_listeners
from baton.kvcache.stores.mooncake_config import MooncakeConfig, read_config

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 0.5
"""For the master's port to accept a connection."""
_ABSENT = frozenset({-704, -703, -707})
"""OBJECT_NOT_FOUND, REPLICA_IS_NOT_READY (being written), LEASE_EXPIRED (evicted while it was read)."""
_REFUSED = frozenset({-200, -600})
"""NO_AVAILABLE_HANDLE (full: nothing can be evicted now), INVALID_PARAMS (the object that is there is larger)."""
_CLIENT_ENVIRONMENT = {
    "MC_STORE_CLIENT_SETUP_RETRIES": "1",
    "MC_RPC_CONNECT_TIMEOUT_MS": "1000",
    "MC_RPC_TIMEOUT_MS": "1500",
    "MC_TCP_STATUS_TIMEOUT_SEC": "1",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "3",
    "MC_LOG_LEVEL": "ERROR",
    "MC_STORE_CLIENT_METRIC": "0",
}
"""Read once by the client's library when it is loaded; what the user has set stays."""


class MooncakeStore:
    """A `Store`. Thread-safe: a reader and a writer may call at once."""

    def __init__(self, config: StoreConfig) -> None:
        self._config = read_config(config.extra, config.num_ranks)
        self._prefix = f"baton:{self._config.extra_backend_tag}:"
        self._client_type = load_client()
        self._lock = threading.Lock()
        self._client: Any = None  # this and the next two are written under _lock
        self._address = ""  # of the master it was set up for, as a number
        self._former: list[Any] = []  # clients of masters that moved; a call may still be under way in one
        self._memory: list[NDArray[np.uint8]] = []
        self._is_suspect = True  # the last call failed: look at the master's port before the next one
        try:
            self._connected()
        except StoreError as error:
            if self._config.check_server:
                raise
            logger.warning("the store is not there yet: %s", error)

    def register(self, memory: NDArray[np.uint8]) -> None:
        with self._lock:
            self._memory.append(memory)
            if self._client is not None:
                _register(self._client, memory)

    def batch_exists(self, names: Sequence[str]) -> int:
        if not names:
            return 0
        with self._call() as client:
            answers = client.batch_is_exist(self._keys(names))
            count = next((index for index, answer in enumerate(answers) if answer != 1), len(answers))
            if count == 0 and answers[0] < 0:
                raise self._failure("batch_is_exist", answers[0])
        return count

    def batch_get(self, names: Sequence[str], targets: Sequence[Object]) -> list[bool]:
        return self._transfer("batch_get_into", names, targets, [one.nbytes for one in targets])

    def batch_put(self, names: Sequence[str], objects: Sequence[Object]) -> list[bool]:
        return self._transfer("batch_put_from", names, objects, [0] * len(names))

    def discard(self, names: Sequence[str]) -> None:
        with self._call() as client:
            client.batch_remove(self._keys(names), force=True)

    def clear(self) -> None:
        with self._call() as client:
            pattern = "^" + re.escape(self._prefix)
            answer = client.remove_by_regex(pattern, force=True)
            if answer < 0:
                raise self._failure("remove_by_regex", answer)

    def stats(self) -> Mapping[str, float]:
        return {"connected": float(self._client is not None and not self._is_suspect)}

    def close(self) -> None:
        with self._lock:
            for client in (self._client, *self._former):
                if client is not None:
                    client.close()
            self._client, self._former = None, []

    def _transfer(
        self, method: str, names: Sequence[str], objects: Sequence[Object], expected: Sequence[int]
    ) -> list[bool]:
        """One call of the client for all; an object is done when the answer is the expected one."""
        if not names:
            return []
        pointers = [one.ctypes.data for one in objects]
        with self._call() as client:
            answers = getattr(client, method)(self._keys(names), pointers, [one.nbytes for one in objects])
            done = [answer == wanted for answer, wanted in zip(answers, expected, strict=True)]
            broken = [answer for answer in answers if answer < 0 and answer not in _ABSENT | _REFUSED]
            if broken and not any(done):
                raise self._failure(method, broken[0])
        return done

    def _keys(self, names: Sequence[str]) -> list[str]:
        return [self._prefix + name for name in names]

    def _failure(self, method: str, code: int) -> StoreError:
        return StoreError(f"mooncake: {method} answered {code} (master {self._config.master_server_address})")

    @contextmanager
    def _call(self) -> Iterator[Any]:
        client = self._connected()
        try:
            yield client
        except StoreError:
            self._is_suspect = True
            raise

    def _connected(self) -> Any:
        """The client, set up now if it is not yet, or if the master's name means another address than it did. Raises
        `StoreError` without a long wait when there is no master."""
        if not self._is_suspect and self._client is not None:
            return self._client
        address = _probe(self._config.master_server_address)
        with self._lock:
            if self._client is not None and self._address != address:
                self._former.append(self._client)
                self._client = None
            if self._client is None:
                client = _set_up(self._client_type, self._config, address)
                for memory in self._memory:
                    _register(client, memory)
                self._client, self._address = client, address
        self._is_suspect = False
        return self._client


def load_client() -> Any:
    """The client's class. Raises `StoreError` that names the package which is missing."""
    for name, value in _CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("mooncake.store").MooncakeDistributedStore
    except ImportError as error:
        if "libibverbs" in str(error):
            raise StoreError(
                "mooncake: its client needs the system library libibverbs.so.1 (no RDMA hardware): apt-get install libibverbs1"
            ) from error
        raise StoreError(
            f"mooncake: {error}: pip install 'baton-llm[mooncake]' (package mooncake-transfer-engine-non-cuda)"
        ) from error


def _probe(address: str) -> str:
    """The address that a connection to the master found, as "number:port"."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), PROBE_TIMEOUT_S) as one:
            return f"{one.getpeername()[0]}:{port}"
    except (OSError, ValueError) as error:
        raise StoreError(f"mooncake: no master at {address}: {error}") from error


def _set_up(client_type: Any, config: MooncakeConfig, address: str) -> Any:
    client = client_type()
    before = open_listeners()
    code = client.setup(
        {
            "local_hostname": config.local_hostname,
            "metadata_server": config.metadata_server,
            "global_segment_size": config.global_segment_size,
            "local_buffer_size": config.local_buffer_size,
            "protocol": config.protocol,
            "rdma_devices": config.device_name,
            "master_server_addr": address,
        }
    )
    if code != 0:
        raise StoreError(
            f"mooncake: set-up answered {code} (master {config.master_server_address}, metadata_server "
            f"{config.metadata_server!r}, protocol {config.protocol!r}, device_name {config.device_name!r})"
        )
    if config.local_hostname.startswith("127."):
        for descriptor in open_listeners() - before:
            loopback_only(descriptor)
    return client


def _register(client: Any, memory: NDArray[np.uint8]) -> None:
    code = client.register_buffer(memory.ctypes.data, memory.nbytes)
    if code != 0:
        raise StoreError(f"mooncake: register_buffer of {memory.nbytes} bytes answered {code}")
