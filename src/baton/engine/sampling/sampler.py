"""The sampler: logits of R rows to R tokens, and log-probabilities where they are asked for.

Greedy rows are one argmax over the batch. Every other row is worked on alone (see `distribution`), and its draw comes
from a hash of (seed, position) (see `draws`): a seeded request gives the same tokens whatever it is batched with.

Log-probabilities are of softmax(logits / temperature) after penalties and biases and before top_k, top_p and min_p, as
SGLang's; with temperature 0 they are of the unscaled logits. Those of prompt tokens are of the model's own logits.
Minus infinity (a blocked token) is given as the smallest float32, since JSON has no infinity.

Not here: which rows are sampled (scheduler), stop conditions, grammars.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from baton.engine.batch import PromptLogprobsRow, SampleRow
from baton.engine.sampling.adjust import adjusted, has_adjustments
from baton.engine.sampling.distribution import Distribution, top_ids
from baton.engine.sampling.draws import uniform
from baton.protocol.rank import TokenLogprobs

_LEAST = float(np.finfo(np.float32).min)


class Sampler:
    """Holds no state: two calls with the same arguments give the same answer."""

    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> tuple[list[int], list[TokenLogprobs | None]]:
        """One token a row, and its log-probabilities for rows with `return_logprob`.

        `logits`: [R, V] float32 on any device, not written to; row i belongs to `rows[i]`.
        """
        if not rows:
            return [], []
        token_ids = _argmax(logits)
        logprobs: list[TokenLogprobs | None] = [None] * len(rows)
        slow = [index for index, row in enumerate(rows) if not _is_plain_greedy(row)]
        for index, row_logits in zip(slow, _rows_on_host(logits, slow), strict=True):
            token_ids[index], logprobs[index] = _sample_row(row_logits, rows[index])
        return token_ids, logprobs

    def prompt_logprobs(self, logits: torch.Tensor, row: PromptLogprobsRow) -> list[TokenLogprobs]:
        """One entry for each of `row.token_ids`; `logits`: [n, V] float32, row i predicts `row.token_ids[i]`."""
        host = logits.detach().float().cpu().numpy()
        return [
            _token_logprobs(Distribution(values, 1.0), token_id, row.top_logprobs_num, row.token_ids_logprob)
            for values, token_id in zip(host, row.token_ids, strict=True)
        ]


def _is_plain_greedy(row: SampleRow) -> bool:
    return row.sampling.is_greedy and not row.return_logprob and not has_adjustments(row)


def _argmax(logits: torch.Tensor) -> list[int]:
    """[R] lowest id of the largest logit."""
    if logits.device.type == "cpu":  # numpy's is several times faster than torch's
        best: list[int] = logits.detach().numpy().argmax(axis=-1).tolist()
    else:
        best = logits.argmax(dim=-1).tolist()
    return best


def _rows_on_host(logits: torch.Tensor, indices: list[int]) -> Sequence[NDArray[np.float32]]:
    """[V] each, in the order of `indices`; only these rows leave the device."""
    if not indices:
        return []
    if logits.device.type == "cpu":
        host = logits.detach().numpy()
        return [host[index] for index in indices]
    return list(logits.detach()[torch.tensor(indices, device=logits.device)].cpu().numpy())


def _sample_row(logits: NDArray[np.float32], row: SampleRow) -> tuple[int, TokenLogprobs | None]:
    changed = adjusted(logits, row)
    if row.sampling.is_greedy and not row.return_logprob:
        return int(changed.argmax()), None
    distribution = Distribution(changed, row.sampling.temperature)
    if row.sampling.is_greedy:
        token_id = int(changed.argmax())
    else:
        token_id = distribution.draw(row.sampling, uniform(row.seed, row.position))
    if not row.return_logprob:
        return token_id, None
    return token_id, _token_logprobs(distribution, token_id, row.top_logprobs_num, row.token_ids_logprob)


def _token_logprobs(distribution: Distribution, token_id: int, top_num: int, requested: Sequence[int]) -> TokenLogprobs:
    top = top_ids(distribution.shifted, top_num)
    ids = np.asarray([token_id, *top.tolist(), *requested], np.int64)
    values = np.maximum(distribution.logprobs(ids), _LEAST).tolist()
    pairs = list(zip(ids.tolist(), values, strict=True))
    return TokenLogprobs(token_id, values[0], pairs[1 : 1 + len(top)], pairs[1 + len(top) :])
