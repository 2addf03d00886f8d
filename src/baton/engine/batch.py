"""The nouns between scheduler, runner and sampler: what one forward pass gets and what it gives back.

No torch here: the scheduler builds these from plain numbers, so that a simulator can use the same scheduler with a cost
model in the runner's place. All arrays are read-only after construction.

Shape letters: B sequences in the batch, T tokens of the batch, P pages of the longest sequence, R sampled rows.
"""

from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from baton.protocol.rank import TokenLogprobs
from baton.protocol.sampling import SamplingParams


class SampleRow(msgspec.Struct, frozen=True):
    """One sequence of the batch whose last token's logits are sampled in this step. Made for every row of every step: a frozen
    dataclass takes fifteen times as long."""

    seq_idx: int
    """Row of the batch, 0..B-1."""
    sampling: SamplingParams
    position: int
    """Index in the sequence of the token to be drawn (prompt length + output length); with the seed it fixes the draw."""
    seed: int
    """Effective seed: the request's own, or one drawn for it when it arrived."""
    prompt_ids: list[int]
    output_ids: list[int]
    """Live list owned by the scheduler: read it for penalties, never write it."""
    blocked_ids: tuple[int, ...] = ()
    """Tokens that must not be drawn here (end-of-sequence and stop ids before min_new_tokens)."""
    top_logprobs_num: int = 0
    token_ids_logprob: tuple[int, ...] = ()
    return_logprob: bool = False


@dataclass(frozen=True, slots=True)
class PromptLogprobsRow:
    """Prompt positions of this step whose log-probability is wanted: of the token at p given the tokens before it."""

    seq_idx: int
    first_position: int
    """First absolute position p; the logits come from the row of p - 1, which is in this step's query."""
    token_ids: list[int]
    """Tokens at first_position, first_position + 1, ..."""
    top_logprobs_num: int = 0
    token_ids_logprob: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One forward pass over B sequences. Prefill chunks and decode steps are the same thing: `query_lens` new tokens
    each, attending to `context_lens` tokens, themselves included.

    Invariant: T = sum(query_lens); positions of sequence b are context_lens[b] - query_lens[b] .. context_lens[b] - 1.
    """

    token_ids: NDArray[np.int64]
    """[T] the new tokens, sequence after sequence."""
    positions: NDArray[np.int64]
    """[T] absolute position of each new token."""
    query_lens: NDArray[np.int32]
    """[B]"""
    context_lens: NDArray[np.int32]
    """[B] tokens whose KV exists after this step."""
    page_tables: NDArray[np.int32]
    """[B, P] page ids in sequence order; unused entries are 0."""
    samples: list[SampleRow] = field(default_factory=list)
    """R rows, ascending seq_idx."""
    prompt_logprobs: list[PromptLogprobsRow] = field(default_factory=list)

    @property
    def is_decode(self) -> bool:
        """Every sequence has exactly one new token."""
        return len(self.token_ids) == len(self.query_lens)


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What the runner gives back; the scheduler alone writes it into requests."""

    next_token_ids: list[int]
    """R tokens, aligned with `ForwardBatch.samples`."""
    logprobs: list[TokenLogprobs | None]
    """R entries: of the drawn token, where the row asked for it."""
    prompt_logprobs: list[list[TokenLogprobs]]
    """Aligned with `ForwardBatch.prompt_logprobs`."""
