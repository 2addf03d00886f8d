"""A runner without a model: the next token is a hash of all tokens before it, and its KV pages remember whose they are.

It reads the context through the page table only, and fails if any position holds the KV of another prefix. So what comes
out proves that caching, chunking, retraction and transfers changed no token, and that every page read was the right one.

Steps may be in flight: until `collect`, what a step writes is junk, and nobody else may write to any page that it uses.
"""

import zlib
from collections import deque

from baton.engine.batch import ForwardBatch, ForwardOutput, PromptLogprobsRow, SampleRow
from baton.protocol.rank import TokenLogprobs

VOCAB = 97
SEED_STATE = 17
JUNK = -1
"""What no token left: not written yet, or in the hands of a transfer or a tier."""
FAILED = -2
"""In place of what a failed step would have written. What is computed from it is as good."""


def advance(state: int, token_id: int) -> int:
    """State after one more token: depends on all tokens so far and their order."""
    return zlib.crc32(token_id.to_bytes(4, "little"), state)


def draw(state: int, blocked: tuple[int, ...] = ()) -> int:
    """The next token after a state."""
    token_id = state % VOCAB
    while token_id in blocked:
        token_id = (token_id + 1) % VOCAB
    return token_id


def next_token(tokens: list[int], blocked: tuple[int, ...] = ()) -> int:
    state = SEED_STATE
    for token_id in tokens:
        state = advance(state, token_id)
    return draw(state, blocked)


def logprobs_of(state: int, token_id: int) -> TokenLogprobs:
    """A made-up value that tells whether it was computed from the right context."""
    return TokenLogprobs(token_id, -float(state % 1000))


def oracle(prompt: list[int], num_tokens: int, stop_ids: frozenset[int] = frozenset(), min_new: int = 0) -> list[int]:
    """What a request generates, computed alone from its tokens."""
    output: list[int] = []
    while len(output) < num_tokens:
        output.append(next_token(prompt + output, tuple(sorted(stop_ids)) if len(output) < min_new else ()))
        if output[-1] in stop_ids:
            break
    return output


