"""An embedded cluster of its own for a test: `baton` and `kubectl` as a user runs them, and a client that never stops asking."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.clients import stream_chat

BIN = Path(sys.executable).parent
COMMAND_TIMEOUT_S = 240.0


@dataclass
class Cluster:
    """One BATON_HOME. `baton` and `kubectl` return what the command printed and fail loudly when it did."""

    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "BATON_HOME": str(self.home), **self.environment}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            input=stdin,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}\n{self.log_tail()}"
        return done

    def baton(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(str(BIN / "baton"), *arguments, check=check)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self.run("kubectl", *arguments, stdin=stdin).stdout

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def use_env(self) -> None:
        """What `eval "$(baton env)"` does."""
        script = f'eval "$({BIN}/baton env)"; env -0'
        text = self.run("sh", "-c", script).stdout
        found = dict(one.split("=", 1) for one in text.split("\0") if "=" in one)
        self.environment = {name: found[name] for name in ("KUBECONFIG", "PATH")}

    @property
    def daemon_pid(self) -> int:
        return int(json.loads((self.home / "cluster" / "daemon.json").read_text())["pid"])

    def log_tail(self) -> str:
        log = self.home / "cluster" / "daemon.log"
        lines = log.read_text().splitlines() if log.exists() else ["no daemon log"]
        return "\n".join([line for line in lines if " INFO " not in line][-40:])

    def processes(self, pod: str) -> list[int]:
        """Pids of a pod's containers' own processes, by what the node agent puts in their environment."""
        uid = self.get("pod", pod)["metadata"]["uid"]
        return pids_with(f"BATON_CONTAINER={uid}/")


def pids_with(variable: str) -> list[int]:
    """Processes of this machine with an environment variable that begins so."""
    found = []
    for directory in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if directory.name.isdigit() and any(
                one.startswith(variable.encode()) for one in (directory / "environ").read_bytes().split(b"\0")
            ):
                found.append(int(directory.name))
    return sorted(found)


@contextlib.contextmanager
def cluster(home: Path) -> Iterator[Cluster]:
    """A cluster that is not started yet; stopped and forgotten at the end, whatever happened."""
    one = Cluster(home)
    try:
        yield one
    finally:
        one.baton("down", "--purge")


def until(condition: Any, what: str, timeout_s: float = 60.0) -> Any:
    """Poll until `condition()` is true; its value."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s:.0f} s: {what}")


class Traffic:
    """Clients that stream chats one after the other until told to stop; every answer must be the same whole text."""

    def __init__(self, url: str, num_clients: int = 2) -> None:
        self._body = {
            "model": "llm",
            "messages": [{"role": "user", "content": "Count from one to ten in words."}],
            "max_tokens": 32,
            "temperature": 0,
        }
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(num_clients)]
        self.texts: list[str] = []
        self.failures: list[str] = []

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                self.texts.append(stream_chat(self._url, self._body)[0])
            except (AssertionError, OSError, ValueError) as error:
                self.failures.append(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error}")
                time.sleep(0.2)

    def check(self, since: int = 0) -> int:
        """No failure so far, all texts equal, and at least one more answer than `since`; how many there are."""
        until(lambda: len(self.texts) > since or self.failures, "another answer")
        assert not self.failures, self.failures
        assert len(set(self.texts)) == 1, set(self.texts)
        return len(self.texts)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
