"""The rotary table: cosines and sines of every position, computed once in float64.

Neighbours: `rope` validates what a model states. Head dimensions i and i + D/2 are a pair (the "neox" order).
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from baton.engine.models.rope import RopeScaling
from baton.engine.models.spec import ModelConfig


def rotary_table(config: ModelConfig, num_positions: int, device: torch.device) -> torch.Tensor:
    """[num_positions, D] float32: D/2 cosines, then D/2 sines."""
    frequencies = inverse_frequencies(config)
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * frequencies[None, :]
    factor = config.rope_scaling.attention_factor if config.rope_scaling is not None else 1.0
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * factor
    return torch.from_numpy(table.astype(np.float32)).to(device)


def inverse_frequencies(config: ModelConfig) -> NDArray[np.float64]:
    """[D/2] radians a position."""
    dim = config.head_dim
    plain = config.rope_theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.type == "linear":
        return plain / scaling.factor
    if scaling.type == "llama3":
        return _llama3(plain, scaling)
    return _yarn(plain, scaling, dim, config.rope_theta)


def _llama3(plain: NDArray[np.float64], scaling: RopeScaling) -> NDArray[np.float64]:
    """Long waves are stretched by `factor`, short ones kept, those between blended."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return plain * keep + plain / scaling.factor * (1 - keep)


def _yarn(plain: NDArray[np.float64], scaling: RopeScaling, dim: int, theta: float) -> NDArray[np.float64]:
    """Dimensions that turn more than `beta_fast` times in the original context are kept, those below `beta_slow` stretched."""

    def dimension_of(turns: float) -> float:
        return dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    stretched = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    return plain * (1 - stretched) + plain / scaling.factor * stretched
