"""What both OpenAI routes share: the model's name, sampling with its defaults, usage, log-probabilities."""

from collections.abc import Iterable, Sequence

import msgspec

from baton.engine.detokenizer import Vocabulary
from baton.engine.server.context import ServerContext
from baton.engine.server.generation import Generation, cached_details
from baton.engine.server.intake import Handover, Hop, join_keys
from baton.protocol.errors import ErrorInfo, RequestError, bad_request
from baton.protocol.openai import (
    MAX_TOP_LOGPROBS,
    ChatCompletionRequest,
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    CompletionRequest,
    PromptTokensDetails,
    TopLogprob,
    Usage,
    UsageChunk,
)
from baton.protocol.rank import TokenLogprobs
from baton.protocol.sampling import SamplingParams

OpenAIRequest = ChatCompletionRequest | CompletionRequest

_DIRECT = (
    "frequency_penalty", "presence_penalty", "logit_bias", "n", "seed", "stop", "stop_token_ids", "no_stop_trim",
    "ignore_eos", "skip_special_tokens",
)  # fmt: skip
_WITH_MODEL_DEFAULT = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def check_model(ctx: ServerContext, model: str | None) -> str:
    """The name to answer with. Raises `RequestError` (404) for another model than ours; a trailing slash is no difference."""
    if model is None:
        return ctx.args.name
    if model.rstrip("/") != ctx.args.name.rstrip("/"):
        message = f"The model `{model}` does not exist. This worker serves `{ctx.args.name}`."
        raise RequestError(ErrorInfo("NotFoundError", 404, message, ctx.stage, param="model"))
    return model


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


def handover_of(body: OpenAIRequest) -> Handover:
    return Handover(body.bootstrap_host, body.bootstrap_port, body.bootstrap_room)


def extra_key_of(body: OpenAIRequest) -> str | None:
    return join_keys(body.cache_salt, body.extra_key)


def check_top_logprobs(num: int, field: str) -> int:
    if not 0 <= num <= MAX_TOP_LOGPROBS:
        raise bad_request(f"{field} must be in [0, {MAX_TOP_LOGPROBS}], got {num}.", field)
    return num


def created_of(ctx: ServerContext, hop: Hop, now_s: float) -> int:
    """`created` of a response; a resumed stream keeps its first one."""
    return int(now_s) if hop.resume is None or hop.resume.created is None else hop.resume.created


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


def usage_event(chunk: UsageChunk) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def usage_object(usage: Usage) -> dict[str, object]:
    """Usage for the last stream event, where nulls are left out."""
    found: dict[str, object] = {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.total_tokens,
        "completion_tokens": usage.completion_tokens,
    }
    if usage.prompt_tokens_details is not None:
        found["prompt_tokens_details"] = usage.prompt_tokens_details
    return found


def chat_logprobs(vocabulary: Vocabulary | None, positions: Sequence[TokenLogprobs]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                _text(vocabulary, one.token_id),
                _bytes(vocabulary, one.token_id),
                one.logprob if one.logprob is not None else 0.0,
                [
                    TopLogprob(_text(vocabulary, token), _bytes(vocabulary, token), logprob)
                    for token, logprob in one.top
                ],
            )
            for one in positions
        ]
    )


def completion_logprobs(
    vocabulary: Vocabulary | None, positions: Sequence[TokenLogprobs], first_offset: int
) -> CompletionLogprobs:
    """`first_offset` is the first token's place in the text, in characters."""
    logprobs = CompletionLogprobs([], [], [], [])
    offset = first_offset
    for one in positions:
        token = _text(vocabulary, one.token_id)
        logprobs.text_offset.append(offset)
        logprobs.token_logprobs.append(one.logprob)
        logprobs.tokens.append(token)
        top = None if one.logprob is None else {_text(vocabulary, other): logprob for other, logprob in one.top}
        logprobs.top_logprobs.append(top)
        offset += len(token)
    return logprobs


def _text(vocabulary: Vocabulary | None, token_id: int) -> str:
    return f"token_id:{token_id}" if vocabulary is None else vocabulary.token_text(token_id)


def _bytes(vocabulary: Vocabulary | None, token_id: int) -> list[int]:
    return [] if vocabulary is None else list(vocabulary.logprob_bytes(token_id))
