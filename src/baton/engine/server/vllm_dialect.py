"""vLLM 0.10's documents and events. Errors are nested as of 0.10.1, which OpenAI's clients of every version read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import UNSET
from prometheus_client import CollectorRegistry

from baton.engine.args import EngineArgs
from baton.engine.detokenizer import Vocabulary
from baton.engine.server.dialect import Choice, Head, Kind
from baton.engine.server.handover import Handover
from baton.engine.server.kv_params import handover_of_params, params_of_answer
from baton.engine.server.logprobs import completion_logprobs, token_bytes, token_text
from baton.engine.server.sglang_dialect import SGLANG
from baton.engine.server.vllm_metrics import VllmRequestMetrics, VllmSchedulerMetrics
from baton.protocol.errors import ErrorInfo, bad_request
from baton.protocol.openai import PromptTokensDetails, Usage, UsageChunk, usage_object
from baton.protocol.rank import Ready
from baton.protocol.vllm import (
    IGNORED_FIELDS,
    REFUSED_FIELDS,
    RENAMED_FIELDS,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    DeltaMessage,
)


@dataclass(frozen=True, slots=True)
class VllmDialect:
    """One server's settings of vLLM's HTTP; the names are those of its flags."""

    served_names: tuple[str, ...] = ()
    """The first one is in answers; (): the worker's one name."""
    response_role: str = "assistant"
    max_logprobs: int = 20
    tokens_as_token_ids: bool = False
    always_usage: bool = False
    tracks_load: bool = False
    own_host: str = "127.0.0.1"
    """Where decode servers reach this one, when it is a kv_producer or kv_both."""

    name: Literal["vllm"] = "vllm"
    refused_fields = REFUSED_FIELDS
    ignored_fields = IGNORED_FIELDS

    def fields(self, raw: dict[str, Any]) -> dict[str, Any]:
        found = {RENAMED_FIELDS.get(name, name): value for name, value in raw.items()}
        found.pop("return_tokens_as_token_ids", None)  # `logprob_vocabulary` has read it
        for name in ("top_logprobs", "logprobs"):
            asked = raw.get(name)
            if isinstance(asked, int) and asked > self.max_logprobs:
                message = (
                    f"Requested sample logprobs of {asked}, which is greater than max allowed: {self.max_logprobs}"
                )
                raise bad_request(message, name)
        if "messages" in raw and found.pop("echo", None):
            raise bad_request("echo is not supported: the messages are not repeated.", "echo")
        # Without the generation prompt there is nothing to answer, unless the last message is continued.
        if found.pop("add_generation_prompt", None) is False and not found.get("continue_final_message"):
            message = "add_generation_prompt is not supported: false only with continue_final_message."
            raise bad_request(message, "add_generation_prompt")
        return found

    def served_model(self, args: EngineArgs, asked: str | None) -> str | None:
        names = self.served_names or (args.name,)
        return names[0] if asked is None or asked in names else None

    def handover(self, args: EngineArgs, fields: Mapping[str, Any]) -> Handover:
        """vLLM's, or SGLang's, whose fields our own router adds."""
        if fields.get("bootstrap_room") is not None and fields.get("kv_transfer_params") is None:
            return SGLANG.handover(args, fields)
        own = (self.own_host, args.disaggregation_bootstrap_port)
        return handover_of_params(args.disaggregation_mode, fields.get("kv_transfer_params"), own)

    def early_answer(self, handover: Handover) -> dict[str, Any] | None:
        return params_of_answer(handover) if handover.side == "prefill" else None

    def response_id(self, kind: Kind, request_id: str) -> str:
        return f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{request_id}"

    def logprob_vocabulary(self, raw: Mapping[str, Any], vocabulary: Vocabulary | None) -> Vocabulary | None:
        asked = raw.get("return_tokens_as_token_ids")
        return None if (self.tokens_as_token_ids if asked is None else asked) else vocabulary

    def wants_usage(self, asked: bool) -> bool:
        return asked or self.always_usage

    def chat_document(
        self, head: Head, choices: Sequence[Choice], usage: Usage, early: dict[str, Any] | None = None
    ) -> ChatCompletion:
        found = [
            ChatChoice(
                one.index,
                ChatMessage(self.response_role, None, one.text, []),
                _chat_logprobs(head, one),
                one.finish_reason if early is None else "length",
                _stop_reason(one),
            )
            for one in choices
        ]
        written = _usage(usage)
        return ChatCompletion(
            head.id, "chat.completion", head.created, head.model, found, written, kv_transfer_params=early
        )

    def chat_role_chunk(self, head: Head, index: int) -> ChatChunk:
        delta = DeltaMessage(self.response_role, "")
        return self._chat_chunk(head, ChatChunkChoice(index, delta), None)

    def chat_chunks(self, head: Head, choice: Choice, usage: Usage | None) -> list[ChatChunk]:
        """The last text and the end are one event."""
        found = ChatChunkChoice(
            choice.index,
            DeltaMessage(content=choice.text),
            _chat_logprobs(head, choice) if choice.has_news else None,
            choice.finish_reason,
            UNSET if choice.finish is None else _stop_reason(choice),
        )
        return [self._chat_chunk(head, found, usage)]

    def _chat_chunk(self, head: Head, choice: ChatChunkChoice, usage: Usage | None) -> ChatChunk:
        written = UNSET if usage is None else _usage(usage)
        return ChatChunk(head.id, "chat.completion.chunk", head.created, head.model, [choice], written)

    def completion_document(
        self, head: Head, choices: Sequence[Choice], usage: Usage, early: dict[str, Any] | None = None
    ) -> Completion:
        found = [
            CompletionChoice(
                one.index,
                one.text,
                _completion_logprobs(head, one),
                one.finish_reason if early is None else "length",
                _stop_reason(one),
            )
            for one in choices
        ]
        return Completion(head.id, "text_completion", head.created, head.model, found, _usage(usage), early)

    def completion_chunk(self, head: Head, choice: Choice, usage: Usage | None) -> CompletionChunk:
        found = CompletionChunkChoice(
            choice.index, choice.text, _completion_logprobs(head, choice), choice.finish_reason, _stop_reason(choice)
        )
        written = None if usage is None else _usage(usage)
        return CompletionChunk(head.id, "text_completion", head.created, head.model, [found], written)

    def usage_chunk(self, head: Head, kind: Kind, usage: Usage) -> UsageChunk:
        kind_name: Literal["chat.completion.chunk", "text_completion"] = (
            "chat.completion.chunk" if kind == "chat" else "text_completion"
        )
        return UsageChunk(head.id, kind_name, head.created, head.model, [], usage_object(_usage(usage)))

    def error(self, info: ErrorInfo, *, is_openai: bool) -> object:
        return {"error": {"message": info.message, "type": info.type, "param": info.param, "code": info.code}}

    def request_metrics(self, args: EngineArgs, registry: CollectorRegistry) -> VllmRequestMetrics:
        return VllmRequestMetrics(
            self._metrics_name(args),
            registry,
            max_tokens=args.context_length,
            num_engines=args.dp_size,
            first_dp_rank=args.dp_rank,
        )

    def scheduler_metrics(
        self, args: EngineArgs, readies: Sequence[Ready], startup_s: float, registry: CollectorRegistry
    ) -> VllmSchedulerMetrics:
        return VllmSchedulerMetrics(self._metrics_name(args), args, readies, registry)

    def _metrics_name(self, args: EngineArgs) -> str:
        return self.served_names[0] if self.served_names else args.name


