"""From a job to an HTTP answer: one JSON document, or server-sent events; errors in the shape of the route.

Owns the life of a response: it waits for the job, ends it when the client leaves or the deadline passes, and guarantees
that the client sees exactly one end. Status and headers wait for the first output, so that a request refused by the rank
is answered with its real status. Not here: what the documents and events hold (the route files).
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.engine.server.dialect import Dialect
from baton.engine.server.generation import Generation, Job
from baton.engine.server.sglang_dialect import info_object
from baton.protocol.errors import ErrorInfo, Stage
from baton.protocol.hops import REQUEST_ID_HEADER, RETRYABLE_HEADER, STAGE_HEADER

logger = logging.getLogger(__name__)

DONE_EVENT = b"data: [DONE]\n\n"


class Writer(Protocol):
    """What a route makes of a job."""

    is_openai: bool
    """Which error shape."""

    def document(self, job: Job) -> bytes:
        """The JSON body, once every sequence has ended well."""
        ...

    def events(self, changed: list[Generation]) -> bytes:
        """Server-sent events for what is new (b"" if nothing is worth one)."""
        ...

    def last_events(self, job: Job) -> bytes:
        """What comes after every sequence has ended and before [DONE]."""
        ...


def error_event(info: ErrorInfo) -> bytes:
    """An error inside a stream that has begun, on every route."""
    return b"data: " + msgspec.json.encode({"error": {"object": "error", **info_object(info)}}) + b"\n\n"


def error_response(dialect: Dialect, info: ErrorInfo, *, is_openai: bool) -> Response:
    headers = {STAGE_HEADER: info.stage, RETRYABLE_HEADER: "1" if info.retryable else "0"}
    if info.request_id is not None:
        headers[REQUEST_ID_HEADER] = info.request_id
    body = msgspec.json.encode(dialect.error(info, is_openai=is_openai))
    return Response(body, info.code, headers, "application/json")


class JobResponse(Response):
    """Answers with a job's outcome. `job.stream_interval` says whether as a stream."""

    def __init__(
        self,
        job: Job,
        writer: Writer,
        dialect: Dialect,
        *,
        request_id: str,
        stage: Stage,
        on_end: Callable[[Job], None] | None = None,
    ) -> None:
        self._on_end = on_end
        self._dialect = dialect
        self._job = job
        self._writer = writer
        self._request_id = request_id
        self._stage: Stage = stage
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_watch_disconnect(receive, self._job), name="watch-disconnect")
        try:
            if self._job.stream_interval is None:
                await self._answer(scope, receive, send)
            else:
                await self._stream(scope, receive, send)
        finally:
            watcher.cancel()
            self._job.close("the response was cancelled")
            if self._on_end is not None:
                self._on_end(self._job)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        while not self._job.is_done and self._job.error is None and not self._job.is_disconnected:
            await self._changed()
        if self._job.is_disconnected:
            return
        if self._job.error is not None:
            await self._refuse(scope, receive, send)
            return
        body = self._writer.document(self._job)
        response = Response(body, 200, {REQUEST_ID_HEADER: self._request_id}, "application/json")
        await response(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False
        while True:
            changed = await self._changed() if self._job.generations else []
            if self._job.is_disconnected:
                return
            error = self._job.error
            if error is not None and not has_started:
                await self._refuse(scope, receive, send)
                return
            body = self._writer.events([one for one in changed if one.error is None])
            is_over = error is not None or self._job.is_done
            if is_over:
                body += self._writer.last_events(self._job) if error is None else error_event(self._named(error))
                body += DONE_EVENT
            if not body:
                continue
            if not has_started:
                has_started = True
                await send({"type": "http.response.start", "status": 200, "headers": self._stream_headers()})
            await send({"type": "http.response.body", "body": body, "more_body": not is_over})
            if is_over:
                return

    async def _changed(self) -> list[Generation]:
        """News of the job; at its deadline, the news is that every sequence has ended."""
        try:
            return await self._job.changed()
        except TimeoutError:
            self._job.close("deadline exceeded")
            return self._job.generations

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._job.error is not None
        response = error_response(self._dialect, self._named(self._job.error), is_openai=self._writer.is_openai)
        await response(scope, receive, send)

    def _named(self, error: ErrorInfo) -> ErrorInfo:
        """The error with the request's id and, where the rank named none, this worker's stage."""
        stage = self._stage if error.stage == "server" else error.stage
        return msgspec.structs.replace(error, request_id=self._request_id, stage=stage)

    def _stream_headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (REQUEST_ID_HEADER.encode(), self._request_id.encode("latin-1", "replace")),
        ]


async def _watch_disconnect(receive: Receive, job: Job) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            job.disconnect()
            return
