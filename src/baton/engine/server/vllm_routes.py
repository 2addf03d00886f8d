"""vLLM's routes beside generation: version, ping, load, models, tokenising."""

import uuid

from starlette.requests import Request
from starlette.responses import Response

import baton
from baton.engine.server import admin
from baton.engine.server.context import ServerContext
from baton.engine.server.intake import check_token_ids, convert, read_object
from baton.engine.server.openai_common import check_model
from baton.engine.server.vllm_dialect import VllmDialect
from baton.protocol.errors import bad_request
from baton.protocol.openai import ModelList
from baton.protocol.pod import manifest_path
from baton.protocol.vllm import ModelCard, ModelPermission, Tokenized, TokenizeRequest
from baton.text.messages import chat_prompt

SHAPE_VERSION = "0.10.0"
"""The vLLM whose answers these are."""


async def version(ctx: ServerContext, request: Request) -> Response:
    return admin.json_response({"version": f"{SHAPE_VERSION}+baton.{baton.__version__}"})


async def ping(ctx: ServerContext, request: Request) -> Response:
    return await admin.health(ctx, request)


async def load(ctx: ServerContext, request: Request) -> Response:
    """Requests in progress; 0 without --enable-server-load-tracking."""
    assert isinstance(ctx.dialect, VllmDialect)
    return admin.json_response({"server_load": ctx.engines.num_requests if ctx.dialect.tracks_load else 0})


def _cards(ctx: ServerContext) -> list[ModelCard]:
    assert isinstance(ctx.dialect, VllmDialect)
    root = manifest_path(ctx.args.model_path)
    return [
        ModelCard(
            name, "model", ctx.created, "vllm", root, None, ctx.ready.context_len,
            [ModelPermission(f"modelperm-{uuid.uuid4().hex}", "model_permission", ctx.created)],
        )
        for name in ctx.dialect.served_names or (ctx.args.name,)
    ]  # fmt: skip


async def models(ctx: ServerContext, request: Request) -> Response:
    return admin.json_response(ModelList("list", _cards(ctx)))


async def model(ctx: ServerContext, request: Request) -> Response:
    asked = request.path_params["model"]
    check_model(ctx, asked)
    return admin.json_response(next(card for card in _cards(ctx) if card.id == asked))


async def tokenize(ctx: ServerContext, request: Request) -> Response:
    """A prompt, or messages as the chat template writes them."""
    body = convert(await read_object(request), TokenizeRequest)
    check_model(ctx, body.model)
    tokenizer = ctx.need_tokenizer()
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either prompt or messages.", "prompt")
    if body.prompt is not None:
        add_special_tokens = body.add_special_tokens is not False
        tokens = await tokenizer.encode_async(body.prompt, add_special_tokens=add_special_tokens)
    else:
        if ctx.chat_template is None:
            raise bad_request("this model has no chat template: give --chat-template, or send a prompt.", "messages")
        text = chat_prompt(
            ctx.chat_template,
            body.messages or [],
            template_kwargs=body.chat_template_kwargs,
            reasoning_effort=None,
            continue_final_message=body.continue_final_message,
            add_generation_prompt=body.add_generation_prompt,
        )
        tokens = await tokenizer.encode_async(text, add_special_tokens=bool(body.add_special_tokens))
    strings = [tokenizer.vocabulary.token_text(one) for one in tokens] if body.return_token_strs else None
    return admin.json_response(Tokenized(len(tokens), ctx.ready.context_len, tokens, strings))


async def detokenize(ctx: ServerContext, request: Request) -> Response:
    raw = await read_object(request)
    check_model(ctx, convert(raw.get("model"), str | None, "model"))  # type: ignore[arg-type]
    tokens = convert(raw.get("tokens"), list[int], "tokens")
    check_token_ids(ctx, tokens, "tokens")
    return admin.json_response({"prompt": ctx.need_tokenizer().decode(tokens, skip_special_tokens=False)})


async def reset_prefix_cache(ctx: ServerContext, request: Request) -> Response:
    reply = await ctx.engines.flush_cache()
    return Response(status_code=200 if reply.ok else 409)


VLLM_ROUTES = (
    ("/version", ("GET",), version),
    ("/ping", ("GET", "POST"), ping),
    ("/load", ("GET",), load),
    ("/v1/models", ("GET",), models),
    ("/v1/models/{model:path}", ("GET",), model),
    ("/tokenize", ("POST",), tokenize),
    ("/detokenize", ("POST",), detokenize),
    ("/reset_prefix_cache", ("POST",), reset_prefix_cache),
    ("/v1/load_lora_adapter", ("POST",), admin.not_served),
    ("/v1/unload_lora_adapter", ("POST",), admin.not_served),
    ("/v1/audio/transcriptions", ("POST",), admin.not_served),
    ("/pooling", ("POST",), admin.not_served),
    ("/classify", ("POST",), admin.not_served),
    ("/score", ("POST",), admin.not_served),
    ("/rerank", ("POST",), admin.not_served),
    ("/v2/rerank", ("POST",), admin.not_served),
    ("/invocations", ("POST",), admin.not_served),
)
OPEN_PATHS = frozenset(("/version", "/ping", "/load", "/tokenize", "/detokenize"))
"""Open with --api-key too, as in vLLM."""
