"""From the requests of one step to the arrays of a `ForwardBatch`. Prefill chunks come first, then decode rows.

Reads requests, changes none; the decode batch hears which of its rows are in a step now.
"""

from dataclasses import dataclass, field

import numpy as np

from baton.engine.batch import ForwardBatch, PromptLogprobsRow, SampleRow
from baton.engine.scheduler.admission import Chunk
from baton.engine.scheduler.decode_batch import DecodeBatch, Rows
from baton.engine.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A batch and whose rows are whose: `apply` needs both."""

    batch: ForwardBatch
    chunks: list[Chunk]
    chunk_draws: list[bool]
    """Aligned with chunks: whether it has a sample row. These rows come first."""
    decode: list[Request]
    """Owners of the other sample rows."""
    logprob_owners: list[Request]
    """Owners of `batch.prompt_logprobs`."""
    leftover_pages: list[int] = field(default_factory=list)
    """Free once this step was applied: it, or a step before it, still uses them, and no request does."""

    def __contains__(self, req: Request) -> bool:
        return req in self.decode or any(chunk.req is req for chunk in self.chunks)


def assemble(chunks: list[Chunk], decode: DecodeBatch, decode_rows: Rows) -> StepPlan:
    """`decode_rows`: of `decode`, those that take one token each in this step."""
    rows = decode.begin_step(decode_rows)
    if not chunks:
        return _decode_only(decode, decode_rows, rows)
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
    if rows:
        computed = decode.computed[decode_rows]
        width = min(columns, decode.page_tables.shape[1])
        tables[len(chunks) :, :width] = decode.page_tables[decode_rows, :width]
        context_lens[len(chunks) :] = computed + 1
        token_ids = np.concatenate([token_ids, decode.token_ids[decode_rows]])
        positions = np.concatenate([positions, computed.astype(np.int64)])
    batch = ForwardBatch(token_ids, positions, query_lens, context_lens, tables, samples, logprobs)
    return StepPlan(batch, chunks, draws, rows, owners)


def _decode_only(decode: DecodeBatch, decode_rows: Rows, rows: list[Request]) -> StepPlan:
    computed = decode.computed[decode_rows]
    width = int(decode.num_pages[decode_rows].max())
    batch = ForwardBatch(
        token_ids=decode.token_ids[decode_rows],
        positions=computed.astype(np.int64),
        query_lens=np.ones(len(rows), np.int32),
        context_lens=computed + 1,
        page_tables=decode.page_tables[decode_rows, :width],
        samples=[_sample_row(i, req) for i, req in enumerate(rows)],
    )
    return StepPlan(batch, [], [], rows, [])


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
