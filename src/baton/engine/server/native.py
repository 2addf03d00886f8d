"""SGLang's own route: POST|PUT /generate, one prompt or a batch, streamed or not, by text or token ids."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from baton.engine.server.context import ServerContext
from baton.engine.server.generation import Generation, Job, cached_details
from baton.engine.server.handover import Handover
from baton.engine.server.intake import (
    Hop,
    Prompt,
    convert,
    dp_rank_of,
    hop_of,
    join_keys,
    parse,
    read_object,
    request_id_of,
    submits_of,
)
from baton.engine.server.start import start_job
from baton.protocol.errors import bad_request
from baton.protocol.generate import (
    IGNORED_GENERATE_FIELDS,
    REFUSED_GENERATE_FIELDS,
    REFUSED_SAMPLING_FIELDS,
    GenerateRequest,
    LogprobTriple,
)
from baton.protocol.hops import RESUME_FIELD, tokens_comment
from baton.protocol.rank import TokenLogprobs
from baton.protocol.sampling import SamplingParams


async def generate(ctx: ServerContext, request: Request) -> Response:
    """/generate."""
    raw = await read_object(request)
    body = parse(ctx, raw, GenerateRequest, REFUSED_GENERATE_FIELDS, IGNORED_GENERATE_FIELDS)
    prompts, is_batch, stream_interval = await _prompts(ctx, body)
    hop = hop_of(request, raw, len(prompts) * prompts[0].sampling.n)
    if hop.resume is not None and prompts[0].return_logprob:
        raise bad_request(
            f"{RESUME_FIELD} cannot be combined with return_logprob: the first part's are gone.", RESUME_FIELD
        )
    handover = Handover(body.bootstrap_host, body.bootstrap_port, body.bootstrap_room)
    submits = submits_of(ctx, prompts, handover, hop, rid=body.rid, priority=body.priority or 0)
    writer = GenerateWriter(ctx, body, hop, is_list=is_batch or len(submits) > 1)
    request_id = request_id_of(submits, body.rid)
    return start_job(
        ctx,
        submits,
        writer,
        request_id=request_id,
        stream_interval=stream_interval if body.stream else None,
        dp_rank=dp_rank_of(request, body.routed_dp_rank, body.data_parallel_rank),
    )


async def _prompts(ctx: ServerContext, body: GenerateRequest) -> tuple[list[Prompt], bool, int]:
    """The prompts, whether they came as a batch, and the stream interval."""
    all_ids, is_batch = await _input_ids(ctx, body)
    count = len(all_ids)
    stream_interval = ctx.args.stream_interval
    prompts: list[Prompt] = []
    for index, input_ids in enumerate(all_ids):
        raw_sampling = _one(body.sampling_params, index, count, "sampling_params") or {}
        sampling, interval = sampling_of(raw_sampling)
        stream_interval = interval or stream_interval
        wanted_ids = body.token_ids_logprob
        if wanted_ids and isinstance(wanted_ids[0], list):
            wanted_ids = _one(wanted_ids, index, count, "token_ids_logprob")
        prompts.append(
            Prompt(
                input_ids=input_ids,
                sampling=sampling,
                return_logprob=bool(_one(body.return_logprob, index, count, "return_logprob")),
                logprob_start_len=_or(_one(body.logprob_start_len, index, count, "logprob_start_len"), -1),
                top_logprobs_num=_or(_one(body.top_logprobs_num, index, count, "top_logprobs_num"), 0),
                token_ids_logprob=convert(wanted_ids, list[int] | None, "token_ids_logprob"),  # type: ignore[arg-type]
                extra_key=join_keys(
                    _one(body.cache_salt, index, count, "cache_salt"), _one(body.extra_key, index, count, "extra_key")
                ),
            )
        )
    return prompts, is_batch, stream_interval


async def _input_ids(ctx: ServerContext, body: GenerateRequest) -> tuple[list[list[int]], bool]:
    if (body.text is None) == (body.input_ids is None):
        raise bad_request("exactly one of text and input_ids must be given.", "text")
    if body.text is not None:
        texts = [body.text] if isinstance(body.text, str) else body.text
        if not texts:
            raise bad_request("text must not be an empty list.", "text")
        tokenizer = ctx.need_tokenizer()
        return [await tokenizer.encode_async(text) for text in texts], not isinstance(body.text, str)
    if not body.input_ids:
        raise bad_request("input_ids must not be empty.", "input_ids")
    if isinstance(body.input_ids[0], list):
        return convert(body.input_ids, list[list[int]], "input_ids"), True
    return [convert(body.input_ids, list[int], "input_ids")], False


def sampling_of(raw: dict[str, Any]) -> tuple[SamplingParams, int | None]:
    """`sampling_params` with SGLang's names: the parameters, and the stream interval that may come with them."""
    given = dict(raw)
    for name, reason in REFUSED_SAMPLING_FIELDS.items():
        if given.pop(name, None) not in (None, "", {}):
            raise bad_request(f"{name} is not supported: {reason}.", f"sampling_params.{name}")
    if "sampling_seed" in given:
        given["seed"] = given.pop("sampling_seed")
    interval = convert(given.pop("stream_interval", None), int | None, "sampling_params.stream_interval")  # type: ignore[arg-type]
    if interval is not None and interval < 1:
        raise bad_request("stream_interval must be at least 1.", "sampling_params.stream_interval")
    # A null means the default, except for max_new_tokens, where it means the rest of the context.
    given = {name: value for name, value in given.items() if value is not None or name == "max_new_tokens"}
    return convert(given, SamplingParams, "sampling_params"), interval


