"""A worker node of a cluster: dials the head, runs a node of our worker when told to, and says when it has ended."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Sequence

from baton.engine.vllm.cluster import (
    CONNECT_TIMEOUT_S,
    MAX_LINE_BYTES,
    PING_S,
    SILENCE_S,
    ClusterError,
    Ended,
    Join,
    Ping,
    Start,
    Stop,
    decode,
    encode,
)
from baton.protocol.pod import local_path

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0
NODE = (sys.executable, "-m", "baton.engine.vllm.node")
"""Gets this process's id and the flags."""


class Member:
    """One membership, from joining to the end of the connection."""

    def __init__(self, host: str, port: int, node: Sequence[str] = NODE) -> None:
        self._host, self._port, self._command = host, port, node
        self._node: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self.has_joined = False

    async def run(self) -> None:
        """Until the head is gone; the node ends with it. Raises `ClusterError` always: there is no other end."""
        peer = f"the head at {self._host}:{self._port}"
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(self._host, self._port, limit=MAX_LINE_BYTES)
        except OSError as error:  # TimeoutError too
            raise ClusterError(f"{peer} cannot be reached: {str(error) or 'time-out'}") from None
        pings = asyncio.create_task(_ping(writer), name="ping")
        try:
            writer.write(encode(Join(socket.gethostname())))
            self.has_joined = True
            logger.info("joined %s", peer)
            while True:
                try:
                    line = await asyncio.wait_for(reader.readline(), SILENCE_S)
                except (OSError, ValueError) as error:
                    raise ClusterError(f"{peer} is gone: {str(error) or 'it is silent'}") from None
                match decode(line, peer):
                    case Start(flags):
                        await self._stop_node()
                        await self._start_node(flags, writer)
                    case Stop():
                        await self._stop_node()
        finally:
            pings.cancel()
            await self._stop_node()
            writer.close()

    async def _start_node(self, flags: list[str], writer: asyncio.StreamWriter) -> None:
        command = [*self._command, str(os.getpid()), *map(_here, flags)]
        self._node = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
        self._watching = asyncio.create_task(_report_end(self._node, writer), name="watch-node")

    async def _stop_node(self) -> None:
        """May be cancelled and called again: the node is forgotten only when it has ended."""
        node = self._node
        if node is None or self._watching is None:
            return
        self._watching.cancel()
        if node.returncode is None:
            node.terminate()
            try:
                await asyncio.wait_for(node.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                node.kill()
                await node.wait()
        self._node = None


def _here(flag: str) -> str:
    """A flag whose value is a path of the manifest, as that path lies in this pod."""
    name, equals, value = flag.partition("=")
    return name + equals + local_path(value) if value.startswith("/") else flag


async def _report_end(node: asyncio.subprocess.Process, writer: asyncio.StreamWriter) -> None:
    status = await node.wait()
    logger.error("this node ended with status %d", status)
    writer.write(encode(Ended(f"status {status}")))


async def _ping(writer: asyncio.StreamWriter) -> None:
    while True:
        await asyncio.sleep(PING_S)
        writer.write(encode(Ping()))
