"""From an HTTP body to sequences for the rank: limits, types, refusals by name, ids, deadlines, hand-over fields.

Everything that can be wrong with a request is found here, before the rank hears of it, and becomes a `RequestError` that
names the field. Neighbours: the route files say what a body means; `respond` writes the answer.
"""

import math
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from baton.engine.server.context import ServerContext
from baton.engine.server.handover import Handover
from baton.protocol.errors import ErrorInfo, RequestError, bad_request
from baton.protocol.hops import REQUEST_ID_HEADER, RESUME_FIELD, TIMEOUT_HEADER, TOKEN_IDS_HEADER, Resume
from baton.protocol.rank import FAKE_BOOTSTRAP_HOST, Bootstrap, Submit
from baton.protocol.sampling import SamplingParams
from baton.text.messages import join_keys as join_keys

MAX_BODY_BYTES = 32 * 2**20
MAX_SEQUENCES = 4096
"""Prompts times n of one request."""
ROOM_LIMIT = 2**63
MAX_RID_CHARS = 256
DP_RANK_HEADER = "X-data-parallel-rank"
"""vLLM's; SGLang knows it too."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request and how to continue it; `sampling.n` sequences come of it."""

    input_ids: list[int]
    sampling: SamplingParams
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    token_ids_logprob: list[int] | None = None
    extra_key: str | None = None


@dataclass(frozen=True, slots=True)
class Hop:
    """What our router says beside the body."""

    request_id: str | None
    timeout_s: float | None
    wants_token_ids: bool
    resume: Resume | None


async def read_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises `RequestError` 413 or 400."""
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                message = f"the request body is over the limit of {MAX_BODY_BYTES} bytes."
                raise RequestError(ErrorInfo("RequestEntityTooLargeError", 413, message))
            chunks.append(chunk)
    except ClientDisconnect:
        raise bad_request("the client went away while sending its request.") from None
    body = b"".join(chunks)
    try:
        body.decode()  # msgspec checks strings only where they are used
        value = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise bad_request(f"the request body is not UTF-8: byte {error.start}: {error.reason}.") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_request(f"the request body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise bad_request(f"the request body must be a JSON object, got {type(value).__name__}.")
    return value


def need_json_content_type(request: Request) -> None:
    """SGLang's rule for /v1 routes."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise bad_request("Unsupported Media Type: Only 'application/json' is allowed")


def parse(
    ctx: ServerContext, raw: dict[str, Any], into: type[T], refused: Mapping[str, str], ignored: Iterable[str]
) -> T:
    """`raw` as a request struct. Fields that are null count as not given; refused ones must be null, false or empty."""
    given = {name: value for name, value in raw.items() if value is not None}
    known = {one.name for one in msgspec.structs.fields(into)}  # type: ignore[arg-type]
    for name in given.keys() - known:
        if name in refused:
            if given[name] not in (False, "", [], {}, 0):
                raise bad_request(f"{name} is not supported: {refused[name]}.", name)
        elif name not in ignored:
            ctx.note_unknown(name)
    return convert(given, into)


def convert(value: object, into: type[T], prefix: str = "") -> T:
    """msgspec's conversion, with the field's path in the error."""
    try:
        return msgspec.convert(value, into)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `")
        field = (prefix + path.rstrip("`").removeprefix("$")).lstrip(".")
        missing = re.search(r"missing required field `(\w+)`", problem)
        if missing:
            field = f"{field}.{missing[1]}".lstrip(".")
        where = f"{field}: " if field else ""
        raise bad_request(f"{where}{problem}", field or None) from None


def request_id_header(request: Request) -> str | None:
    """The id a caller chose; None for one that is no id: anybody may set this header, and ours is safer than an error."""
    given = request.headers.get(REQUEST_ID_HEADER)
    is_id = given is not None and 0 < len(given) <= MAX_RID_CHARS and given.isascii() and given.isprintable()
    return given if is_id else None


