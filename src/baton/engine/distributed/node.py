"""The parent process of a node that is not the first: starts its ranks, says on /health whether they are up, ends with them.

It serves nothing else, and /health only where --host or --port is given: manifests give workers neither. No torch here.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from baton.engine.args import EngineArgs
from baton.engine.distributed.engines import plan_of_host
from baton.engine.distributed.fits import need_fit_of_model
from baton.engine.distributed.processes import stop_ranks
from baton.engine.server.channel import FROZEN_S, ChannelAddress, ServerChannel
from baton.engine.server.main import bind, http_server
from baton.engine.weights.resolve import resolve_model
from baton.protocol.rank import Fatal, FromRank, Ready

logger = logging.getLogger(__name__)

FATAL_GRACE_S = 0.2


def run_node(args: EngineArgs, argv: Sequence[str]) -> int:
    """Serve until SIGTERM, SIGINT or the end of the group. Returns the exit status: 0 when this node or rank 0 was told to stop, else 1."""
    model_path = resolve_model(args.model_path, args.revision)
    need_fit_of_model(args, model_path, os.environ)
    [engine] = plan_of_host(args).engines  # several are on one node only
    default = EngineArgs()
    wants_health = (args.host, args.port) != (default.host, default.port)
    health_socket = bind(args.host, args.port) if wants_health else None
    address = ChannelAddress.create()
    rank = subprocess.Popen(
        [sys.executable, "-m", "baton.engine.distributed.follower", str(os.getpid()), "0", address.directory, *argv,
         "--model-path", str(model_path)],
        stdin=subprocess.DEVNULL,
        env={**os.environ, **engine.environ},
    )  # fmt: skip
    try:
        return asyncio.run(_Node(args, address, rank, health_socket).run())
    finally:
        stop_ranks([rank], on_purpose=False)
        address.remove()


class _Node:
    def __init__(
        self,
        args: EngineArgs,
        address: ChannelAddress,
        rank: subprocess.Popen[bytes],
        health_socket: socket.socket | None,
    ) -> None:
        self._args, self._rank, self._health_socket = args, rank, health_socket
        self._channel = ServerChannel(address)
        self._is_ready = False
        self._ended: asyncio.Event = asyncio.Event()
        self._status = 1

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        self._channel.start(self._on_message)
        beats = asyncio.create_task(self._watch_beats(), name="beats")
        try:
            with self._watched_rank():
                if self._health_socket is None:
                    await self._ended.wait()
                else:
                    await self._serve_health(self._health_socket)
        finally:
            beats.cancel()
            self._channel.close()
        return self._status

    async def _serve_health(self, bound: socket.socket) -> None:
        server = http_server(Starlette(routes=[Route("/health", self._health)]), self._args, access_log=False)
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(server.serve([bound]), name="health")
            await self._ended.wait()
            server.stop()
            await serving

    async def _health(self, request: Request) -> Response:
        return Response(status_code=200 if self._is_ready else 503)

    async def _watch_beats(self) -> None:
        await self._channel.until_silent()
        logger.error("the node's rank has stood still for %g s: it is stopped or hung", FROZEN_S)
        self._ended.set()

    def _stop(self) -> None:
        self._status = 0
        self._ended.set()

    def _on_message(self, message: FromRank) -> None:
        if isinstance(message, Ready):
            self._is_ready = True
            logger.info("node %d of %d takes part", self._args.node_rank, self._args.nnodes)
        elif isinstance(message, Fatal):
            logger.error("the node's rank ends: %s", message.message)

    @contextlib.contextmanager
    def _watched_rank(self) -> Iterator[None]:
        """The node ends with its rank, a moment later: the rank's last words may still be on their way."""
        loop = asyncio.get_running_loop()
        descriptor = os.pidfd_open(self._rank.pid)

        def on_exit() -> None:
            loop.remove_reader(descriptor)
            if self._rank.poll() == 0:
                self._status = 0
            loop.call_later(FATAL_GRACE_S, self._ended.set)

        loop.add_reader(descriptor, on_exit)
        try:
            yield
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
