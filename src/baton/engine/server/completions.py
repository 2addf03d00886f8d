"""POST /v1/completions: text or token ids, one prompt or several, echo, log-probabilities, streamed or not."""

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
    convert,
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
from baton.protocol.openai import CompletionRequest
from baton.protocol.rank import TokenLogprobs

DEFAULT_MAX_TOKENS = 16
"""OpenAI's and SGLang's default for this route."""


async def completions(ctx: ServerContext, request: Request) -> Response:
    """/v1/completions."""
    need_json_content_type(request)
    raw = await read_object(request)
    body = parse(
        ctx, ctx.dialect.fields(raw), CompletionRequest, ctx.dialect.refused_fields, ctx.dialect.ignored_fields
    )
    model = check_model(ctx, body.model)
    refuse_constraints(body)
    n = 1 if body.n is None else body.n
    if body.best_of not in (None, n):
        raise bad_request("best_of is not supported: only the same value as n.", "best_of")
    sampling = sampling_of(ctx, body, DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens)
    top_logprobs_num = check_top_logprobs(body.logprobs or 0, "logprobs")
    prompts = [
        Prompt(
            input_ids=input_ids,
            sampling=sampling,
            return_logprob=body.logprobs is not None,
            logprob_start_len=0 if body.echo and body.logprobs is not None else -1,
            top_logprobs_num=top_logprobs_num,
            extra_key=extra_key_of(body),
        )
        for input_ids in await _input_ids(ctx, body)
    ]
    hop = hop_of(request, raw, len(prompts) * sampling.n)
    handover = handover_of(ctx, body)
    dp_rank = dp_rank_of(request, body.routed_dp_rank, body.data_parallel_rank)
    submits = submits_of(ctx, prompts, handover, hop, rid=body.rid, priority=body.priority or 0)
    request_id = request_id_of(submits, body.rid)
    head = head_of(ctx, "completion", request_id, hop, model, raw)
    writer = CompletionWriter(ctx, body, hop, head, sum(len(one.input_ids) for one in prompts))
    early = ctx.dialect.early_answer(handover)
    if early is not None:
        return start_early(ctx, submits, writer, early, request_id=request_id, dp_rank=dp_rank)
    stream_interval = ctx.args.stream_interval if body.stream else None
    return start_job(ctx, submits, writer, request_id=request_id, stream_interval=stream_interval, dp_rank=dp_rank)


async def _input_ids(ctx: ServerContext, body: CompletionRequest) -> list[list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [await ctx.need_tokenizer().encode_async(prompt)]
    if not prompt:
        raise bad_request("prompt must not be empty.", "prompt")
    if isinstance(prompt[0], str):
        tokenizer = ctx.need_tokenizer()
        return [await tokenizer.encode_async(text) for text in convert(prompt, list[str], "prompt")]
    if isinstance(prompt[0], int):
        return [convert(prompt, list[int], "prompt")]
    return convert(prompt, list[list[int]], "prompt")


class CompletionWriter:
    """text_completion documents and events."""

    is_openai = True

    def __init__(
        self, ctx: ServerContext, body: CompletionRequest, hop: Hop, head: Head, num_prompt_tokens: int
    ) -> None:
        self._ctx = ctx
        self._dialect = ctx.dialect
        self._body = body
        self._hop = hop
        self._head = head
        self._num_prompt_tokens = num_prompt_tokens
        self._options = body.stream_options
        self._num_sent_chars: dict[int, int] = {}
        """Index -> characters of the choice sent so far, the echo included; present once its first event is out."""

    def document(self, job: Job, early: dict[str, Any] | None = None) -> bytes:
        choices = []
        for one in job.generations:
            positions = (one.input_logprobs if self._body.echo else []) + one.logprobs
            choices.append(Choice(one, self._echo(one) + one.text, self._asked(positions), one.finish))
        usage = usage_of(self._ctx, self._body, job.generations)
        return msgspec.json.encode(self._dialect.completion_document(self._head, choices, usage, early))

    def events(self, changed: list[Generation]) -> bytes:
        parts: list[bytes] = []
        for one in changed:
            delta = one.take()
            text, positions = delta.text, delta.logprobs
            sent = self._num_sent_chars.get(one.index)
            if sent is None:
                sent = 0
                echo = self._echo(one)
                if self._hop.resume is None:
                    text = echo + text
                    positions = (one.input_logprobs if self._body.echo else []) + positions
                else:
                    sent = len(echo) + len(one.text) - len(text)
            self._num_sent_chars[one.index] = sent + len(text)
            choice = Choice(one, text, self._asked(positions), one.finish, text_offset=sent)
            if self._hop.wants_token_ids:
                parts.append(tokens_comment(one.index, delta.token_ids))
            usage = None
            if self._options is not None and self._options.continuous_usage_stats:
                usage = usage_of(self._ctx, self._body, [one])
            chunk = self._dialect.completion_chunk(self._head, choice, usage)
            parts += (b"data: ", msgspec.json.encode(chunk), b"\n\n")
        return b"".join(parts)

    def last_events(self, job: Job) -> bytes:
        if not self._dialect.wants_usage(self._options is not None and bool(self._options.include_usage)):
            return b""
        usage = usage_of(self._ctx, self._body, job.generations, self._num_prompt_tokens)
        return b"data: " + msgspec.json.encode(self._dialect.usage_chunk(self._head, "completion", usage)) + b"\n\n"

    def _echo(self, one: Generation) -> str:
        if not self._body.echo or self._ctx.tokenizer is None:
            return ""
        if isinstance(self._body.prompt, str):
            return self._body.prompt
        given = self._body.prompt[one.index // (self._body.n or 1)]
        return given if isinstance(given, str) else self._ctx.tokenizer.decode(one.submit.input_ids)

    def _asked(self, positions: list[TokenLogprobs]) -> list[TokenLogprobs] | None:
        return None if self._body.logprobs is None else positions
