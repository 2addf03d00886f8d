"""A real Mooncake on loopback for tests: one master and one store service, each of which can be stopped and started again."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.fakes.ports import free_port

from baton.kvcache.stores.base import StoreError
from baton.kvcache.stores.mooncake import load_client

START_TIMEOUT_S = 30.0
MISSING = ""
try:
    load_client()
except StoreError as error:
    MISSING = str(error)

needs_mooncake = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class MooncakeService:
    """`address` is the master's. Objects are written to `directory`/ssd within about a second of their put."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.disk = directory / "ssd"
        self.disk.mkdir(parents=True)
        self._rpc, self._metrics, self._rest = free_port(), free_port(), free_port()
        self.address = f"127.0.0.1:{self._rpc}"
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start_master(self) -> None:
        command = [
            str(Path(sys.executable).with_name("mooncake_master")), "--rpc_address=127.0.0.1", f"--rpc_port={self._rpc}",
            "--metrics_host=127.0.0.1", f"--metrics_port={self._metrics}", "--enable_offload=true", "--client_ttl=2",
            "--default_kv_lease_ttl=100ms",
        ]  # fmt: skip
        self._start("master", command, {}, self._rpc)

    def start_store(self) -> None:
        config = {
            "local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE", "master_server_address": self.address,
            "global_segment_size": "64mb", "local_buffer_size": "16mb", "protocol": "tcp", "device_name": "",
            "enable_ssd_offload": True, "ssd_offload_path": str(self.disk),
        }  # fmt: skip
        file = self._directory / "store.json"
        file.write_text(json.dumps(config))
        command = [
            sys.executable, "-m", "mooncake.mooncake_store_service", f"--config={file}", f"--port={self._rest}"
        ]  # fmt: skip
        environment = {
            "MOONCAKE_OFFLOAD_HEARTBEAT_INTERVAL_SECONDS": "1",
            "MOONCAKE_OFFLOAD_STORAGE_BACKEND_DESCRIPTOR": "file_per_key_storage_backend",
            "MOONCAKE_OFFLOAD_LOCAL_BUFFER_SIZE_BYTES": str(64 << 20),
        }
        self._start("store", command, environment, self._rest)

    def restart_store(self, number: int) -> None:
        """Stop it by a signal and start it when the master has given it up. Sooner, and the master, giving up the old store after
        `client_ttl`, forgets the objects that the new one, in the same place, has reported."""
        log = self._directory / "master.log"
        mounted = [line for line in log.read_text().splitlines() if "action=mount_segment" in line][-1]
        given_up = re.search(r"client_id=[\d-]+", mounted)[0] + ", action=client_expired"
        self.stop("store", number)
        until(lambda: given_up in log.read_text(), "the master has given up the store")
        self.start_store()

    def stop(self, name: str, number: int = signal.SIGKILL) -> None:
        process = self._running.pop(name)
        process.send_signal(number)
        process.wait(START_TIMEOUT_S)

    def close(self) -> None:
        for name in list(self._running):
            self.stop(name)

    def num_files(self) -> int:
        return sum(1 for path in self.disk.rglob("*") if path.is_file())

    def _start(self, name: str, command: list[str], environment: dict[str, str], port: int) -> None:
        with (self._directory / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **environment, "MC_LOG_LEVEL": "ERROR"}
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError as error:
                assert self._running[name].poll() is None, (self._directory / f"{name}.log").read_text()[-2000:]
                assert time.monotonic() < deadline, f"{name}: {error}"
                time.sleep(0.02)
