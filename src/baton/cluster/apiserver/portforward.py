"""port-forward: SPDY/3.1 streams inside a WebSocket, each pair one TCP connection to a pod.

Owns `forward`. Per local connection the client opens an error stream and a data stream with one request id; the server
dials the port and relays. Data for the pod is acknowledged (WINDOW_UPDATE) only when written; data for the client needs
no window, since kubectl keeps none (its SPDY library ignores them) and TCP holds it back. Not here: frames (`spdy`), dialling (`NodeConnector`).
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from dataclasses import dataclass, field

from baton.cluster.apiserver import spdy
from baton.cluster.apiserver.http import Request
from baton.cluster.apiserver.spdy import Frame, SpdyDecoder, SpdyEncoder, SpdyError
from baton.cluster.node_connector import NodeConnector, NodeError

PORTFORWARD_PROTOCOL = "SPDY/3.1+portforward.k8s.io"
CHUNK_BYTES = 32 * 1024
MAX_CONNECTIONS = 512


@dataclass(slots=True)
class _Pair:
    """One forwarded connection. `inbox` carries client data to the pod; None is its end."""

    port: int
    error: int = 0
    data: int = 0
    inbox: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)
    task: asyncio.Task[None] | None = None


class _Tunnel:
    """State of one WebSocket. `_pairs` by request id; `_data` by the id of the data stream."""

    def __init__(self, request: Request, nodes: NodeConnector, namespace: str, pod: str) -> None:
        self._request, self._nodes, self._namespace, self._pod = request, nodes, namespace, pod
        self._encoder, self._decoder = SpdyEncoder(), SpdyDecoder()
        self._pairs: dict[str, _Pair] = {}
        self._data: dict[int, _Pair] = {}

    async def run(self) -> None:
        try:
            while True:
                message = await self._request.receive()
                if message["type"] != "websocket.receive":
                    return
                for frame in self._decoder.feed(message.get("bytes") or b""):
                    await self._on_frame(frame)
        except SpdyError as error:
            await self._request.send({"type": "websocket.close", "code": 1002, "reason": str(error)[:120]})
        finally:
            tasks = [p.task for p in self._pairs.values() if p.task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, raw: bytes) -> None:
        await self._request.send({"type": "websocket.send", "bytes": raw})

    async def _on_frame(self, frame: Frame) -> None:
        if frame.kind is None:
            pair = self._data.get(frame.stream)
            if pair is not None:
                if frame.body:
                    pair.inbox.put_nowait(frame.body)
                if frame.fin:
                    pair.inbox.put_nowait(None)
        elif frame.kind == spdy.SYN_STREAM:
            await self._on_stream(frame)
        elif frame.kind == spdy.PING:
            await self._send(spdy.control(spdy.PING, struct.pack(">I", frame.stream)))
        elif frame.kind == spdy.RST_STREAM:
            self._on_reset(frame.stream)

    async def _on_stream(self, frame: Frame) -> None:
        headers = frame.headers
        kind, port, identity = headers.get("streamtype"), headers.get("port", ""), headers.get("requestid", "")
        if kind not in ("error", "data") or not port.isdigit() or not 0 < int(port) < 65536:
            await self._send(spdy.reset(frame.stream, 1))
            return
        if len(self._pairs) >= MAX_CONNECTIONS:
            await self._send(spdy.reset(frame.stream, 3))
            return
        pair = self._pairs.setdefault(identity, _Pair(int(port)))
        await self._send(self._encoder.syn_reply(frame.stream))
        if kind == "error":
            pair.error = frame.stream
        else:
            pair.data = frame.stream
            self._data[frame.stream] = pair
        if pair.error and pair.data and pair.task is None:
            pair.task = asyncio.create_task(self._connection(pair, identity), name="portforward")

    def _on_reset(self, stream: int) -> None:
        pair = self._data.get(stream)
        if pair is not None and pair.task is not None:
            pair.task.cancel()

    async def _connection(self, pair: _Pair, identity: str) -> None:
        problem = ""
        try:
            reader, writer = await self._nodes.connect(self._namespace, self._pod, pair.port)
            try:
                await self._relay(pair, reader, writer)
            finally:
                writer.close()
        except (NodeError, OSError) as error:
            text = error.message if isinstance(error, NodeError) else str(error)
            problem = f"an error occurred forwarding {pair.port} -> {pair.port}: {text}"
        finally:
            self._pairs.pop(identity, None)
            self._data.pop(pair.data, None)
        with contextlib.suppress(OSError, RuntimeError):  # the tunnel may be gone already
            await self._send(spdy.data(pair.error, problem.encode(), fin=True))
            await self._send(spdy.data(pair.data, b"", fin=True))

    async def _relay(self, pair: _Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Both directions; over when the pod closes its side (a client's half-close is passed on)."""
        upward = asyncio.create_task(self._to_pod(pair, writer), name="portforward-up")
        try:
            while chunk := await reader.read(CHUNK_BYTES):
                await self._send(spdy.data(pair.data, chunk))
        finally:
            upward.cancel()
            await asyncio.gather(upward, return_exceptions=True)

    async def _to_pod(self, pair: _Pair, writer: asyncio.StreamWriter) -> None:
        while (chunk := await pair.inbox.get()) is not None:
            writer.write(chunk)
            await writer.drain()
            await self._send(spdy.window_update(pair.data, len(chunk)))
        if writer.can_write_eof():
            writer.write_eof()


async def forward(request: Request, nodes: NodeConnector, namespace: str, pod: str) -> None:
    """Serves one accepted WebSocket until the client leaves."""
    await _Tunnel(request, nodes, namespace, pod).run()
