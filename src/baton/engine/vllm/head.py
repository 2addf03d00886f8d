"""The head of a cluster of nodes: knows its workers, and hands them to the server that leads (see `cluster`).

`python -m baton.engine.vllm.head PORT WATCHED_PID` lives as long as the process WATCHED_PID, which is the shell that started
the cluster. One server leads at a time; when it ends, its workers stop their nodes and wait for the next.
"""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Awaitable, Callable

from baton.engine.vllm.cluster import (
    MAX_LINE_BYTES,
    PING_S,
    SILENCE_S,
    ClusterError,
    Count,
    Ended,
    Join,
    Lead,
    Message,
    Nodes,
    Ping,
    Start,
    Stop,
    decode,
    encode,
    remember_head,
)
from baton.protocol.pod import listen_host

logger = logging.getLogger(__name__)


class Peer:
    """One connection, seen from the head."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.name = "{}:{}".format(*writer.get_extra_info("peername")[:2])
        self.local_host = str(writer.get_extra_info("sockname")[0])

    async def receive(self, timeout_s: float | None) -> Message:
        """Raises `ClusterError`."""
        try:
            line = await asyncio.wait_for(self._reader.readline(), timeout_s)
        except TimeoutError:
            raise ClusterError(f"{self.name} said nothing for {timeout_s:g} s") from None
        except (OSError, ValueError) as error:
            raise ClusterError(f"{self.name} is gone: {error}") from None
        return decode(line, self.name)

    def send(self, message: Message) -> None:
        """Never blocks: lines are few and short."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    def close(self) -> None:
        self._writer.close()


class Head:
    """Invariant: `_leader` is the only connection that workers run nodes for."""

    def __init__(self) -> None:
        self._workers: list[Peer] = []
        """In the order in which they came."""
        self._leader: Peer | None = None
        self._started: list[Peer] = []

    async def serve(self, host: str, port: int, ready: Callable[[int], None]) -> None:
        """Until cancelled. `ready` gets the port. Raises OSError for an address that cannot be had."""
        server = await asyncio.start_server(self._on_connection, host, port, limit=MAX_LINE_BYTES)
        async with server:
            ready(server.sockets[0].getsockname()[1])
            await server.serve_forever()

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        serve: Callable[[Peer, Message], Awaitable[None]]
        try:
            first = await peer.receive(SILENCE_S)
            if isinstance(first, Count):
                peer.send(self._nodes())
                await writer.drain()
                return
            serve = self._serve_worker if isinstance(first, Join) else self._serve_leader
            if isinstance(first, Join | Lead):
                await serve(peer, first)
        except ClusterError as error:
            logger.info("%s", error)
        except asyncio.CancelledError:
            pass  # the head ends; the stream server would log the cancellation of its own task as an error
        finally:
            peer.close()

    def _nodes(self) -> Nodes:
        return Nodes(1 + len(self._workers), self._workers[0].local_host if self._workers else "")

    async def _serve_worker(self, peer: Peer, first: Message) -> None:
        assert isinstance(first, Join)
        self._workers.append(peer)
        logger.info("node joined: %s at %s (%d in all)", first.name, peer.name, 1 + len(self._workers))
        pings = asyncio.create_task(_ping(peer), name="ping")
        try:
            while True:
                message = await peer.receive(SILENCE_S)
                if isinstance(message, Ended):
                    self._report(peer, f"the node at {peer.name} ended: {message.reason}")
        finally:
            pings.cancel()
            self._workers.remove(peer)
            self._report(peer, f"the node at {peer.name} is gone")

    def _report(self, peer: Peer, reason: str) -> None:
        if peer in self._started and self._leader is not None:
            self._started.remove(peer)
            self._leader.send(Ended(reason))

    async def _serve_leader(self, peer: Peer, first: Message) -> None:
        if self._leader is not None:
            peer.send(Ended("another server leads these nodes"))
            return
        self._leader = peer
        peer.send(self._nodes())
        try:
            while True:
                # A leader may be silent for days; that it is gone is told by its connection, which is local.
                message = await peer.receive(None)
                if isinstance(message, Start):
                    self._start(message)
        finally:
            for worker in self._started:
                worker.send(Stop())
            self._started.clear()
            self._leader = None

    def _start(self, message: Start) -> None:
        assert self._leader is not None
        if len(self._workers) < message.num_workers:
            self._leader.send(Ended(f"{1 + len(self._workers)} nodes are left"))
            return
        self._started = self._workers[: message.num_workers]
        for node_rank, worker in enumerate(self._started, start=1):
            worker.send(Start([*message.flags, f"--node-rank={node_rank}"]))


async def _ping(peer: Peer) -> None:
    while True:
        await asyncio.sleep(PING_S)
        peer.send(Ping())


async def _watch(pid: int) -> None:
    """Return when the process ends."""
    ended = asyncio.Event()
    descriptor = os.pidfd_open(pid)
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def run(port: int, watched_pid: int) -> None:
    serving = asyncio.create_task(Head().serve(listen_host("0.0.0.0"), port, remember_head), name="serve")
    watching = asyncio.create_task(_watch(watched_pid), name="watch")
    done, pending = await asyncio.wait({serving, watching}, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    for task in done:
        task.result()


def main(argv: list[str]) -> int:
    logging.basicConfig(level="INFO", format="%(asctime)s head %(levelname)s %(message)s")
    port, watched_pid = map(int, argv)
    try:
        asyncio.run(run(port, watched_pid))
    except (OSError, ProcessLookupError) as error:
        logger.error("no head here: %s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
