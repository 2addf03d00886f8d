"""Routes beside generation: health, information, cache, aborts, metrics, models, tokenising."""

import asyncio
import contextlib
import itertools
import time

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

import baton
from baton.engine.args import public_args
from baton.engine.server.client import CALL_TIMEOUT_S, RankLostError
from baton.engine.server.context import ServerContext
from baton.engine.server.intake import check_token_ids, convert, read_object
from baton.engine.server.openai_common import check_model
from baton.protocol.errors import ErrorInfo, RequestError, bad_request
from baton.protocol.generate import AbortRequest
from baton.protocol.openai import ModelCard, ModelList
from baton.protocol.rank import FAKE_BOOTSTRAP_HOST, Bootstrap, SchedulerState, Submit
from baton.protocol.sampling import SamplingParams

HEALTH_WAIT_S = 1.0
"""How long /health waits for a busy rank before it answers from what it knows."""
SNAPSHOT_TIMEOUT_S = 2.0
FLUSH_BODY = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)

_check_ids = itertools.count()


def json_response(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def fake_bootstrap(ctx: ServerContext, room: int) -> Bootstrap | None:
    """The hand-over fields of a request that this worker sends to itself."""
    return Bootstrap(FAKE_BOOTSTRAP_HOST, None, room) if ctx.is_disaggregated else None


async def health(ctx: ServerContext, request: Request) -> Response:
    """200 while every rank answers, or is busy for less than `CALL_TIMEOUT_S`; 503 else."""
    if not _is_up(ctx):
        return Response(status_code=503)
    if ctx.engines.silence_s() == 0.0:
        with contextlib.suppress(RankLostError):
            await ctx.engines.states(HEALTH_WAIT_S)
    is_hung = ctx.engines.silence_s() > CALL_TIMEOUT_S
    return Response(status_code=503 if is_hung or not _is_up(ctx) else 200)


async def health_generate(ctx: ServerContext, request: Request) -> Response:
    """Generate one token on every engine; healthy if all ranks say anything at all in time."""
    if not _is_up(ctx):
        return Response(status_code=503)
    started = time.monotonic()
    number = next(_check_ids)
    submits = [
        Submit(
            rid=f"HEALTH_CHECK_{time.time()}_{number}_{index}",
            input_ids=[0],
            sampling=SamplingParams(max_new_tokens=1, temperature=0.0),
            bootstrap=fake_bootstrap(ctx, 2**62 + number),
            timeout_s=CALL_TIMEOUT_S,
        )
        for index in range(ctx.engines.count)
    ]
    job = ctx.engines.submit_to_each(submits)
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await job.changed()
            while not ctx.engines.heard_since(started):
                await job.changed()
    except TimeoutError:
        return Response(status_code=200 if ctx.engines.heard_since(started) else 503)
    finally:
        job.close("health check is over")
    return Response(status_code=503 if ctx.engines.lost_reason else 200)


def _is_up(ctx: ServerContext) -> bool:
    return ctx.is_warm and not ctx.is_stopping and ctx.engines.lost_reason is None


async def model_info(ctx: ServerContext, request: Request) -> Response:
    return json_response(
        {
            "model_path": ctx.args.model_path,
            "tokenizer_path": ctx.args.tokenizer_path or ctx.args.model_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": "default",
            "has_image_understanding": False,
            "has_audio_understanding": False,
        }
    )


async def weight_version(ctx: ServerContext, request: Request) -> Response:
    return json_response({"weight_version": "default"})


async def server_info(ctx: ServerContext, request: Request) -> Response:
    """The flags, the sizes of an engine's KV pool, the state of each engine; bench tools and routers read it."""
    states = await ctx.engines.snapshots(SNAPSHOT_TIMEOUT_S)
    info = {
        **public_args(ctx.args),
        "max_total_num_tokens": ctx.ready.max_total_num_tokens,
        "max_req_input_len": ctx.ready.max_req_input_len,
        "device": ctx.ready.device,
        "attention_backend": ctx.ready.attention_backend,
        "page_size": ctx.ready.page_size,
        "context_length": ctx.ready.context_len,
        "disaggregation_bootstrap_port": ctx.ready.bootstrap_port or ctx.args.disaggregation_bootstrap_port,
        "internal_states": [_internal_state(one) for one in states],
        "page_ownership": await _page_ownership(ctx),
        "ignored_request_fields": ctx.unknown_fields,
        "version": baton.__version__,
    }
    return json_response(info)


def _internal_state(state: SchedulerState) -> dict[str, object]:
    return {
        "last_gen_throughput": state.gen_throughput,
        "avg_spec_accept_length": None,
        **{name: value for name, value in msgspec.structs.asdict(state).items() if name != "call_id"},
    }


async def _page_ownership(ctx: ServerContext) -> str:
    """ "ok", or what the rank's self-check found: each page must be exactly one of free, evictable, protected, in use."""
    try:
        reply = await ctx.engines.check_integrity(SNAPSHOT_TIMEOUT_S)
    except RankLostError as error:
        return f"not checked: {error}"
    return "ok" if reply.ok else reply.message


async def load(ctx: ServerContext, request: Request) -> Response:
    """One row for each engine."""
    rows = [
        {
            "dp_rank": client.dp_rank,
            "num_reqs": state.num_running + state.num_waiting,
            "num_waiting_reqs": state.num_waiting,
            "num_tokens": state.num_used_tokens,
        }
        for client, state in zip(ctx.engines.clients, await ctx.engines.snapshots(SNAPSHOT_TIMEOUT_S), strict=True)
    ]
    return json_response(rows)


async def metrics(ctx: ServerContext, request: Request) -> Response:
    ctx.scheduler_metrics.states = await ctx.engines.snapshots(SNAPSHOT_TIMEOUT_S)
    return Response(generate_latest(ctx.registry), media_type=CONTENT_TYPE_LATEST)


async def flush_cache(ctx: ServerContext, request: Request) -> Response:
    reply = await ctx.engines.flush_cache()
    return Response(FLUSH_BODY, 200 if reply.ok else 400, media_type="text/plain")


async def clear_store(ctx: ServerContext, request: Request) -> Response:
    reply = await ctx.engines.clear_store()
    text = "Hierarchical cache storage backend cleared.\n" if reply.ok else f"Not cleared: {reply.message}\n"
    return Response(text, 200 if reply.ok else 400, media_type="text/plain")


async def abort_request(ctx: ServerContext, request: Request) -> Response:
    body = convert(await read_object(request), AbortRequest)
    if not body.abort_all and not body.rid:
        raise bad_request("rid must be given (every request whose id starts with it ends), or abort_all.", "rid")
    ctx.engines.abort("" if body.abort_all else body.rid or "", reason=body.abort_message or "Aborted")
    return Response(status_code=200)


def _card(ctx: ServerContext) -> ModelCard:
    name = ctx.args.name
    return ModelCard(name, "model", ctx.created, "sglang", name, None, ctx.ready.context_len)


async def models(ctx: ServerContext, request: Request) -> Response:
    return json_response(ModelList("list", [_card(ctx)]))


async def model(ctx: ServerContext, request: Request) -> Response:
    check_model(ctx, request.path_params["model"])
    return json_response(_card(ctx))


async def tokenize(ctx: ServerContext, request: Request) -> Response:
    raw = await read_object(request)
    check_model(ctx, convert(raw.get("model"), str | None, "model"))  # type: ignore[arg-type]
    prompt: str | list[str] = convert(raw.get("prompt"), str | list[str], "prompt")  # type: ignore[arg-type]
    add_special_tokens = convert(raw.get("add_special_tokens", True), bool, "add_special_tokens")
    tokenizer = ctx.need_tokenizer()
    texts = [prompt] if isinstance(prompt, str) else prompt
    tokens = [await tokenizer.encode_async(text, add_special_tokens=add_special_tokens) for text in texts]
    counts = [len(one) for one in tokens]
    is_one = isinstance(prompt, str)
    return json_response(
        {
            "tokens": tokens[0] if is_one else tokens,
            "count": counts[0] if is_one else counts,
            "max_model_len": ctx.ready.context_len,
        }
    )


async def detokenize(ctx: ServerContext, request: Request) -> Response:
    raw = await read_object(request)
    check_model(ctx, convert(raw.get("model"), str | None, "model"))  # type: ignore[arg-type]
    skip = convert(raw.get("skip_special_tokens", True), bool, "skip_special_tokens")
    tokens = convert(raw.get("tokens"), list[int | list[int]], "tokens")
    is_batch = bool(tokens) and isinstance(tokens[0], list)
    batch = convert(tokens if is_batch else [tokens], list[list[int]], "tokens")
    for one in batch:
        check_token_ids(ctx, one, "tokens")
    tokenizer = ctx.need_tokenizer()
    texts = [tokenizer.decode(one, skip_special_tokens=skip) for one in batch]
    return json_response({"text": texts if is_batch else texts[0]})


async def not_served(ctx: ServerContext, request: Request) -> Response:
    """SGLang has this route; say so rather than answer like for a typing error."""
    raise RequestError(ErrorInfo("NotImplementedError", 501, f"{request.url.path} is not served yet."))
