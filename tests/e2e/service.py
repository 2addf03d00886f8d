"""Real processes for end-to-end tests: workers and routers on free loopback ports, their logs, and real kills."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.ports import free_port

READY_TIMEOUT_S = 120.0


@dataclass
class Process:
    """One `baton ...` process with its log; `url` is where it answers HTTP."""

    name: str
    url: str
    popen: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """SIGKILL the process and its rank, as a crashed pod dies: all of it at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(10)

    def rank_pids(self) -> list[int]:
        """The processes beside the HTTP process that run the model, the first rank of each engine."""
        pid = self.popen.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(one) for one in children if b"baton.engine.rank" in Path(f"/proc/{one}/cmdline").read_bytes()]

    def rank_pid(self) -> int:
        """Of a worker of one engine."""
        [rank] = self.rank_pids()
        return rank

    def signal(self, number: int) -> None:
        """To the whole worker."""
        os.killpg(self.popen.pid, number)

    def stop(self) -> None:
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"{self.name} did not stop on SIGTERM; log:\n{self.tail()}") from None

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def get(self, path: str) -> tuple[int, str]:
        return request(self.url, "GET", path)

    def post(self, path: str, body: Any) -> tuple[int, str]:
        return request(self.url, "POST", path, body)


def request(url: str, method: str, path: str, body: Any = None, timeout_s: float = 90) -> tuple[int, str]:
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
    try:
        payload = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, payload, {"content-type": "application/json"} if payload else {})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


@dataclass
class Service:
    """A set of workers and at most one router, all serving `model`."""

    model: Path
    log_dir: Path
    processes: dict[str, Process] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, name: str, arguments: list[str], port: int) -> Process:
        log = self.log_dir / f"{name}.log"
        with log.open("ab") as sink:
            popen = subprocess.Popen(
                [sys.executable, "-m", "baton.cli", *arguments, "--host", "127.0.0.1", "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )
        self.processes[name] = Process(name, f"http://127.0.0.1:{port}", popen, log)
        return self.processes[name]

    def restart(self, name: str) -> Process:
        """The same command on the same ports, as a supervisor does it. The old process must have ended or be ending."""
        old = self.processes[name]
        old.popen.wait(15)
        old.kill()
        arguments = list(old.popen.args)[3:-4]  # type: ignore[arg-type]
        return self.start(name, [str(one) for one in arguments], int(old.url.rsplit(":", 1)[1]))

    def worker(self, name: str, mode: str = "null", *flags: str) -> Process:
        arguments = ["engine", "--model-path", str(self.model), "--enable-metrics", "--enable-cache-report"]
        if mode != "null":
            arguments += ["--disaggregation-mode", mode]
        if mode == "prefill":
            arguments += ["--disaggregation-bootstrap-port", str(free_port())]
        return self.start(name, [*arguments, *flags], free_port())

    def router(self, *flags: str) -> Process:
        arguments = ["router", "--pd-disaggregation"]
        for process in self.processes.values():
            command = list(process.popen.args)  # type: ignore[arg-type]
            if "prefill" in command:
                port = command[command.index("--disaggregation-bootstrap-port") + 1]
                arguments += ["--prefill", process.url, str(port)]
            elif "decode" in command:
                arguments += ["--decode", process.url]
        return self.start("router", [*arguments, *flags], free_port())

    def wait_ready(self, router_path: str = "/readiness") -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        for process in self.processes.values():
            path = router_path if process.name.startswith("router") else "/health"
            while True:
                assert process.popen.poll() is None, f"{process.name} exited:\n{process.tail()}"
                assert time.monotonic() < deadline, f"{process.name} is not ready:\n{process.tail()}"
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if request(process.url, "GET", path, timeout_s=5)[0] == 200:
                        break
                time.sleep(0.05)

    def stop(self) -> None:
        for process in self.processes.values():
            process.popen.terminate()
        for process in self.processes.values():
            process.stop()


@contextlib.contextmanager
def running(model: Path, log_dir: Path) -> Iterator[Service]:
    """A service whose processes are gone when the block ends, whatever happened in it."""
    service = Service(model, log_dir)
    try:
        yield service
    finally:
        for process in service.processes.values():
            process.kill()
