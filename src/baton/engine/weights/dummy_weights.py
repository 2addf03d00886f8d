"""Random weights for `--load-format dummy`: any model's shape without its files.

Deterministic by tensor name and seed, so that a prefill and a decode worker hold the same model.
"""

import hashlib
from collections.abc import Collection, Iterator

import torch

from baton.engine.models.spec import ModelConfig
from baton.engine.weights.names import expected_tensors

_SPREAD = 0.035
"""Uniform in +-_SPREAD: a standard deviation of 0.02, as models are initialised."""


def dummy_weights(
    config: ModelConfig, seed: int = 0, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, tensor in the config's dtype on the CPU) of all or the `wanted` ones. Norm weights are near 1, so that
    activations stay finite."""
    dtype = getattr(torch, config.dtype)
    for name, shape in expected_tensors(config).items():
        if wanted is not None and name not in wanted:
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        value = torch.empty(shape).uniform_(-_SPREAD, _SPREAD, generator=generator)
        if name.endswith("norm.weight"):
            value += 1.0
        yield name, value.to(dtype)
