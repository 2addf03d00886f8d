"""One API server per test module, on its own thread, with kubectl and a small HTTP client beside it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.fakes.node_connector import FakeNodes

from baton.cluster.apiserver import ApiServer, Mutator, Serving, Store, Validator, kubeconfig, serve
from baton.cluster.apiserver.resources import Conversion

JSON = dict[str, Any]
KUBECTL = Path(sys.executable).parent / "kubectl"
TOKEN = "a-token-of-this-test"


@dataclass
class Answer:
    code: int
    headers: dict[str, str]
    raw: bytes
    warnings: list[str] = field(default_factory=list)

    @property
    def json(self) -> JSON:
        out: JSON = json.loads(self.raw)
        return out


class WatchStream:
    """Events of one watch, read line by line."""

    def __init__(self, connection: HTTPConnection, response: Any) -> None:
        self._connection, self._response = connection, response
        self.code: int = response.status

    def next(self) -> JSON:
        line = self._response.readline()
        assert line, "the watch ended"
        out: JSON = json.loads(line)
        return out

    def rest(self) -> list[JSON]:
        return [json.loads(line) for line in self._response.readlines()]

    def close(self) -> None:
        self._response.close()
        self._connection.close()


class Cluster:
    """A running API server over `path`."""

    def __init__(
        self,
        directory: Path,
        conversions: dict[str, Conversion] | None = None,
        validators: dict[str, Validator] | None = None,
        mutators: dict[str, Mutator] | None = None,
    ) -> None:
        self.directory = directory
        self.nodes = FakeNodes()
        self.conversions, self.validators, self.mutators = conversions or {}, validators or {}, mutators or {}
        self.watches: list[WatchStream] = []
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.serving: Serving
        self.app: ApiServer
        self.store: Store
        self.run(self._start())
        self.kubeconfig = directory / "kubeconfig"
        self.kubeconfig.write_text(json.dumps(kubeconfig(self.serving.url, TOKEN)))

    async def _start(self) -> None:
        self.store = Store(self.directory / "state.db")
        self.app = ApiServer(
            self.store,
            self.nodes,
            token=TOKEN,
            conversions=self.conversions,
            validators=self.validators,
            mutators=self.mutators,
        )
        self.serving = await serve(self.app)

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float = 20) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return future.result(timeout_s)

    def close(self) -> None:
        async def stop() -> None:
            await self.serving.close()
            await self.store.flush()
            self.store.check_integrity()
            await self.store.close()

        self.run(stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    # kubectl

    def environment(self) -> dict[str, str]:
        home = str(self.directory)
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig), "HOME": home, "KUBECACHEDIR": home + "/cache"}

    def kubectl(self, *args: str, stdin: str | None = None, fails: bool = False, **env: str) -> str:
        """Standard output; standard error when it is expected to fail."""
        done = subprocess.run(
            [KUBECTL, *args],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=30,
            env={**self.environment(), **env},
            check=False,
        )
        assert (done.returncode != 0) is fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout + ("" if not done.stderr else "\n" + done.stderr)

    def start_kubectl(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [KUBECTL, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=self.environment(),
        )

    def get(self, *args: str) -> JSON:
        out: JSON = json.loads(self.kubectl("get", *args, "-o", "json"))
        return out

    # HTTP

    def connect(self) -> HTTPConnection:
        return HTTPConnection(self.serving.host, self.serving.port, timeout=20)

    def http(
        self,
        method: str,
        path: str,
        body: Any = None,
        content_type: str | None = "application/json",
        accept: str = "application/json",
        token: str | None = TOKEN,
        **headers: str,
    ) -> Answer:
        connection = self.connect()
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"Accept": accept, **headers}
        if token:
            sent["Authorization"] = f"Bearer {token}"
        if raw is not None and content_type:
            sent["Content-Type"] = content_type
        connection.request(method, path, raw, sent)
        response = connection.getresponse()
        answer = Answer(
            response.status,
            {k.lower(): v for k, v in response.getheaders()},
            response.read(),
            [v for k, v in response.getheaders() if k.lower() == "warning"],
        )
        connection.close()
        return answer

    def create(self, path: str, body: JSON, **query: str) -> JSON:
        text = "&".join(f"{k}={v}" for k, v in query.items())
        answer = self.http("POST", f"{path}?{text}", body)
        assert answer.code == 201, answer.raw
        return answer.json

    def watch(self, path: str, accept: str = "application/json") -> WatchStream:
        connection = self.connect()
        connection.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}", "Accept": accept})
        stream = WatchStream(connection, connection.getresponse())
        self.watches.append(stream)
        return stream

    def close_watches(self) -> None:
        while self.watches:
            self.watches.pop().close()

    def settle(self) -> None:
        """Waits until the garbage collector has nothing to do."""
        self.run(self.app._collector.idle())

    def eventually(self, check: Callable[[], object], what: str = "condition") -> Any:
        """Polls for something another process does; fails after ten seconds."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            value = check()
            if value:
                return value
            time.sleep(0.02)
        raise AssertionError(f"{what} did not come true")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def closed_watches(request: pytest.FixtureRequest) -> Iterator[None]:
    """Watches that a test opened end with it."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").close_watches()


NS = "/api/v1/namespaces/default"
APPS = "/apis/apps/v1/namespaces/default"


def pod(name: str = "web", **spec: Any) -> JSON:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {"containers": [{"name": "c", "image": "busybox:1"}], **spec},
    }


def config_map(name: str, **data: str) -> JSON:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def deployment(name: str = "web", replicas: int = 1) -> JSON:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "c", "image": "busybox:1", "ports": [{"containerPort": 80}]}]},
            },
        },
    }


def stateful_set(name: str = "db", replicas: int = 2) -> JSON:
    out = deployment(name, replicas)
    out["kind"] = "StatefulSet"
    out["spec"]["serviceName"] = name
    return out


def as_yaml(*objects: JSON) -> str:
    return yaml.safe_dump_all(objects)
