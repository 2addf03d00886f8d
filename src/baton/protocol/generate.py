"""Wire types of SGLang's native route `/generate`: names, defaults and key order are SGLang's.

A request holds one prompt or a batch of them; `None` means "not given". Fields that SGLang has and we do not serve are
listed with the reason, so that a request that needs one is refused by name instead of answered wrongly. Not here: how a
request is served (`baton.engine.server.native`).
"""

from typing import Any

import msgspec

REFUSED_GENERATE_FIELDS = {
    "input_embeds": "prompts are text or token ids",
    "image_data": "only text models are served",
    "video_data": "only text models are served",
    "audio_data": "only text models are served",
    "lora_path": "no LoRA adapters are loaded",
    "lora_id": "no LoRA adapters are loaded",
    "session_params": "sessions are not served; the prefix cache makes a repeated prompt cheap",
    "custom_logit_processor": "code from a request is never run",
    "return_hidden_states": "hidden states are not returned",
}
"""Refused when set to anything but null, false or empty."""

IGNORED_GENERATE_FIELDS = frozenset(
    (
        "log_metrics", "modalities", "disagg_prefill_dp_rank", "background", "conversation_id", "no_logs", "custom_labels",
        "stream_options", "bootstrap_pair_key", "return_bytes", "image_max_dynamic_patch",
    )
)  # fmt: skip
"""Accepted without effect: they change no answer. (disagg_prefill_dp_rank: the room says it, as it does to the prefill worker.)"""

REFUSED_SAMPLING_FIELDS = {
    "stop_regex": "stop regexes are not served; use stop or stop_token_ids",
    "json_schema": "constrained output is not served yet",
    "regex": "constrained output is not served yet",
    "ebnf": "constrained output is not served yet",
    "structural_tag": "constrained output is not served yet",
    "custom_params": "custom logit processors are not run",
}


class GenerateRequest(msgspec.Struct, kw_only=True):
    """Body of POST /generate. Exactly one of `text` and `input_ids`; a list (of lists) makes a batch, whose other fields
    are lists of the same length or one value for all."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: list[int | list[int] | None] | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    rid: str | list[str] | None = None
    extra_key: str | list[str] | None = None
    cache_salt: str | list[str] | None = None
    priority: int | None = None
    bootstrap_host: str | list[str] | None = None
    bootstrap_port: int | list[int | None] | None = None
    bootstrap_room: int | list[int] | None = None
    routed_dp_rank: int | None = None
    """The data-parallel engine to use."""
    data_parallel_rank: int | None = None
    """Its older name."""
    baton_resume: Any = None
    """`hops.RESUME_FIELD`."""


class AbortRequest(msgspec.Struct, kw_only=True):
    """Body of POST /abort_request: every request whose id starts with `rid`, or all."""

    rid: str | None = None
    abort_all: bool = False
    abort_message: str | None = None


LogprobTriple = tuple[float | None, int, str | None]
"""(logprob, token id, text or null): how SGLang writes one token's log-probability."""