def _one(value: Any, index: int, count: int, field: str) -> Any:
    """Entry `index` of a per-prompt list, or the one value for all."""
    if not isinstance(value, list):
        return value
    if len(value) != count:
        raise bad_request(f"{field} must be one value or a list of {count}, got {len(value)}.", field)
    return value[index]


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


class GenerateWriter:
    """/generate's documents and events: cumulative text and ids, `meta_info` in SGLang's key order."""

    is_openai = False

    def __init__(self, ctx: ServerContext, body: GenerateRequest, hop: Hop, *, is_list: bool) -> None:
        self._ctx = ctx
        self._hop = hop
        self._is_list = is_list
        self._vocabulary = ctx.tokenizer.vocabulary if ctx.tokenizer and body.return_text_in_logprobs else None

    def document(self, job: Job) -> bytes:
        results = [self._result(one) for one in job.generations]
        return msgspec.json.encode(results if self._is_list else results[0])

    def events(self, changed: list[Generation]) -> bytes:
        parts: list[bytes] = []
        for one in changed:
            new_ids = one.take().token_ids
            result = self._result(one)
            if self._ctx.args.stream_output:
                result["output_ids"] = new_ids
            if self._is_list:
                result["index"] = one.index
            if self._hop.wants_token_ids:
                parts.append(tokens_comment(one.index, new_ids))
            parts += (b"data: ", msgspec.json.encode(result), b"\n\n")
        return b"".join(parts)

    def last_events(self, job: Job) -> bytes:
        return b""

    def _result(self, one: Generation) -> dict[str, Any]:
        result: dict[str, Any] = {} if self._ctx.tokenizer is None else {"text": one.text}
        result["output_ids"] = one.token_ids
        result["meta_info"] = self._meta_info(one)
        return result

    def _meta_info(self, one: Generation) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": one.rid,
            "finish_reason": finish_reason(one, is_prefill=self._ctx.args.disaggregation_mode == "prefill"),
            "prompt_tokens": one.prompt_tokens,
            "weight_version": "default",
            "total_retractions": one.num_retractions,
        }
        if self._ctx.args.enable_metrics:
            meta["queue_time"] = one.queue_time_s
        if one.submit.return_logprob:
            meta |= self._logprobs(one)
        meta["completion_tokens"] = one.completion_tokens
        meta["cached_tokens"] = one.cached_tokens
        details = cached_details([one], is_wanted=self._ctx.args.has_tiers)
        if details is not None:
            meta["cached_tokens_details"] = details
        if one.timings.finished is not None:
            meta["e2e_latency"] = one.timings.finished - one.timings.created
        return meta

    def _logprobs(self, one: Generation) -> dict[str, Any]:
        found: dict[str, Any] = {}
        # Routers put the prefill's prompt log-probabilities in front of the decode's (mini_lb), so ours must be empty.
        is_merged = self._ctx.args.disaggregation_mode == "decode"
        sides = (("input", [] if is_merged else one.input_logprobs), ("output", one.logprobs))
        for side, logprobs in sides:
            found[f"{side}_token_logprobs"] = [self._triple(each.logprob, each.token_id) for each in logprobs]
        if one.submit.top_logprobs_num:
            for side, logprobs in sides:
                found[f"{side}_top_logprobs"] = [self._triples(each, each.top) for each in logprobs]
        if one.submit.token_ids_logprob:
            for side, logprobs in sides:
                found[f"{side}_token_ids_logprobs"] = [self._triples(each, each.requested) for each in logprobs]
        return found

    def _triples(self, position: TokenLogprobs, pairs: list[tuple[int, float]]) -> list[LogprobTriple] | None:
        if position.logprob is None:
            return None  # the first prompt token
        return [self._triple(logprob, token_id) for token_id, logprob in pairs]

    def _triple(self, logprob: float | None, token_id: int) -> LogprobTriple:
        return (logprob, token_id, self._vocabulary.token_text(token_id) if self._vocabulary else None)


def finish_reason(one: Generation, *, is_prefill: bool) -> dict[str, Any] | None:
    """SGLang's object; a prefill worker's answer ends with length 0 (its one token belongs to the decode worker)."""
    finish = one.finish
    if finish is None:
        return None
    if finish.type == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.type == "length":
        return {"type": "length", "length": 0 if is_prefill else one.completion_tokens}
    message = finish.error.message if finish.error else "Aborted"
    return {"type": "abort", "message": message, "status_code": None, "err_type": None}
