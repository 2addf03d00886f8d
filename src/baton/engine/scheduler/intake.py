"""From a `Submit` to a `Request`: the checks that refuse one at the door, and the values resolved once.

Pure functions; what happens to an accepted request is `scheduler`'s business.
"""

from random import Random

import msgspec

from baton.engine.scheduler.config import SchedulerConfig
from baton.engine.scheduler.request import Request, Status
from baton.protocol.errors import ErrorInfo, RequestError, Stage
from baton.protocol.rank import FAKE_BOOTSTRAP_HOST, STAGE_OF_MODE, Finish, Mode, Submit, part_of

_STAGE_OF_STATUS: dict[Status, Stage] = {
    Status.BOOTSTRAPPING: "transfer",
    Status.RECEIVING: "transfer",
    Status.WITHDRAWING: "transfer",
    Status.SENDING: "transfer",
    Status.PREFILLING: "prefill",
    Status.READY: "decode",
    Status.RUNNING: "decode",
}


def stage_of(req: Request) -> Stage:
    """Where a request is, in the words of `ErrorInfo.stage`."""
    return _STAGE_OF_STATUS.get(req.status, STAGE_OF_MODE[req.part])


def refusal(submit: Submit, mode: Mode, message: str, param: str | None = None) -> RequestError:
    """A 400 for this request."""
    stage = STAGE_OF_MODE[part_of(mode, submit.bootstrap)]
    return RequestError(ErrorInfo("BadRequestError", 400, message, stage, submit.rid, param=param))


def build_request(
    submit: Submit, config: SchedulerConfig, pool_tokens: int, rng: Random, arrival_idx: int, now: float
) -> Request:
    """Check and resolve; raises `RequestError` (400) if this worker can never serve it."""
    _check(submit, config, pool_tokens)
    sampling = submit.sampling
    limit = config.context_len - len(submit.input_ids)
    if sampling.max_new_tokens is not None:
        limit = min(limit, sampling.max_new_tokens)
    named_stops = frozenset(sampling.stop_token_ids or ())
    eos = frozenset(config.eos_token_ids)
    wants_input_logprobs = submit.return_logprob and submit.logprob_start_len >= 0
    part, bootstrap = part_of(config.mode, submit.bootstrap), submit.bootstrap
    if bootstrap is not None and (part == "null" or bootstrap.host == FAKE_BOOTSTRAP_HOST):
        bootstrap = None
    return Request(
        rid=submit.rid,
        prompt_ids=submit.input_ids,
        output_ids=list(submit.output_ids),
        sampling=sampling,
        seed=sampling.seed if sampling.seed is not None else rng.getrandbits(63),
        arrival_s=now,
        arrival_idx=arrival_idx,
        deadline_s=None if submit.timeout_s is None else now + submit.timeout_s,
        output_limit=limit,
        stop_ids=named_stops if sampling.ignore_eos else named_stops | eos,
        blocked_ids=tuple(sorted(named_stops | eos)) if sampling.min_new_tokens > 0 else (),
        extra_key=submit.extra_key,
        priority=submit.priority,
        part=part,
        bootstrap=bootstrap,
        return_logprob=submit.return_logprob,
        top_logprobs_num=submit.top_logprobs_num if submit.return_logprob else 0,
        token_ids_logprob=tuple(submit.token_ids_logprob or ()) if submit.return_logprob else (),
        logprob_start=submit.logprob_start_len if wants_input_logprobs else None,
    )


def finish_of(req: Request) -> Finish | None:
    """The end that the tokens so far call for. A stop id counts even where it is also the last token allowed."""
    if req.output_ids and req.output_ids[-1] in req.stop_ids:
        return Finish("stop", matched=req.output_ids[-1])
    if len(req.output_ids) >= req.output_limit:
        return Finish("length")
    return None


def with_request_id(error: ErrorInfo, rid: str) -> ErrorInfo:
    return error if error.request_id is not None else msgspec.structs.replace(error, request_id=rid)


def _check(submit: Submit, config: SchedulerConfig, pool_tokens: int) -> None:
    mode = config.mode
    num_prompt = len(submit.input_ids)
    num_tokens = num_prompt + len(submit.output_ids)
    if num_prompt == 0:
        raise refusal(submit, mode, "The input has no tokens.", "input_ids")
    if num_prompt >= config.context_len:
        raise refusal(
            submit,
            mode,
            f"The input ({num_prompt} tokens) is longer than the model's context length ({config.context_len} tokens).",
            "input_ids",
        )
    if num_tokens > pool_tokens:
        raise refusal(
            submit,
            mode,
            f"The input ({num_tokens} tokens) is larger than this worker's KV cache ({pool_tokens} tokens).",
            "input_ids",
        )
    if submit.return_logprob and submit.logprob_start_len >= num_prompt:
        raise refusal(
            submit,
            mode,
            f"logprob_start_len ({submit.logprob_start_len}) is not below the number of input tokens ({num_prompt}).",
            "logprob_start_len",
        )
    if mode in ("prefill", "decode") and submit.bootstrap is None:
        raise refusal(
            submit,
            mode,
            f"Invalid request: Disaggregated request received without boostrap room id. req.rid={submit.rid!r}",
            "bootstrap_room",
        )