class PagedRunner:
    """`pages[(page, slot)]` is the state after the token at that place."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.slots: dict[tuple[int, int], int] = {}
        self.in_flight: deque[ForwardBatch] = deque()
        self.num_steps = 0
        self.num_tokens = 0

    def run(self, batch: ForwardBatch) -> ForwardOutput:
        self.submit(batch)
        return self.collect()

    def submit(self, batch: ForwardBatch) -> None:
        self._check_shapes(batch)
        self._fill(batch, JUNK)
        self.in_flight.append(batch)

    def fail(self) -> None:
        """The oldest step ends without a result."""
        self._fill(self.in_flight.popleft(), FAILED)

    def collect(self) -> ForwardOutput:
        batch = self.in_flight.popleft()
        self.num_steps += 1
        self.num_tokens += len(batch.token_ids)
        states = self._forward(batch)
        tokens, logprobs = [], []
        for row in batch.samples:
            token_id = self._sample(batch, row, states)
            tokens.append(token_id)
            state = states[row.seq_idx][-1]
            logprobs.append(logprobs_of(state, token_id) if row.return_logprob else None)
        return ForwardOutput(
            tokens, logprobs, [self._prompt_logprobs(batch, row, states) for row in batch.prompt_logprobs]
        )

    def pages_in_flight(self) -> set[int]:
        """That steps in flight read or write."""
        found: set[int] = set()
        for batch in self.in_flight:
            for table, context_len in zip(batch.page_tables, batch.context_lens, strict=True):
                found.update(table[: -(-int(context_len) // self.page_size)].tolist())
        return found

    def read_page(self, page: int) -> dict[int, int]:
        """What a transfer or a tier takes away."""
        return {slot: self.slots.get((page, slot), JUNK) for slot in range(self.page_size)}

    def write_page(self, page: int, states: dict[int, int]) -> None:
        """What a transfer or a tier does to a page it owns."""
        assert page not in self.pages_in_flight(), f"page {page} was overwritten under a step in flight"
        for slot, state in states.items():
            self.slots[page, slot] = state

    def scribble(self, page: int) -> None:
        """What a transfer may do to a page it owns until its end."""
        self.write_page(page, dict.fromkeys(range(self.page_size), JUNK))

    def _fill(self, batch: ForwardBatch, state: int) -> None:
        """Where the batch writes."""
        rows = zip(batch.page_tables, batch.query_lens, batch.context_lens, strict=True)
        for table, query_len, context_len in rows:
            for position in range(int(context_len) - int(query_len), int(context_len)):
                self.slots[int(table[position // self.page_size]), position % self.page_size] = state

    def _forward(self, batch: ForwardBatch) -> list[list[int]]:
        """Per sequence the states after each of its new tokens."""
        # All writes of a step come before its reads, as in a real kernel: a page that two rows write shows up as wrong.
        states: list[list[int]] = []
        checks: list[tuple[int, int, int]] = []
        offset = 0
        for row, (query_len, context_len) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            table = batch.page_tables[row]
            start = int(context_len) - int(query_len)
            state = SEED_STATE
            if start:
                page, slot = int(table[(start - 1) // self.page_size]), (start - 1) % self.page_size
                state = self.slots[page, slot]
                checks.append((page, slot, state))
            mine = []
            for i in range(int(query_len)):
                position = start + i
                assert int(batch.positions[offset + i]) == position
                state = FAILED if state == FAILED else advance(state, int(batch.token_ids[offset + i]))
                page, slot = int(table[position // self.page_size]), position % self.page_size
                self.slots[page, slot] = state
                checks.append((page, slot, state))
                mine.append(state)
            states.append(mine)
            offset += int(query_len)
        for page, slot, state in checks:
            assert self.slots[page, slot] == state, f"page {page} slot {slot} was overwritten in the same step"
        return states

    def _sample(self, batch: ForwardBatch, row: SampleRow, states: list[list[int]]) -> int:
        if states[row.seq_idx][-1] == FAILED:
            return 0
        tokens = row.prompt_ids + row.output_ids
        assert row.position == len(tokens) == int(batch.context_lens[row.seq_idx])
        state = SEED_STATE
        for position, token_id in enumerate(tokens):
            state = advance(state, token_id)
            page = int(batch.page_tables[row.seq_idx][position // self.page_size])
            assert self.slots[page, position % self.page_size] == state, (
                f"position {position} of page {page} holds the KV of another prefix"
            )
        assert state == states[row.seq_idx][-1]
        return draw(state, row.blocked_ids)

    def _prompt_logprobs(
        self, batch: ForwardBatch, row: PromptLogprobsRow, states: list[list[int]]
    ) -> list[TokenLogprobs]:
        start = int(batch.context_lens[row.seq_idx]) - int(batch.query_lens[row.seq_idx])
        mine = states[row.seq_idx]
        return [
            logprobs_of(mine[row.first_position + i - 1 - start], token_id) for i, token_id in enumerate(row.token_ids)
        ]

    def _check_shapes(self, batch: ForwardBatch) -> None:
        count = len(batch.query_lens)
        assert count > 0 and len(batch.context_lens) == count and batch.page_tables.shape[0] == count
        assert len(batch.token_ids) == len(batch.positions) == int(batch.query_lens.sum())
        assert (batch.query_lens > 0).all()
        assert [row.seq_idx for row in batch.samples] == sorted({row.seq_idx for row in batch.samples})
        dtypes = [array.dtype.name for array in (batch.token_ids, batch.positions, batch.query_lens)]
        assert dtypes == ["int64", "int64", "int32"]
        assert (batch.context_lens.dtype.name, batch.page_tables.dtype.name) == ("int32", "int32")
