"""Listening: the API server on a loopback socket under uvicorn, inside the caller's event loop.

Owns `serve` and `Serving`, and the kubeconfig that leads to it. Not here: the application (see `app`).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from baton.cluster.apiserver.app import ApiServer

JSON = dict[str, Any]
LAST_ANSWERS_S = 0.1


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, as the process belongs to the caller; `stop` is heard at once, not at the next
    tenth of a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stop = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._stop.set()

    async def main_loop(self) -> None:
        seconds = 0
        while not await self.on_tick(10 * seconds):  # uvicorn counts tenths; the tick renews the Date header
            seconds = (seconds + 1) % 86400
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), 1.0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if self.server_state.tasks:  # most end at once; watches are endless, and their clients come back by themselves
            await asyncio.wait(self.server_state.tasks, timeout=LAST_ANSWERS_S)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Serving:
    """A listening server; `close` stops it and the store stays open."""

    def __init__(self, app: ApiServer, server: _Server, task: asyncio.Task[None], port: int, host: str) -> None:
        self._app, self._server, self._task = app, server, task
        self.host, self.port = host, port

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def close(self) -> None:
        """Ends open streams and stops listening."""
        self._server.stop()
        await self._task
        await self._app.stop()


async def serve(app: ApiServer, host: str = "127.0.0.1", port: int = 0) -> Serving:
    """Starts `app` on `host`:`port` (0: any free one) and returns when it accepts connections.

    Raises OSError when the port is taken.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_level="warning",
        access_log=False,
        http="httptools",
        ws="wsproto",
        ws_max_size=16 * 1024 * 1024,
        timeout_keep_alive=300,
        backlog=1024,
        server_header=False,
    )
    await app.start()
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="apiserver")
    while not server.started:
        if task.done():
            task.result()
            raise RuntimeError("the API server stopped while starting")
        await asyncio.sleep(0.005)
    return Serving(app, server, task, listener.getsockname()[1], host)


def kubeconfig(url: str, token: str | None, *, name: str = "baton", namespace: str = "default") -> JSON:
    """A kubeconfig for kubectl and client libraries.

    The token travels as a path prefix of the server's URL: over plain http kubectl drops the bearer token of the user
    entry, and other clients use what is there.
    """
    server = f"{url}/token/{token}" if token else url
    user: JSON = {"token": token} if token else {}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": name,
        "clusters": [{"name": name, "cluster": {"server": server}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": namespace}}],
        "users": [{"name": name, "user": user}],
    }
