"""POST /v1/chat/completions in SGLang 0.4.10's shape: messages through the model's template, streamed or not."""

import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from baton.engine.server.context import ServerContext
from baton.engine.server.generation import Generation, Job
from baton.engine.server.intake import (
    Hop,
    Prompt,
    hop_of,
    need_json_content_type,
    parse,
    read_object,
    request_id_of,
    submits_of,
)
from baton.engine.server.openai_common import (
    chat_logprobs,
    check_model,
    check_top_logprobs,
    created_of,
    extra_key_of,
    handover_of,
    refuse_constraints,
    sampling_of,
    usage_event,
    usage_object,
    usage_of,
)
from baton.engine.server.start import start_job
from baton.protocol.errors import bad_request
from baton.protocol.hops import tokens_comment
from baton.protocol.openai import (
    IGNORED_FIELDS,
    REFUSED_FIELDS,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatLogprobs,
    ChatMessage,
    DeltaMessage,
    UsageChunk,
)
from baton.protocol.rank import TokenLogprobs
from baton.text.messages import chat_prompt


async def chat_completions(ctx: ServerContext, request: Request) -> Response:
    """/v1/chat/completions."""
    need_json_content_type(request)
    raw = await read_object(request)
    body = parse(ctx, raw, ChatCompletionRequest, REFUSED_FIELDS, IGNORED_FIELDS)
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
    submits = submits_of(ctx, [prompt], handover_of(body), hop, rid=body.rid, priority=body.priority or 0)
    request_id = request_id_of(submits, body.rid)
    writer = ChatWriter(ctx, body, hop, model, request_id, len(prompt.input_ids))
    stream_interval = ctx.args.stream_interval if body.stream else None
    return start_job(ctx, submits, writer, request_id=request_id, stream_interval=stream_interval)


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
        self,
        ctx: ServerContext,
        body: ChatCompletionRequest,
        hop: Hop,
        model: str,
        response_id: str,
        num_prompt_tokens: int,
    ) -> None:
        self._ctx = ctx
        self._body = body
        self._hop = hop
        self._model = model
        self._id = response_id
        self._num_prompt_tokens = num_prompt_tokens
        self._created = created_of(ctx, hop, time.time())
        self._vocabulary = ctx.tokenizer.vocabulary if ctx.tokenizer else None
        # A resumed stream's client has its roles already.
        self._needs_roles = hop.resume is None
        self._options = body.stream_options

    def document(self, job: Job) -> bytes:
        choices = [
            ChatChoice(
                one.index,
                ChatMessage("assistant", one.text),
                self._logprobs(one.logprobs),
                one.finish.type if one.finish else None,
                one.finish.matched if one.finish else None,
            )
            for one in job.generations
        ]
        usage = usage_of(self._ctx, self._body, job.generations)
        document = ChatCompletion(self._id, "chat.completion", self._created, self._model, choices, usage)
        return msgspec.json.encode(document)

    def events(self, changed: list[Generation]) -> bytes:
        parts: list[bytes] = []
        if self._needs_roles:
            self._needs_roles = False
            for index in range(self._body.n or 1):
                parts.append(self._event(ChatChunkChoice(index, DeltaMessage("assistant", "")), []))
        for one in changed:
            if not one.has_text and one.finish is None:
                continue  # half a character, or what may become a stop string: no event, and its ids wait with it
            delta = one.take()
            if delta.text or delta.logprobs or (self._hop.wants_token_ids and delta.token_ids):
                choice = ChatChunkChoice(one.index, DeltaMessage(content=delta.text), self._logprobs(delta.logprobs))
                parts.append(self._event(choice, delta.token_ids, one))
            if one.finish is not None:
                end = ChatChunkChoice(one.index, DeltaMessage(), None, one.finish.type, one.finish.matched)
                parts.append(self._event(end, [], one))
        return b"".join(parts)

    def last_events(self, job: Job) -> bytes:
        if self._options is None or not self._options.include_usage:
            return b""
        usage = usage_object(usage_of(self._ctx, self._body, job.generations, self._num_prompt_tokens))
        return usage_event(UsageChunk(self._id, "chat.completion.chunk", self._created, self._model, [], usage))

    def _event(self, choice: ChatChunkChoice, token_ids: list[int], one: Generation | None = None) -> bytes:
        usage = None
        if one is not None and self._options is not None and self._options.continuous_usage_stats:
            usage = usage_of(self._ctx, self._body, [one])
        chunk = ChatChunk(self._id, "chat.completion.chunk", self._created, self._model, [choice], usage)
        comment = tokens_comment(choice.index, token_ids) if self._hop.wants_token_ids else b""
        return comment + b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    def _logprobs(self, positions: list[TokenLogprobs]) -> ChatLogprobs | None:
        return chat_logprobs(self._vocabulary, positions) if self._body.logprobs else None
