"""Streams of a pod: choosing the container, the log over HTTP, and which WebSocket protocol does what.

Owns `Streams`. exec and attach are in `execute`, port-forward in `portforward`. Not here: the node's side
(`baton.cluster.node_connector`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime
from typing import Any

from baton.cluster.apiserver.ages import parse_time
from baton.cluster.apiserver.errors import StatusError, bad_request, method_not_allowed, no_such_resource
from baton.cluster.apiserver.execute import EXEC_PROTOCOLS, run_session, send_failure
from baton.cluster.apiserver.http import Request, dump, send_chunk, start_stream
from baton.cluster.apiserver.portforward import PORTFORWARD_PROTOCOL, forward
from baton.cluster.apiserver.store import Store
from baton.cluster.apiserver.target import Target
from baton.cluster.node_connector import ExecSession, LogOptions, NodeConnector, NodeError

log = logging.getLogger(__name__)
JSON = dict[str, Any]


class Streams:
    """log, exec, attach and portforward of stored pods."""

    def __init__(self, store: Store, nodes: NodeConnector) -> None:
        self._store, self._nodes = store, nodes

    def _pod(self, target: Target) -> JSON:
        pod = self._store.get(target.key)
        if pod is None:
            raise target.missing()
        return pod

    async def http(self, request: Request, target: Target) -> None:
        """Plain HTTP: the log, and a refusal for what needs a WebSocket."""
        if target.subresource == "log":
            if request.method != "GET":
                raise method_not_allowed()
            await self._log(request, target)
            return
        # A client whose WebSocket was refused tries SPDY next and shows only that answer: tell it the same reason.
        self._check_stream(request, target)
        if request.headers.get("upgrade", "").upper().startswith("SPDY"):
            raise bad_request("SPDY/3.1 upgrades are not served; use WebSockets (kubectl 1.30 and later does)")
        raise bad_request("Upgrade request required")

    def _check_stream(self, request: Request, target: Target) -> str:
        """Raises what is known to be wrong before any stream is open; returns the container."""
        pod = self._pod(target)
        if target.subresource == "portforward":
            phase = (pod.get("status") or {}).get("phase", "Pending")
            if phase != "Running":
                raise bad_request(f"unable to forward port because pod is not running. Current status={phase}")
            return ""
        if target.subresource == "exec" and not request.text_list("command"):
            raise bad_request("you must specify at least 1 command for the container")
        return choose_container(pod, request.query.get("container", ""))

    async def _log(self, request: Request, target: Target) -> None:
        pod = self._pod(target)
        container = choose_container(pod, request.query.get("container", ""))
        options = _log_options(request)
        if not (pod.get("spec") or {}).get("nodeName"):
            raise bad_request(
                f'container "{container}" in pod "{target.name}" is waiting to start: pod is not scheduled yet'
            )
        chunks = self._nodes.logs(target.namespace, target.name, container, options)
        # A follower that leaves must end the node's reading even when the container never writes again.
        copying = asyncio.create_task(_copy_log(request, chunks), name="log")
        leaving = asyncio.create_task(request.gone(), name="log-disconnect")
        try:
            await asyncio.wait({copying, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (copying, leaving):
                task.cancel()
            result, _ = await asyncio.gather(copying, leaving, return_exceptions=True)
        if isinstance(result, NodeError):
            raise status_of(result) from None
        if isinstance(result, Exception):
            raise result

    async def websocket(self, request: Request, target: Target) -> None:
        """Checks everything before the handshake, so that errors are plain HTTP answers."""
        if target.subresource not in ("exec", "attach", "portforward") or target.resource.plural != "pods":
            raise no_such_resource()
        container = self._check_stream(request, target)
        offered = list(request.scope.get("subprotocols", []))
        if target.subresource == "portforward":
            if PORTFORWARD_PROTOCOL not in offered:
                raise bad_request(f"unable to upgrade: the server speaks {PORTFORWARD_PROTOCOL}, not {offered}")
            await _accept(request, PORTFORWARD_PROTOCOL)
            await forward(request, self._nodes, target.namespace, target.name)
            return
        protocol = next((p for p in EXEC_PROTOCOLS if p in offered), "" if not offered else None)
        if protocol is None:
            raise bad_request(f"unable to upgrade: the server speaks {', '.join(EXEC_PROTOCOLS)}, not {offered}")
        await _accept(request, protocol)
        try:
            session = await self._open(request, target, container)
        except NodeError as error:
            await send_failure(request, error.message, error.code)
            return
        try:
            await run_session(request, session)
        finally:
            await session.close()

    async def _open(self, request: Request, target: Target, container: str) -> ExecSession:
        stdin, tty = request.flag("stdin"), request.flag("tty")
        if target.subresource == "attach":
            return await self._nodes.attach(target.namespace, target.name, container, stdin=stdin, tty=tty)
        command = request.text_list("command")
        return await self._nodes.exec(target.namespace, target.name, container, command, stdin=stdin, tty=tty)

    async def refuse(self, request: Request, error: StatusError) -> None:
        """An HTTP answer instead of the handshake (or, after it, nothing: the stream is already closed)."""
        if "websocket.http.response" not in request.scope.get("extensions", {}) or request.scope.get("baton.accepted"):
            await request.send({"type": "websocket.close", "code": 1011})
            return
        body = dump(error.status())
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await request.send({"type": "websocket.http.response.start", "status": error.code, "headers": headers})
        await request.send({"type": "websocket.http.response.body", "body": body})


async def _copy_log(request: Request, chunks: AsyncIterator[bytes]) -> None:
    """Raises `NodeError` only while no byte is sent; later ones end the stream, as a container's end does."""
    started = False
    try:
        async for chunk in chunks:
            if not started:
                await start_stream(request, "text/plain; charset=utf-8")
                started = True
            await send_chunk(request, chunk)
    except NodeError as error:
        if not started:
            raise
        log.warning("log stream ended early", extra={"path": request.path, "error": error.message})
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()
    if not started:
        await start_stream(request, "text/plain; charset=utf-8")
    await send_chunk(request, b"", more=False)


