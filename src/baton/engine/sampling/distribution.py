"""One row's probability distribution: weights, the filters top_k, top_p and min_p, and the draw by inverse CDF.

Everything here is a function of one row and runs on that row alone in numpy, so the result cannot depend, to the last
bit, on what else is in the batch or on thread counts. Nothing is sorted unless top_p needs it, and then only the
tokens that can be inside it.

Filters are joint (SGLang): each looks at the whole distribution, and a token stays when all let it stay. Among tokens of
equal probability the lower id comes first.
"""

import math

import numpy as np
from numpy.typing import NDArray

from baton.protocol.sampling import GREEDY_TEMPERATURE, SamplingParams

_BLOCK = 256
"""The CDF has two levels: sums of blocks of this many tokens, then the tokens of one block."""


class Distribution:
    """softmax(logits / temperature) of one row, kept as unnormalised weights.

    Invariant: the largest weight is 1; `total` is the sum of all weights before any filter. A temperature of 0 counts as
    1 here: greedy rows take the largest logit, and their logprobs are those of the unscaled logits.
    """

    def __init__(self, logits: NDArray[np.float32], temperature: float) -> None:
        self.num_tokens = len(logits)
        top = logits.max()
        if not math.isfinite(top):
            logits, top = _made_finite(logits)
        # Overflow to -inf (far logits, tiny temperatures) is the weight 0 that is meant.
        with np.errstate(over="ignore"):
            shifted = logits - top
            if temperature >= GREEDY_TEMPERATURE and temperature != 1.0:
                shifted /= np.float32(temperature)
        self.shifted = shifted
        padded = -(-self.num_tokens // _BLOCK) * _BLOCK
        self._padded = np.zeros(padded, np.float32)
        np.exp(shifted, out=self._padded[: self.num_tokens])
        self._block_sums = _block_sums(self._padded)
        self.total = float(self._block_sums.sum(dtype=np.float64))

    @property
    def weights(self) -> NDArray[np.float32]:
        """[V]"""
        return self._padded[: self.num_tokens]

    def logprobs(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of these tokens, after temperature and before any filter."""
        shifted: NDArray[np.float64] = self.shifted[ids].astype(np.float64)
        return shifted - math.log(self.total)

    def draw(self, sampling: SamplingParams, uniform: float) -> int:
        """The token at `uniform` in [0, 1) of the filtered distribution, in order of token ids."""
        kept = kept_tokens(self.weights, self.total, sampling)
        if kept is None:
            return _blockwise_inverse_cdf(self._padded, self._block_sums, uniform)
        return int(kept[_inverse_cdf(self.weights[kept], uniform)])


def kept_tokens(weights: NDArray[np.float32], total: float, sampling: SamplingParams) -> NDArray[np.int64] | None:
    """Ids, ascending, that top_k, top_p and min_p let stay; None: all of them. The likeliest token always stays.

    `weights` [V] with largest weight 1, `total` their sum.
    """
    num_tokens = len(weights)
    top_k = sampling.top_k if 0 < sampling.top_k < num_tokens else None
    top_p = sampling.top_p if sampling.top_p < 1.0 else None
    if top_k is None and top_p is None:
        return np.flatnonzero(weights >= np.float32(sampling.min_p)) if sampling.min_p > 0 else None
    # Tokens below `floor` cannot be kept. For top_p: all tokens below (1 - top_p) * total / V together weigh less than
    # (1 - top_p) * total, so whatever comes before them already has the mass top_p. The margin covers rounding.
    floor = sampling.min_p
    if top_k is not None:
        floor = max(floor, float(np.partition(weights, num_tokens - top_k)[num_tokens - top_k]))
    if top_p is not None:
        floor = max(floor, 0.999 * (1.0 - top_p) * total / num_tokens)
    candidates = np.flatnonzero(weights >= np.float32(floor))
    descending = -np.sort(-weights[candidates])
    num_kept = len(descending) if top_k is None else min(top_k, len(descending))
    if top_p is not None:
        mass = np.cumsum(descending, dtype=np.float64)
        num_kept = min(num_kept, int(np.searchsorted(mass, top_p * total, side="left")) + 1)
    cut = descending[num_kept - 1]
    values = weights[candidates]
    stays = values > cut
    level = np.flatnonzero(values == cut)
    stays[level[: num_kept - int(np.count_nonzero(stays))]] = True
    kept: NDArray[np.int64] = candidates[stays]
    return kept


def top_ids(values: NDArray[np.float32], num: int) -> NDArray[np.int64]:
    """The `num` largest of `values` [V], largest first, lower id first among equals."""
    num = min(num, len(values))
    if num < 1:
        return np.zeros(0, np.int64)
    least = np.partition(values, len(values) - num)[len(values) - num]
    ids = np.flatnonzero(values >= least)
    return ids[np.lexsort((ids, -values[ids]))[:num]]


def _made_finite(logits: NDArray[np.float32]) -> tuple[NDArray[np.float32], np.float32]:
    """Logits of a broken model or a row whose every token is blocked: still a distribution, never a crash."""
    finite = np.where(np.isnan(logits), np.float32(-np.inf), np.minimum(logits, np.finfo(np.float32).max))
    top = finite.max()
    if top == -np.inf:
        return np.zeros_like(finite), np.float32(0)
    return finite, top


def _block_sums(padded: NDArray[np.float32]) -> NDArray[np.float32]:
    sums: NDArray[np.float32] = padded.reshape(-1, _BLOCK).sum(axis=1)
    return sums


def _blockwise_inverse_cdf(padded: NDArray[np.float32], block_sums: NDArray[np.float32], uniform: float) -> int:
    """`_inverse_cdf` of a long row: find the block, then the token in it."""
    cdf = np.cumsum(block_sums, dtype=np.float64)
    target = uniform * cdf[-1]
    block = _first_above(cdf, target)
    inside = np.cumsum(padded[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    return block * _BLOCK + _first_above(inside, target - (cdf[block - 1] if block else 0.0))


def _inverse_cdf(weights: NDArray[np.float32], uniform: float) -> int:
    """Index of the first weight at which the cumulated weight exceeds `uniform` times the sum."""
    cdf = np.cumsum(weights, dtype=np.float64)
    return _first_above(cdf, uniform * cdf[-1])


def _first_above(cdf: NDArray[np.float64], target: float) -> int:
    """First index whose value exceeds `target`, never one of weight 0. A target that rounding lifted to the last value
    or above it (a block's float32 sum may lie a little above its tokens' sum) gives the last index of any weight."""
    return int(min(np.searchsorted(cdf, target, side="right"), np.searchsorted(cdf, cdf[-1], side="left")))
