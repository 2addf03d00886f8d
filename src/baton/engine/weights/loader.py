"""The front door to weights: `open_weights` gives every tensor of a model once, under its HF name.

Formats live beside this file (safetensors_weights, gguf_weights, dummy_weights). Not here: devices, sharding over
ranks, packing; the model takes each tensor, keeps its part and lets it go, so peak memory stays near one tensor.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from baton.engine.errors import ModelError
from baton.engine.models.spec import ModelConfig
from baton.engine.weights.dummy_weights import dummy_weights
from baton.engine.weights.files import find_gguf
from baton.engine.weights.gguf_weights import gguf_weights
from baton.engine.weights.safetensors_weights import safetensors_weights

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
REFUSED_LOAD_FORMATS = ("pt", "npcache", "sharded_state", "bitsandbytes", "layered", "remote", "remote_instance")
"""Values of --load-format that SGLang knows and Baton does not."""


def check_load_format(load_format: str) -> None:
    """`ModelError` for a value of --load-format that this engine does not read."""
    if load_format in LOAD_FORMATS:
        return
    known = ", ".join(LOAD_FORMATS)
    if load_format == "pt":
        raise ModelError(f"--load-format pt is not supported (pickled weights can run code); known: {known}.")
    word = "not supported" if load_format in REFUSED_LOAD_FORMATS else "unknown"
    raise ModelError(f"--load-format {load_format} is {word}; known: {known}.")


def open_weights(
    path: Path, load_format: str, config: ModelConfig, *, dummy_seed: int = 0, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, CPU tensor) of each tensor in `wanted` (None: in `names.expected_tensors(config)`), exactly once each.

    Dtypes are float32, float16 or bfloat16 as the file has them (quantised GGUF: float32; dummy: the config's); weights
    are (out, in). A tied head is not given out: it is the embedding. "auto" looks at the path. Tensors may map the file
    read-only: copy before writing. Raises `ModelError`, at the call, for a file or tensor that is missing or wrong.
    """
    check_load_format(load_format)
    if load_format == "dummy":
        return dummy_weights(config, dummy_seed, wanted)
    gguf_path = find_gguf(path)
    if load_format == "safetensors" and gguf_path is not None:
        raise ModelError(f"{gguf_path}: --load-format safetensors was asked for, but this is a GGUF file.")
    if load_format == "gguf" and gguf_path is None:
        raise ModelError(
            f"{path}: --load-format gguf was asked for, but this directory holds none, or safetensors too."
        )
    if gguf_path is not None:
        return gguf_weights(gguf_path, config, wanted)
    return safetensors_weights(path, config, wanted)
