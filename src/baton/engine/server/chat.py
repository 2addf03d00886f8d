"""POST /v1/chat/completions: messages through the model's template, streamed or not; the dialect says in which shape."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from baton.engine.server.context import ServerContext
from baton.engine.server.dialect import Choice, Head
from baton.engine.server.generation import Generation, Job
from baton.engine.server.intake import (
    Hop,
    Prompt,
    dp_rank_of,
    hop_of,
    need_json_content_type,
    parse,
    read_object,
    request_id_of,
    submits_of,
)
from baton.engine.server.openai_common import (
    check_model,
    check_top_logprobs,
    extra_key_of,
    handover_of,
    head_of,
    refuse_constraints,
    sampling_of,
    usage_of,
)
from baton.engine.server.start import start_early, start_job
from baton.protocol.errors import bad_request
from baton.protocol.hops import tokens_comment
from baton.protocol.openai import ChatCompletionRequest, Usage
from baton.protocol.rank import TokenLogprobs
from baton.text.messages import chat_prompt


async def chat_completions(ctx: ServerContext, request: Request) -> Response:
    """/v1/chat/completions."""
    need_json_content_type(request)
    raw = await read_object(request)
    body = parse(
        ctx, ctx.dialect.fields(raw), ChatCompletionRequest, ctx.dialect.refused_fields, ctx.dialect.ignored_fields
    )
    model = check_model(ctx, body.model)
    _refuse(body)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    prompt = Prompt(
        input_ids=await _input_ids(ctx, body),
        sampling=sampling_of(ctx, body, max_tokens),
        return_logprob=bool(body.logprobs),
        top_logprobs_num=check_top_logprobs(body.top_logprobs or 0, "top_logprobs"),
        extra_key=extra_key_of(body),
    )
    hop = hop_of(request, raw, prompt.sampling.n)
    handover = handover_of(ctx, body)
    dp_rank = dp_rank_of(request, body.routed_dp_rank, body.data_parallel_rank)
    submits = submits_of(ctx, [prompt], handover, hop, rid=body.rid, priority=body.priority or 0)
    request_id = request_id_of(submits, body.rid)
    head = head_of(ctx, "chat", request_id, hop, model, raw)
    writer = ChatWriter(ctx, body, hop, head, len(prompt.input_ids))
    early = ctx.dialect.early_answer(handover)
    if early is not None:
        return start_early(ctx, submits, writer, early, request_id=request_id, dp_rank=dp_rank)
    stream_interval = ctx.args.stream_interval if body.stream else None
    return start_job(ctx, submits, writer, request_id=request_id, stream_interval=stream_interval, dp_rank=dp_rank)


def _refuse(body: ChatCompletionRequest) -> None:
    """What would change the answer and is not served."""
    refuse_constraints(body)
    if body.tools and body.tool_choice != "none":
        raise bad_request("tools is not supported: function calling is not served yet.", "tools")
    if body.tool_choice not in (None, "none", "auto"):
        raise bad_request("tool_choice is not supported: function calling is not served yet.", "tool_choice")
    if body.modalities not in (None, [], ["text"]):
        raise bad_request(f"modalities is not supported: {body.modalities}; only text.", "modalities")
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true.", "top_logprobs")
    if not body.messages:
        raise bad_request("Messages cannot be empty.", "messages")


async def _input_ids(ctx: ServerContext, body: ChatCompletionRequest) -> list[int]:
    tokenizer = ctx.need_tokenizer()
    if ctx.chat_template is None:
        raise bad_request("this model has no chat template: give --chat-template, or use /v1/completions.", "messages")
    text = chat_prompt(
        ctx.chat_template,
        body.messages,
        template_kwargs=body.chat_template_kwargs,
        reasoning_effort=body.reasoning_effort,
        continue_final_message=bool(body.continue_final_message),
    )
    # The template writes the special tokens itself.
    return await tokenizer.encode_async(text, add_special_tokens=False)


class ChatWriter:
    """chat.completion documents and chat.completion.chunk events."""

    is_openai = True

    def __init__(
        self, ctx: ServerContext, body: ChatCompletionRequest, hop: Hop, head: Head, num_prompt_tokens: int
    ) -> None:
        self._ctx = ctx
        self._dialect = ctx.dialect
        self._body = body
        self._hop = hop
        self._head = head
        self._num_prompt_tokens = num_prompt_tokens
        # A resumed stream's client has its roles already.
        self._needs_roles = hop.resume is None
        self._options = body.stream_options

    def document(self, job: Job, early: dict[str, Any] | None = None) -> bytes:
        choices = [Choice(one, one.text, self._asked(one.logprobs), one.finish) for one in job.generations]
        usage = usage_of(self._ctx, self._body, job.generations)
        return msgspec.json.encode(self._dialect.chat_document(self._head, choices, usage, early))

    def events(self, changed: list[Generation]) -> bytes:
        parts: list[bytes] = []
        if self._needs_roles:
            self._needs_roles = False
            for index in range(self._body.n or 1):
                parts.append(self._event(self._dialect.chat_role_chunk(self._head, index), index, []))
        for one in changed:
            if not one.has_text and one.finish is None:
                continue  # half a character, or what may become a stop string: no event, and its ids wait with it
            delta = one.take()
            has_news = bool(delta.text or delta.logprobs or (self._hop.wants_token_ids and delta.token_ids))
            if not has_news and one.finish is None:
                continue
            choice = Choice(one, delta.text, self._asked(delta.logprobs), one.finish, has_news)
            token_ids = delta.token_ids
            for chunk in self._dialect.chat_chunks(self._head, choice, self._usage(one)):
                parts.append(self._event(chunk, one.index, token_ids))
                token_ids = []  # they come with the first
        return b"".join(parts)

    def last_events(self, job: Job) -> bytes:
        if not self._dialect.wants_usage(self._options is not None and bool(self._options.include_usage)):
            return b""
        usage = usage_of(self._ctx, self._body, job.generations, self._num_prompt_tokens)
        return b"data: " + msgspec.json.encode(self._dialect.usage_chunk(self._head, "chat", usage)) + b"\n\n"

    def _usage(self, one: Generation) -> Usage | None:
        """Of an event."""
        if self._options is None or not self._options.continuous_usage_stats:
            return None
        return usage_of(self._ctx, self._body, [one])

    def _event(self, chunk: object, index: int, token_ids: list[int]) -> bytes:
        comment = tokens_comment(index, token_ids) if self._hop.wants_token_ids else b""
        return comment + b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def _asked(self, positions: list[TokenLogprobs]) -> list[TokenLogprobs] | None:
        return positions if self._body.logprobs else None
