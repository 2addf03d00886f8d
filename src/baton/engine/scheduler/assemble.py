"""From the requests of one step to the arrays of a `ForwardBatch`. Prefill chunks come first, then decode rows.

Reads requests, changes none.
"""

from dataclasses import dataclass

import numpy as np

from baton.engine.batch import ForwardBatch, PromptLogprobsRow, SampleRow
from baton.engine.scheduler.admission import Chunk
from baton.engine.scheduler.decode_batch import DecodeBatch
from baton.engine.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A batch and whose rows are whose: `apply` needs both."""

    batch: ForwardBatch
    chunks: list[Chunk]
    chunk_draws: list[bool]
    """Aligned with chunks: whether it has a sample row. These rows come first."""
    decode: list[Request]
    """Owners of the other sample rows, in the order of the decode batch."""
    logprob_owners: list[Request]
    """Owners of `batch.prompt_logprobs`."""


def assemble(chunks: list[Chunk], decode: DecodeBatch | None) -> StepPlan:
    """`decode`: rows that take one token each in this step, or None."""
    if not chunks:
        assert decode is not None
        return _decode_only(decode)
    samples: list[SampleRow] = []
    draws: list[bool] = []
    logprobs: list[PromptLogprobsRow] = []
    owners: list[Request] = []
    tokens: list[int] = []
    for idx, chunk in enumerate(chunks):
        req = chunk.req
        tokens += req.token_slice(chunk.start, chunk.end)
        wanted = _prompt_logprobs(idx, chunk)
        if wanted is not None:
            logprobs.append(wanted)
            owners.append(req)
        draws.append(chunk.is_last and req.num_output_left > 0)
        if draws[-1]:
            samples.append(_sample_row(idx, req))
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    ends = np.array([chunk.end for chunk in chunks], np.int64)
    lens = ends - starts
    positions = np.arange(len(tokens)) - np.repeat(np.cumsum(lens) - lens - starts, lens)
    token_ids = np.array(tokens, np.int64)
    rows = list(decode.requests) if decode is not None else []
    samples += [_sample_row(len(chunks) + i, req) for i, req in enumerate(rows)]
    num_rows = len(chunks) + len(rows)
    columns = max(len(req.pages) for req in (*(chunk.req for chunk in chunks), *rows))
    tables = np.zeros((num_rows, columns), np.int32)
    for idx, chunk in enumerate(chunks):
        tables[idx, : len(chunk.req.pages)] = chunk.req.pages
    query_lens = np.ones(num_rows, np.int32)
    query_lens[: len(chunks)] = lens
    context_lens = np.empty(num_rows, np.int32)
    context_lens[: len(chunks)] = ends
    if decode is not None and rows:
        count = len(rows)
        computed = decode.computed[:count]
        width = min(columns, decode.page_tables.shape[1])
        tables[len(chunks) :, :width] = decode.page_tables[:count, :width]
        context_lens[len(chunks) :] = computed + 1
        token_ids = np.concatenate([token_ids, decode.token_ids[:count]])
        positions = np.concatenate([positions, computed.astype(np.int64)])
    batch = ForwardBatch(token_ids, positions, query_lens, context_lens, tables, samples, logprobs)
    return StepPlan(batch, chunks, draws, rows, owners)


def _decode_only(decode: DecodeBatch) -> StepPlan:
    count = len(decode)
    computed = decode.computed[:count]
    batch = ForwardBatch(
        token_ids=decode.token_ids[:count].copy(),
        positions=computed.astype(np.int64),
        query_lens=np.ones(count, np.int32),
        context_lens=computed + 1,
        page_tables=decode.page_tables[:count, : int(decode.num_pages[:count].max())].copy(),
        samples=[_sample_row(i, req) for i, req in enumerate(decode.requests)],
    )
    return StepPlan(batch, [], [], list(decode.requests), [])


def _sample_row(idx: int, req: Request) -> SampleRow:
    output_ids = req.output_ids
    blocked = req.blocked_ids
    if blocked and len(output_ids) >= req.sampling.min_new_tokens:
        blocked = ()
    return SampleRow(
        idx,
        req.sampling,
        len(req.prompt_ids) + len(output_ids),
        req.seed,
        req.prompt_ids,
        output_ids,
        blocked,
        req.top_logprobs_num,
        req.token_ids_logprob,
        req.return_logprob,
    )


def _prompt_logprobs(idx: int, chunk: Chunk) -> PromptLogprobsRow | None:
    """Position p needs the logits of p - 1: this chunk gives positions start + 1 .. end, so far as they are prompt."""
    req = chunk.req
    if req.logprob_start is None or req.input_logprobs_sent:
        return None
    first = max(chunk.start + 1, req.logprob_start)
    end = min(chunk.end + 1, len(req.prompt_ids))
    if first >= end:
        return None
    token_ids = req.prompt_ids[first:end]
    return PromptLogprobsRow(idx, first, token_ids, req.top_logprobs_num, req.token_ids_logprob)
