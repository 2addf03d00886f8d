"""What both OpenAI routes share: the model's name, sampling with its defaults, usage, log-probabilities."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from baton.engine.server.context import ServerContext
from baton.engine.server.dialect import Head, Kind
from baton.engine.server.generation import Generation, cached_details
from baton.engine.server.handover import Handover
from baton.engine.server.intake import Hop, join_keys
from baton.protocol.errors import ErrorInfo, RequestError, bad_request
from baton.protocol.openai import (
    MAX_TOP_LOGPROBS,
    ChatCompletionRequest,
    CompletionRequest,
    PromptTokensDetails,
    Usage,
)
from baton.protocol.sampling import SamplingParams

OpenAIRequest = ChatCompletionRequest | CompletionRequest

_DIRECT = (
    "frequency_penalty", "presence_penalty", "logit_bias", "n", "seed", "stop", "stop_token_ids", "no_stop_trim",
    "ignore_eos", "skip_special_tokens",
)  # fmt: skip
_WITH_MODEL_DEFAULT = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def check_model(ctx: ServerContext, model: str | None) -> str:
    """The name to answer with. Raises `RequestError` (404) for another model than ours."""
    served = ctx.dialect.served_model(ctx.args, model)
    if served is None:
        message = (
            f"The model `{model}` does not exist. This worker serves `{ctx.dialect.served_model(ctx.args, None)}`."
        )
        raise RequestError(ErrorInfo("NotFoundError", 404, message, ctx.stage, param="model"))
    return served


def refuse_constraints(body: OpenAIRequest) -> None:
    """Response formats need a grammar, which no worker has yet; plain text is fine."""
    if body.response_format is not None and body.response_format.get("type") != "text":
        kind = body.response_format.get("type")
        raise bad_request(f"response_format is not supported: type {kind!r}; only text.", "response_format")


def sampling_of(ctx: ServerContext, body: OpenAIRequest, max_tokens: int | None) -> SamplingParams:
    """OpenAI's fields as sampling parameters; what is not given comes from the model's generation config."""
    for name, value in (("max_tokens", max_tokens), ("min_tokens", body.min_tokens)):
        if value is not None and value < 0:  # under the name that the client used, not the scheduler's
            raise bad_request(f"{name} must be at least 0, got {value}.", name)
    values = {name: getattr(body, name) for name in _DIRECT}
    for name in _WITH_MODEL_DEFAULT:
        value = getattr(body, name)
        values[name] = ctx.sampling_defaults.get(name) if value is None else value
    if values["top_k"] == 0:
        values["top_k"] = -1  # transformers' way to say no limit, found in generation configs
    values["min_new_tokens"] = body.min_tokens
    given = {name: value for name, value in values.items() if value is not None}
    return SamplingParams(max_new_tokens=max_tokens, **given)


def handover_of(ctx: ServerContext, body: OpenAIRequest) -> Handover:
    return ctx.dialect.handover(ctx.args, msgspec.structs.asdict(body))


def extra_key_of(body: OpenAIRequest) -> str | None:
    return join_keys(body.cache_salt, body.extra_key)


def check_top_logprobs(num: int, field: str) -> int:
    if not 0 <= num <= MAX_TOP_LOGPROBS:
        raise bad_request(f"{field} must be in [0, {MAX_TOP_LOGPROBS}], got {num}.", field)
    return num


def head_of(ctx: ServerContext, kind: Kind, request_id: str, hop: Hop, model: str, raw: Mapping[str, Any]) -> Head:
    """`raw`: the body as it came. A resumed stream keeps its first `created`."""
    created = int(time.time()) if hop.resume is None or hop.resume.created is None else hop.resume.created
    vocabulary = ctx.dialect.logprob_vocabulary(raw, ctx.tokenizer.vocabulary if ctx.tokenizer else None)
    return Head(ctx.dialect.response_id(kind, request_id), created, model, vocabulary)


def usage_of(
    ctx: ServerContext, body: OpenAIRequest, generations: Iterable[Generation], prompt_tokens: int | None = None
) -> Usage:
    """A prompt counts once, however many answers it got. `prompt_tokens`: of the whole request; none: of `generations`,
    which leave out what had finished before a stream was resumed."""
    n = body.n or 1
    prompt = completion = cached = 0
    prompts: list[Generation] = []
    seen: set[int] = set()
    for one in generations:
        completion += one.completion_tokens
        if one.index // n not in seen:
            seen.add(one.index // n)
            prompt += one.prompt_tokens
            cached += one.cached_tokens
            prompts.append(one)
    reports_cache = ctx.args.enable_cache_report or bool(body.return_cached_tokens)
    if prompt_tokens is not None:
        prompt = prompt_tokens
    details = (
        PromptTokensDetails(cached, cached_details(prompts, is_wanted=ctx.args.has_tiers)) if reports_cache else None
    )
    return Usage(prompt, prompt + completion, completion, details)