def hop_of(request: Request, raw: Mapping[str, Any], num_sequences: int) -> Hop:
    """Our router's headers and `RESUME_FIELD`."""
    request_id = request_id_header(request)
    text = request.headers.get(TIMEOUT_HEADER)
    timeout_s: float | None = None
    if text is not None:
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = math.nan
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise bad_request(f"the header {TIMEOUT_HEADER} must be a positive number of seconds, got {text!r}.")
    wants_token_ids = request.headers.get(TOKEN_IDS_HEADER, "0").lower() not in ("0", "false", "")
    resume: Resume | None = None
    if raw.get(RESUME_FIELD) is not None:
        resume = convert(raw[RESUME_FIELD], Resume, RESUME_FIELD)
        if len(resume.output_ids) != num_sequences:
            raise bad_request(f"{RESUME_FIELD}.output_ids must have {num_sequences} entries.", RESUME_FIELD)
    return Hop(request_id, timeout_s, wants_token_ids, resume)


def dp_rank_of(request: Request, *given: int | None) -> int | None:
    """The data-parallel engine that a request asks for, by a field (`given`) or by vLLM's header; None: any."""
    for rank in given:
        if rank is not None:
            return rank
    text = request.headers.get(DP_RANK_HEADER)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise bad_request(f"the header {DP_RANK_HEADER} must be a whole number, got {text[:100]!r}.") from None


def submits_of(
    ctx: ServerContext,
    prompts: Sequence[Prompt],
    handover: Handover,
    hop: Hop,
    *,
    rid: str | list[str] | None,
    priority: int = 0,
) -> list[Submit | None]:
    """One `Submit` per sequence: prompt after prompt, `n` of each. None: this choice of a resumed stream has finished."""
    n = prompts[0].sampling.n
    if any(one.sampling.n != n for one in prompts):
        raise bad_request("n must be the same for all prompts of a batch.", "sampling_params.n")
    num_sequences = len(prompts) * n
    if num_sequences > MAX_SEQUENCES:
        raise bad_request(f"a request may have at most {MAX_SEQUENCES} prompts times n, got {num_sequences}.", "n")
    for prompt in prompts:
        check_prompt(ctx, prompt)
    rids = _rids(ctx, rid, hop, num_sequences, n)
    submits: list[Submit | None] = []
    for index in range(num_sequences):
        prompt = prompts[index // n]
        output_ids: list[int] | None = [] if hop.resume is None else hop.resume.output_ids[index]
        if output_ids is None:
            submits.append(None)
            continue
        check_token_ids(ctx, output_ids, RESUME_FIELD)
        submit = Submit(
            rid=rids[index],
            input_ids=prompt.input_ids,
            sampling=_sampling_of(prompt.sampling, index % n, n),
            output_ids=output_ids,
            return_logprob=prompt.return_logprob,
            logprob_start_len=prompt.logprob_start_len,
            top_logprobs_num=prompt.top_logprobs_num,
            token_ids_logprob=prompt.token_ids_logprob,
            extra_key=prompt.extra_key,
            priority=priority,
            bootstrap=_bootstrap(ctx, handover, rids[index], index, n, num_sequences),
            timeout_s=hop.timeout_s,
        )
        submits.append(submit)
    return submits


def request_id_of(submits: Sequence[Submit | None], given: str | list[str] | None) -> str:
    """The request's own id: its sequence's, or what several have in common. `given`: the body's `rid`."""
    if isinstance(given, list) and len(given) > 1 and (common := commonprefix(given).rstrip("_")):  # noqa: RUF071  (no paths)
        return common
    rid = next((one.rid for one in submits if one is not None), "")
    return rid if len(submits) == 1 else rid.rpartition("_")[0]


def check_prompt(ctx: ServerContext, prompt: Prompt) -> None:
    """Lengths, ids and sampling against what the model can do (messages follow SGLang's)."""
    prompt.sampling.validate(ctx.ready.vocab_size)
    if ctx.tokenizer is None and prompt.sampling.stop_strings:
        raise bad_request(
            "stop needs text, and this worker runs with --skip-tokenizer-init; use stop_token_ids.", "stop"
        )
    num_tokens, context_len = len(prompt.input_ids), ctx.ready.context_len
    if num_tokens == 0:
        raise bad_request("the prompt has no tokens.", "input_ids")
    check_token_ids(ctx, prompt.input_ids, "input_ids")
    if num_tokens >= context_len:
        raise bad_request(
            f"The input ({num_tokens} tokens) is longer than the model's context length ({context_len} tokens).",
            "input_ids",
        )
    new = prompt.sampling.max_new_tokens
    if new is not None and num_tokens + new > context_len:
        raise bad_request(
            f"Requested token count exceeds the model's maximum context length of {context_len} tokens. You requested a "
            f"total of {num_tokens + new} tokens: {num_tokens} tokens from the input messages and {new} tokens for the "
            "completion. Please reduce the number of tokens in the input messages or the completion to fit within the "
            "limit.",
            "max_tokens",
        )
    if num_tokens > ctx.ready.max_req_input_len:
        raise bad_request(
            f"Input length ({num_tokens} tokens) exceeds the maximum allowed length ({ctx.ready.max_req_input_len} tokens). "
            "Use a shorter input or a larger KV pool (--max-total-tokens).",
            "input_ids",
        )
    check_token_ids(ctx, prompt.token_ids_logprob or [], "token_ids_logprob")


def check_token_ids(ctx: ServerContext, token_ids: Sequence[int], field: str) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < ctx.ready.vocab_size):
        bad = next(one for one in token_ids if not 0 <= one < ctx.ready.vocab_size)
        raise bad_request(f"{field} must be in [0, {ctx.ready.vocab_size}), got {bad}.", field)