def _usage(usage: Usage) -> Usage:
    """Only what was cached at all is told, and never from where."""
    details = usage.prompt_tokens_details
    if details is None:
        return usage
    kept = PromptTokensDetails(details.cached_tokens) if details.cached_tokens else None
    return Usage(usage.prompt_tokens, usage.total_tokens, usage.completion_tokens, kept)


def _stop_reason(choice: Choice) -> int | str | None:
    """The stop string, or the token of the request's own stop_token_ids; null for an end of sequence."""
    matched = None if choice.finish is None else choice.finish.matched
    own = choice.generation.submit.sampling.stop_token_ids or ()
    return matched if isinstance(matched, str) or matched in own else None


def _completion_logprobs(head: Head, choice: Choice) -> Any:
    if choice.logprobs is None:
        return None
    return completion_logprobs(head.vocabulary, choice.logprobs, choice.text_offset)


def _chat_logprobs(head: Head, choice: Choice) -> ChatLogprobs | None:
    if choice.logprobs is None:
        return None
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                *_chat_logprob(head, one.token_id, -9999.0 if one.logprob is None else one.logprob),
                [ChatLogprob(*_chat_logprob(head, token, logprob)) for token, logprob in one.top],
            )
            for one in choice.logprobs
        ]
    )


def _chat_logprob(head: Head, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
    text = token_text(head.vocabulary, token_id)
    return text, logprob, list(text.encode()) if head.vocabulary is None else token_bytes(head.vocabulary, token_id)
