"""Forward batches over sequences whose pages lie scattered in a pool: what the scheduler would build, for tests of the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from baton.engine.batch import ForwardBatch, PromptLogprobsRow, SampleRow


@dataclass(frozen=True)
class Query:
    """Tokens [start, stop) of sequence `seq` are new in this step."""

    seq: int
    start: int
    stop: int


class PagedSequences:
    """Token sequences and their page tables; `shared[b] = (a, n)` gives b the first n pages of a."""

    def __init__(
        self, tokens: Sequence[Sequence[int]], page_size: int, *, shared: dict[int, tuple[int, int]] | None = None
    ) -> None:
        self.tokens = [np.asarray(ids, np.int64) for ids in tokens]
        self.page_size = page_size
        counts = [-(-len(ids) // page_size) for ids in tokens]
        order = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32)
        self.tables = np.split(order, np.cumsum(counts)[:-1])
        for seq, (source, num_pages) in (shared or {}).items():
            self.tables[seq] = np.concatenate([self.tables[source][:num_pages], self.tables[seq][num_pages:]])
        self.num_pages = sum(counts)

    def batch(
        self,
        queries: Sequence[Query],
        *,
        samples: list[SampleRow] | None = None,
        prompt_logprobs: list[PromptLogprobsRow] | None = None,
    ) -> ForwardBatch:
        width = max(-(-query.stop // self.page_size) for query in queries)
        tables = np.zeros((len(queries), width), np.int32)
        for row, query in enumerate(queries):
            used = -(-query.stop // self.page_size)
            tables[row, :used] = self.tables[query.seq][:used]
        return ForwardBatch(
            token_ids=np.concatenate([self.tokens[query.seq][query.start : query.stop] for query in queries]),
            positions=np.concatenate([np.arange(query.start, query.stop, dtype=np.int64) for query in queries]),
            query_lens=np.array([query.stop - query.start for query in queries], np.int32),
            context_lens=np.array([query.stop for query in queries], np.int32),
            page_tables=tables,
            samples=samples or [],
            prompt_logprobs=prompt_logprobs or [],
        )
