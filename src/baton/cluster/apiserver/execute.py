"""exec and attach over WebSocket: the v5 and v4.channel.k8s.io protocols.

Owns `run_session`, which relays between a WebSocket and an `ExecSession`. Each binary message begins with its channel:
0 stdin, 1 stdout, 2 stderr, 3 the final status, 4 resize, 255 (v5) close of a channel. Not here: finding the process.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec

from baton.cluster.apiserver.http import Request, dump
from baton.cluster.node_connector import ExecSession, NodeError

JSON = dict[str, Any]
V5, V4 = "v5.channel.k8s.io", "v4.channel.k8s.io"
EXEC_PROTOCOLS = (V5, V4)
STDIN, STATUS, RESIZE, CLOSE = 0, 3, 4, 255
SUCCESS: JSON = {"metadata": {}, "status": "Success"}


async def run_session(request: Request, session: ExecSession) -> None:
    """Relays until the process ends or the client leaves; the last message is the exit status."""
    outgoing = asyncio.create_task(_output(request, session), name="exec-output")
    incoming = asyncio.create_task(_input(request, session), name="exec-input")
    try:
        await asyncio.wait({outgoing, incoming}, return_when=asyncio.FIRST_COMPLETED)
        if not outgoing.done():
            return  # the client left
        status = await _status(session, outgoing)
        await _end(request, status)
    finally:
        for task in (outgoing, incoming):
            task.cancel()
        await asyncio.gather(outgoing, incoming, return_exceptions=True)


async def _output(request: Request, session: ExecSession) -> None:
    async for channel, data in session.output():
        await request.send({"type": "websocket.send", "bytes": bytes([channel]) + data})


async def _input(request: Request, session: ExecSession) -> None:
    """Client to process; returns when the client leaves."""
    while True:
        message = await request.receive()
        if message["type"] != "websocket.receive":
            return
        data = message.get("bytes") or (message.get("text") or "").encode()
        if not data:
            continue
        channel, payload = data[0], data[1:]
        with contextlib.suppress(OSError):  # a process that no longer reads is not an error of the client
            if channel == STDIN:
                await session.write_stdin(payload)
            elif channel == CLOSE and payload == bytes([STDIN]):
                await session.close_stdin()
            elif channel == RESIZE:
                await _resize(session, payload)


async def _resize(session: ExecSession, payload: bytes) -> None:
    try:
        size = msgspec.json.decode(payload, type=dict[str, int])
    except msgspec.MsgspecError:
        return  # a malformed size is the terminal's loss only
    await session.resize(size.get("Width", 80), size.get("Height", 24))


async def _status(session: ExecSession, outgoing: asyncio.Task[None]) -> JSON:
    error = outgoing.exception()
    if error is not None:
        text = error.message if isinstance(error, NodeError) else f"{type(error).__name__}: {error}"
        return _failure(text, 500)
    code = await session.wait()
    if code == 0:
        return SUCCESS
    return {
        "metadata": {},
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": f"command terminated with exit code {code}",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


def _failure(text: str, code: int) -> JSON:
    return {"metadata": {}, "status": "Failure", "reason": "InternalError", "message": text, "code": code}


async def _end(request: Request, status: JSON) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # the client may leave while the status is on its way
        await request.send({"type": "websocket.send", "bytes": bytes([STATUS]) + dump(status)})
        await request.send({"type": "websocket.close", "code": 1000})


async def send_failure(request: Request, text: str, code: int) -> None:
    """Ends an accepted stream whose process could not be started."""
    await _end(request, _failure(text, code))
