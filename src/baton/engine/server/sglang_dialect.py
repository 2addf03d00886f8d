"""SGLang 0.4.10's documents and events."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from prometheus_client import CollectorRegistry

from baton.engine.args import EngineArgs
from baton.engine.detokenizer import Vocabulary
from baton.engine.server.dialect import Choice, Head, Kind
from baton.engine.server.handover import Handover
from baton.engine.server.logprobs import completion_logprobs, token_bytes, token_text
from baton.engine.server.metrics import RequestMetrics, SchedulerMetrics
from baton.protocol.errors import ErrorInfo
from baton.protocol.openai import (
    IGNORED_FIELDS,
    REFUSED_FIELDS,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    DeltaMessage,
    OpenAIError,
    TopLogprob,
    Usage,
    UsageChunk,
    usage_object,
)
from baton.protocol.rank import Ready


class SglangDialect:
    name: Literal["sglang"] = "sglang"
    refused_fields = REFUSED_FIELDS
    ignored_fields = IGNORED_FIELDS

    def fields(self, raw: dict[str, Any]) -> dict[str, Any]:
        return raw

    def served_model(self, args: EngineArgs, asked: str | None) -> str | None:
        """A trailing slash is no difference, and is answered as it was sent."""
        if asked is None:
            return args.name
        return asked if asked.rstrip("/") == args.name.rstrip("/") else None

    def handover(self, args: EngineArgs, fields: Mapping[str, Any]) -> Handover:
        """The fields that SGLang's routers add."""
        return Handover(fields.get("bootstrap_host"), fields.get("bootstrap_port"), fields.get("bootstrap_room"))

    def early_answer(self, handover: Handover) -> None:
        return None

    def response_id(self, kind: Kind, request_id: str) -> str:
        return request_id

    def logprob_vocabulary(self, raw: Mapping[str, Any], vocabulary: Vocabulary | None) -> Vocabulary | None:
        return vocabulary

    def wants_usage(self, asked: bool) -> bool:
        return asked

    def chat_document(
        self, head: Head, choices: Sequence[Choice], usage: Usage, early: dict[str, Any] | None = None
    ) -> ChatCompletion:
        found = [
            ChatChoice(
                one.index,
                ChatMessage("assistant", one.text),
                _chat_logprobs(head, one),
                one.finish_reason,
                _matched(one),
            )
            for one in choices
        ]
        return ChatCompletion(head.id, "chat.completion", head.created, head.model, found, usage)

    def chat_role_chunk(self, head: Head, index: int) -> ChatChunk:
        return self._chat_chunk(head, ChatChunkChoice(index, DeltaMessage("assistant", "")), None)

    def chat_chunks(self, head: Head, choice: Choice, usage: Usage | None) -> list[ChatChunk]:
        """New text first; the end is an event of its own."""
        chunks = []
        if choice.has_news:
            delta = ChatChunkChoice(choice.index, DeltaMessage(content=choice.text), _chat_logprobs(head, choice))
            chunks.append(self._chat_chunk(head, delta, usage))
        if choice.finish is not None:
            end = ChatChunkChoice(choice.index, DeltaMessage(), None, choice.finish_reason, _matched(choice))
            chunks.append(self._chat_chunk(head, end, usage))
        return chunks

    def _chat_chunk(self, head: Head, choice: ChatChunkChoice, usage: Usage | None) -> ChatChunk:
        return ChatChunk(head.id, "chat.completion.chunk", head.created, head.model, [choice], usage)

    def completion_document(
        self, head: Head, choices: Sequence[Choice], usage: Usage | None, early: dict[str, Any] | None = None
    ) -> Completion:
        found = [_completion_choice(head, one) for one in choices]
        return Completion(head.id, "text_completion", head.created, head.model, found, usage)

    def completion_chunk(self, head: Head, choice: Choice, usage: Usage | None) -> Completion:
        return self.completion_document(head, [choice], usage)

    def usage_chunk(self, head: Head, kind: Kind, usage: Usage) -> UsageChunk:
        kind_name: Literal["chat.completion.chunk", "text_completion"] = (
            "chat.completion.chunk" if kind == "chat" else "text_completion"
        )
        return UsageChunk(head.id, kind_name, head.created, head.model, [], usage_object(usage))

    def error(self, info: ErrorInfo, *, is_openai: bool) -> object:
        if is_openai:
            return OpenAIError("error", info.message, info.type, info.param, info.code)
        return {"error": info_object(info)}

    def request_metrics(self, args: EngineArgs, registry: CollectorRegistry) -> RequestMetrics:
        return RequestMetrics(
            args.name,
            registry,
            ttft_buckets=args.bucket_time_to_first_token,
            itl_buckets=args.bucket_inter_token_latency,
            e2e_buckets=args.bucket_e2e_request_latency,
            with_token_histograms=args.collect_tokens_histogram,
        )

    def scheduler_metrics(
        self, args: EngineArgs, readies: Sequence[Ready], startup_s: float, registry: CollectorRegistry
    ) -> SchedulerMetrics:
        return SchedulerMetrics(args.name, readies, startup_s, registry, first_dp_rank=args.dp_rank)


SGLANG = SglangDialect()


def _matched(choice: Choice) -> int | str | None:
    return None if choice.finish is None else choice.finish.matched


def _completion_choice(head: Head, one: Choice) -> CompletionChoice:
    logprobs = None
    if one.logprobs is not None:
        logprobs = completion_logprobs(head.vocabulary, one.logprobs, one.text_offset)
    return CompletionChoice(one.index, one.text, logprobs, one.finish_reason, _matched(one))


def _chat_logprobs(head: Head, choice: Choice) -> ChatLogprobs | None:
    if choice.logprobs is None:
        return None
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                token_text(head.vocabulary, one.token_id),
                token_bytes(head.vocabulary, one.token_id),
                one.logprob if one.logprob is not None else 0.0,
                [
                    TopLogprob(token_text(head.vocabulary, token), token_bytes(head.vocabulary, token), logprob)
                    for token, logprob in one.top
                ],
            )
            for one in choice.logprobs
        ]
    )


def info_object(info: ErrorInfo) -> dict[str, object]:
    """An error with all that we know of it."""
    return {
        "message": info.message, "type": info.type, "param": info.param, "code": info.code,
        "stage": info.stage, "request_id": info.request_id, "retryable": info.retryable,
    }  # fmt: skip