def _sampling_of(sampling: SamplingParams, sample_idx: int, n: int) -> SamplingParams:
    """Sampling of one of n sequences: with a seed each has its own, and sample 0 has the request's."""
    if n == 1:
        return sampling
    seed = None if sampling.seed is None else (sampling.seed + sample_idx) % 2**63
    return msgspec.structs.replace(sampling, n=1, seed=seed)


def _rids(ctx: ServerContext, rid: str | list[str] | None, hop: Hop, num_sequences: int, n: int) -> list[str]:
    if isinstance(rid, list):
        if len(rid) * n != num_sequences:
            raise bad_request(f"rid must be one id or a list of {num_sequences // n}.", "rid")
        return [one if n == 1 else f"{one}_{sample}" for one in rid for sample in range(n)]
    base = rid or hop.request_id or uuid.uuid4().hex
    if rid is None and any(ctx.engines.is_in_flight(one) for one in (base, f"{base}_0")):
        base = uuid.uuid4().hex  # a header may be repeated by its sender; an id in the body may not
    if len(base) > MAX_RID_CHARS:
        raise bad_request(f"rid must have at most {MAX_RID_CHARS} characters.", "rid")
    return [base] if num_sequences == 1 else [f"{base}_{index}" for index in range(num_sequences)]


def _bootstrap(
    ctx: ServerContext, handover: Handover, rid: str, index: int, n: int, num_sequences: int
) -> Bootstrap | None:
    """Where sequence `index` meets its other half. A single room is the first of consecutive ones."""
    mode = ctx.args.disaggregation_mode
    if mode == "null" or (mode == "both" and handover.room is None):
        return None
    if mode == "both" and handover.side is None and handover.host != FAKE_BOOTSTRAP_HOST:
        message = (
            "bootstrap_room does not say which half this server is, which prefills and decodes; use kv_transfer_params."
        )
        raise bad_request(message, "bootstrap_room")
    num_prompts = num_sequences // n
    for name, value in (("host", handover.host), ("port", handover.port), ("room", handover.room)):
        if isinstance(value, list) and len(value) != num_prompts:
            raise bad_request(f"bootstrap_{name} must be one value or a list of {num_prompts}.", f"bootstrap_{name}")
    host = handover.host[index // n] if isinstance(handover.host, list) else handover.host
    port = handover.port[index // n] if isinstance(handover.port, list) else handover.port
    room = handover.room
    if room is None:
        # SGLang's words, its misspelling included: routers and tests look for them.
        raise bad_request(
            f"Invalid request: Disaggregated request received without boostrap room id. req.rid={rid}", "bootstrap_room"
        )
    if host is None:
        raise bad_request("bootstrap_host is required with bootstrap_room.", "bootstrap_host")
    first, offset = (room[index // n], index % n) if isinstance(room, list) else (room, index)
    if not 0 <= first < ROOM_LIMIT:
        raise bad_request(f"bootstrap_room must be in [0, 2**63), got {first}.", "bootstrap_room")
    if port is not None and not 0 <= port < 65536:
        raise bad_request(f"bootstrap_port must be a port number, got {port}.", "bootstrap_port")
    return Bootstrap(host, port, (first + offset) % ROOM_LIMIT, handover.side)