async def _accept(request: Request, protocol: str) -> None:
    await request.receive()  # websocket.connect
    request.scope["baton.accepted"] = True
    await request.send({"type": "websocket.accept", "subprotocol": protocol or None})


def status_of(error: NodeError) -> StatusError:
    reasons = {400: "BadRequest", 404: "NotFound", 500: "InternalError", 503: "ServiceUnavailable"}
    return StatusError(error.code, reasons.get(error.code, ""), error.message)


def choose_container(pod: JSON, wanted: str) -> str:
    """The named container, or the only one; raises 400 as Kubernetes does."""
    spec, name = pod.get("spec") or {}, pod["metadata"]["name"]
    regular = [c["name"] for c in spec.get("containers") or ()]
    others = [c["name"] for f in ("initContainers", "ephemeralContainers") for c in spec.get(f) or ()]
    if wanted:
        if wanted not in (*regular, *others):
            raise bad_request(f"container {wanted} is not valid for pod {name}")
        return wanted
    marked = (pod["metadata"].get("annotations") or {}).get("kubectl.kubernetes.io/default-container")
    if marked in regular:
        return str(marked)
    if len(regular) != 1 or others:
        choice = f"choose one of: [{' '.join(regular)}]"
        if others:
            choice += f" or one of the init containers: [{' '.join(others)}]"
        if len(regular) != 1:
            raise bad_request(f"a container name must be specified for pod {name}, {choice}")
    return str(regular[0])


def _log_options(request: Request) -> LogOptions:
    tail, since, limit = request.number("tailLines"), request.number("sinceSeconds"), request.number("limitBytes")
    for name, value, least in (("tailLines", tail, 0), ("sinceSeconds", since, 1), ("limitBytes", limit, 1)):
        if value is not None and value < least:
            raise bad_request(f"PodLogOptions {name}: Invalid value: {value}: must be at least {least}")
    return LogOptions(
        follow=request.flag("follow"),
        previous=request.flag("previous"),
        tail_lines=tail,
        since_s=_since_s(request, since),
        timestamps=request.flag("timestamps"),
        limit_bytes=limit,
    )


def _since_s(request: Request, seconds: int | None) -> float | None:
    text = request.query.get("sinceTime", "")
    if not text:
        return None if seconds is None else float(seconds)
    moment = parse_time(text)
    if moment is None:
        raise bad_request(f'PodLogOptions sinceTime: Invalid value: "{text}"')
    return max(0.0, (datetime.now(UTC) - moment).total_seconds())
