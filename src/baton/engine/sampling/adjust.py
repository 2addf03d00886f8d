"""What a request adds to its logits before the temperature: penalties, biases, forbidden tokens. One row at a time.

Order (SGLang's): frequency and presence are subtracted, repetition scales, logit_bias is added, blocked ids go to -inf
last, so that no bias can bring one back. Frequency and presence count generated tokens; repetition looks at prompt and
generated tokens, as in the CTRL paper, transformers and vLLM.
"""

import numpy as np
from numpy.typing import NDArray

from baton.engine.batch import SampleRow


def has_adjustments(row: SampleRow) -> bool:
    """Whether `adjusted` would change anything."""
    sampling = row.sampling
    return bool(
        sampling.frequency_penalty
        or sampling.presence_penalty
        or sampling.repetition_penalty != 1.0
        or sampling.logit_bias
        or row.blocked_ids
    )


def adjusted(logits: NDArray[np.float32], row: SampleRow) -> NDArray[np.float32]:
    """A changed copy of `logits` [V], or `logits` itself when there is nothing to change."""
    if not has_adjustments(row):
        return logits
    changed = logits.copy()
    sampling = row.sampling
    if row.output_ids and (sampling.frequency_penalty or sampling.presence_penalty):
        ids, counts = np.unique(np.asarray(row.output_ids, np.int64), return_counts=True)
        changed[ids] -= (sampling.frequency_penalty * counts + sampling.presence_penalty).astype(np.float32)
    if sampling.repetition_penalty != 1.0:
        _scale_repeated(changed, row)
    if sampling.logit_bias:
        ids = np.fromiter((int(key) for key in sampling.logit_bias), np.int64, len(sampling.logit_bias))
        changed[ids] += np.fromiter(sampling.logit_bias.values(), np.float32, len(sampling.logit_bias))
    blocked = [token_id for token_id in row.blocked_ids if token_id < len(changed)]
    changed[blocked] = -np.inf
    return changed


def _scale_repeated(logits: NDArray[np.float32], row: SampleRow) -> None:
    seen = np.concatenate([np.asarray(row.prompt_ids, np.int64), np.asarray(row.output_ids, np.int64)])
    ids = np.unique(seen)
    values = logits[ids]
    penalty = np.float32(row.sampling.repetition_penalty)
    logits[ids] = np.where(values < 0, values * penalty, values / penalty)
