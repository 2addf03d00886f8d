"""Wire types of the OpenAI routes as SGLang 0.4.10 writes them: key names, key order, and which nulls are written.

Requests carry OpenAI's fields, SGLang's extensions and the hand-over fields (`bootstrap_*`); `None` means "not given".
Fields that would change an answer and are not served are listed with the reason, to be refused by name. Responses are
structs whose field order is the JSON key order. Not here: how a request is served (`baton.engine.server`).
"""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

REFUSED_FIELDS = {
    "functions": "function calling is not served yet",
    "function_call": "function calling is not served yet",
    "regex": "constrained output is not served yet",
    "ebnf": "constrained output is not served yet",
    "json_schema": "constrained output is not served yet",
    "structural_tag": "constrained output is not served yet",
    "stop_regex": "stop regexes are not served; use stop or stop_token_ids",
    "suffix": "fill-in-the-middle is not served",
    "audio": "only text is served",
    "web_search_options": "web search is not served",
    "lora_path": "no LoRA adapters are loaded",
    "session_params": "sessions are not served; the prefix cache makes a repeated prompt cheap",
    "custom_logit_processor": "code from a request is never run",
    "custom_params": "custom logit processors are not run",
    "return_hidden_states": "hidden states are not returned",
}
"""Refused when set to anything but null, false or empty."""

IGNORED_FIELDS = frozenset(
    (
        "user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
        "prediction", "verbosity", "disagg_prefill_dp_rank", "separate_reasoning", "stream_reasoning", "tool_choice", "modalities", "best_of",
    )
)  # fmt: skip
"""Accepted without effect (the last three only with values that change no answer)."""

MAX_TOP_LOGPROBS = 128


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _SamplingFields(msgspec.Struct, kw_only=True):
    """What both OpenAI routes share."""

    model: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    # SGLang's extensions.
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    no_stop_trim: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: str | None = None
    extra_key: str | None = None
    priority: int | None = None
    return_cached_tokens: bool | None = None
    bootstrap_host: str | list[str] | None = None
    bootstrap_port: int | list[int | None] | None = None
    bootstrap_room: int | list[int] | None = None
    routed_dp_rank: int | None = None
    """The data-parallel engine to use."""
    data_parallel_rank: int | None = None
    """Its older name."""
    kv_transfer_params: dict[str, Any] | None = None
    """vLLM's; read by its dialect."""
    baton_resume: Any = None
    """`hops.RESUME_FIELD`."""


class ChatCompletionRequest(_SamplingFields, kw_only=True):
    """Body of POST /v1/chat/completions. Messages stay plain objects: a model's template may read any key of them."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    rid: str | None = None


class CompletionRequest(_SamplingFields, kw_only=True):
    """Body of POST /v1/completions. `prompt`: text, texts, token ids, or lists of token ids."""

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    rid: str | list[str] | None = None
    """A list has one id for each prompt."""
    response_format: dict[str, Any] | None = None


class CachedTokensDetails(msgspec.Struct):
    """Where cached prompt tokens came from (SGLang's names)."""

    device: int = 0
    host: int = 0
    storage: int = 0


class PromptTokensDetails(msgspec.Struct, omit_defaults=True):
    cached_tokens: int
    cached_tokens_details: CachedTokensDetails | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


def usage_object(usage: Usage) -> dict[str, Any]:
    """Usage for the last stream event, where nulls are left out."""
    found: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.total_tokens,
        "completion_tokens": usage.completion_tokens,
    }
    if usage.prompt_tokens_details is not None:
        found["prompt_tokens_details"] = usage.prompt_tokens_details
    return found


class TopLogprob(msgspec.Struct):
    token: str
    bytes: list[int]
    logprob: float


class ChatTokenLogprob(msgspec.Struct):
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]


class CompletionLogprobs(msgspec.Struct):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class ChatMessage(msgspec.Struct):
    role: str
    content: str | None
    reasoning_content: str | None = None
    tool_calls: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    matched_stop: int | str | None


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class DeltaMessage(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: None = None


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: DeltaMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: int | str | None = None


class ChatChunk(msgspec.Struct):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionChoice(msgspec.Struct):
    """The same in a response and in a stream event."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    matched_stop: int | str | None


class Completion(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class UsageChunk(msgspec.Struct):
    """The last event of a stream with `stream_options.include_usage`; here SGLang leaves nulls out."""

    id: str
    object: Literal["chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: list[Any]
    usage: dict[str, Any]


class OpenAIError(msgspec.Struct):
    """SGLang's error body on the OpenAI routes."""

    object: Literal["error"]
    message: str
    type: str
    param: str | None
    code: int


class ModelCard(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: Sequence[Any]
    """Cards: `ModelCard`, or another dialect's."""
