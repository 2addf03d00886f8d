"""Wire types of the OpenAI routes as vLLM 0.10 writes them: key names, key order, and which keys a stream event leaves out.

Requests are SGLang's structs (`openai`) after `RENAMED_FIELDS`; here are the fields that only vLLM has. Responses are structs whose
field order is the JSON key order; `UNSET` values are not written, as pydantic leaves out what nobody set.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from baton.protocol import openai

RENAMED_FIELDS = {"include_stop_str_in_output": "no_stop_trim", "request_id": "rid"}
"""vLLM's name -> the name it has in `openai`'s requests."""

_GRAMMAR = "constrained output is not served yet"
REFUSED_FIELDS = openai.REFUSED_FIELDS | {
    "guided_json": _GRAMMAR,
    "guided_regex": _GRAMMAR,
    "guided_choice": _GRAMMAR,
    "guided_grammar": _GRAMMAR,
    "structured_outputs": _GRAMMAR,
    "use_beam_search": "beam search is not served",
    "prompt_logprobs": "use echo with logprobs on /v1/completions",
    "truncate_prompt_tokens": "prompts are not cut; send what fits",
    "allowed_token_ids": "use logit_bias",
    "bad_words": "use logit_bias",
    "logits_processors": "code from a request is never run",
    "vllm_xargs": "there are no extensions that read it",
    "prompt_embeds": "prompts are text or token ids",
    "documents": "give them to the template with chat_template_kwargs",
    "chat_template": "the server's --chat-template is used",
    "mm_processor_kwargs": "only text is served",
}
"""Refused when set to anything but null, false or empty."""
IGNORED_FIELDS = openai.IGNORED_FIELDS | {
    "include_reasoning", "length_penalty", "spaces_between_special_tokens", "guided_decoding_backend",
    "guided_whitespace_pattern", "add_special_tokens",
}  # fmt: skip
"""Accepted without effect: what they shape is not served, or never differs."""


class ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]


class ChatMessage(msgspec.Struct):
    role: str
    reasoning_content: str | None
    content: str | None
    tool_calls: list[Any]


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: openai.Usage
    prompt_logprobs: None = None
    kv_transfer_params: dict[str, Any] | None = None


class DeltaMessage(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: DeltaMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET


class ChatChunk(msgspec.Struct):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: openai.Usage | UnsetType = UNSET


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: openai.CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_logprobs: None = None


class Completion(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: openai.Usage
    kv_transfer_params: dict[str, Any] | None = None


class CompletionChunkChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: openai.CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


class CompletionChunk(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: openai.Usage | None = None


class ModelPermission(msgspec.Struct):
    id: str
    object: Literal["model_permission"]
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class ModelCard(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["vllm"]
    root: str
    parent: str | None
    max_model_len: int
    permission: list[ModelPermission]


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize: `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    """None: for a prompt, not for messages."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class Tokenized(msgspec.Struct):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None
