"""Hand sequences to the rank and make the response that will carry their outcome; log requests."""

import asyncio
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from starlette.responses import Response

from baton.engine.server.context import ServerContext
from baton.engine.server.generation import Job
from baton.engine.server.respond import JobResponse, Writer
from baton.protocol.hops import REQUEST_ID_HEADER
from baton.protocol.rank import Submit

logger = logging.getLogger(__name__)

LOGGED_CHARS = 2048
"""How much text --log-requests-level 2 shows."""


def start_job(
    ctx: ServerContext,
    submits: Sequence[Submit | None],
    writer: Writer,
    *,
    request_id: str,
    stream_interval: int | None,
    dp_rank: int | None,
) -> Response:
    """Submit what has not finished (None: it has) and answer with `writer`. `stream_interval` None: one document. `dp_rank`: the
    engine that is asked for."""
    job = ctx.engines.submit(submits, stream_interval=stream_interval, dp_rank=dp_rank)
    if not ctx.args.log_requests:
        return JobResponse(job, writer, ctx.dialect, request_id=request_id, stage=ctx.stage)
    for one in submits:
        if one is not None:
            log_submit(ctx, one)
    return JobResponse(
        job, writer, ctx.dialect, request_id=request_id, stage=ctx.stage, on_end=partial(log_finish, ctx)
    )


class EarlyWriter(Protocol):
    """Writes a document of a job that has not ended."""

    def document(self, job: Job, early: dict[str, Any] | None = None) -> bytes: ...


def start_early(
    ctx: ServerContext,
    submits: Sequence[Submit | None],
    writer: EarlyWriter,
    early: dict[str, Any],
    *,
    request_id: str,
    dp_rank: int | None,
) -> Response:
    """Answer now; the sequences go on for whoever the answer leads here, until their own time-outs."""
    job = ctx.engines.submit(submits, stream_interval=None, dp_rank=dp_rank)
    if ctx.args.log_requests:
        for one in submits:
            if one is not None:
                log_submit(ctx, one)
    task = asyncio.create_task(_outlive(ctx, job), name=f"early-{request_id}")
    ctx.background.add(task)
    task.add_done_callback(ctx.background.discard)
    body = writer.document(job, early)
    return Response(body, 200, {REQUEST_ID_HEADER: request_id}, "application/json")


async def _outlive(ctx: ServerContext, job: Job) -> None:
    try:
        # The rank ends every sequence: after its hand-over, or when nobody came for it.
        while not job.is_done:
            await job.changed()
    except TimeoutError:
        job.close("deadline exceeded")
    for one in job.generations:
        if one.error is not None:
            logger.warning("a hand-over failed rid=%s: %s", one.rid, one.error.message)
    if ctx.args.log_requests:
        log_finish(ctx, job)


def log_submit(ctx: ServerContext, submit: Submit) -> None:
    """What --log-requests says of a request when it starts."""
    level = ctx.args.log_requests_level
    sampling = f" sampling={submit.sampling}" if level >= 1 else ""
    text = ""
    if level >= 2:
        limit = None if level >= 3 else LOGGED_CHARS
        shown = (
            submit.input_ids
            if ctx.tokenizer is None
            else ctx.tokenizer.decode(submit.input_ids, skip_special_tokens=False)
        )
        text = f" prompt={str(shown)[:limit]!r}"
    logger.info("Receive: rid=%s prompt_tokens=%d%s%s", submit.rid, len(submit.input_ids), sampling, text)


def log_finish(ctx: ServerContext, job: Job) -> None:
    """What --log-requests says of a request when it ends."""
    level = ctx.args.log_requests_level
    for one in job.generations:
        text = f" text={one.text[: None if level >= 3 else LOGGED_CHARS]!r}" if level >= 2 else ""
        finish = one.finish.type if one.finish else "none"
        e2e_s = (one.timings.finished or one.timings.created) - one.timings.created
        counts = (one.completion_tokens, one.cached_tokens, e2e_s)
        logger.info(
            "Finish: rid=%s finish=%s completion_tokens=%d cached_tokens=%d e2e_s=%.3f%s",
            one.rid,
            finish,
            *counts,
            text,
        )
