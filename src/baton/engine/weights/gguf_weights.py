"""Tensors of a GGUF file under HF names and in HF layout, dequantised one by one.

Dequantisation is the `gguf` package's. What this file owns: which types are known, the names, and undoing the row
order that llama-architecture files give Q and K (their rotary embedding pairs neighbours, HF's pairs halves).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from baton.engine.errors import bad_model
from baton.engine.models.spec import ModelConfig
from baton.engine.weights.check import check_tensors
from baton.engine.weights.gguf_file import open_gguf
from baton.engine.weights.names import hf_name_of_gguf

KNOWN_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
_CONFIG_ONLY = ("rope_freqs.weight",)
"""Tensors that `models.gguf_config` has read."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file, or expert `index` of one that holds a layer's experts."""

    tensor: gguf.ReaderTensor
    index: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        whole = tuple(int(n) for n in reversed(self.tensor.shape))
        return whole if self.index is None else whole[1:]

    @property
    def data(self) -> npt.NDArray[Any]:
        data: npt.NDArray[Any] = self.tensor.data
        return data if self.index is None else data[self.index]


def gguf_weights(
    path: Path, config: ModelConfig, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, tensor on the CPU) of all or the `wanted` ones: float16 and bfloat16 as stored, everything else float32.

    Everything but the values is checked before the first tensor is given out. `ModelError` names file and tensor.
    """
    file = open_gguf(path)
    entries: dict[str, _Entry] = {}
    for name, tensor in file.tensors.items():
        if name in _CONFIG_ONLY:
            continue
        kind = tensor.tensor_type.name
        if kind not in KNOWN_TYPES:
            known = ", ".join(KNOWN_TYPES)
            raise bad_model(path, f"tensor {name} has type {kind}, which is not supported; known: {known}.")
        known_name = hf_name_of_gguf(name) or name
        if ".mlp.experts." in known_name:
            for index in range(int(tensor.shape[-1])):
                entries[known_name.replace(".experts.", f".experts.{index}.")] = _Entry(tensor, index)
        else:
            entries[known_name] = _Entry(tensor)
    shapes = {name: entry.shape for name, entry in entries.items()}
    names = [name for name in check_tensors(path, shapes, config) if wanted is None or name in wanted]
    permuted_heads = _permuted_heads(file.need("general.architecture", str), config)
    return _read(entries, names, permuted_heads)


def interleaved_to_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head from (pair, 2) order to (2, pair) order. `weight`: [num_heads * D, in] or [num_heads * D]."""
    head_dim = weight.shape[0] // num_heads
    rest = weight.shape[1:]
    return weight.reshape(num_heads, head_dim // 2, 2, *rest).transpose(1, 2).reshape(weight.shape)


def _permuted_heads(arch: str, config: ModelConfig) -> dict[str, int]:
    """Module -> heads of the projections whose rows are permuted; Qwen files are not."""
    if arch != "llama":
        return {}
    return {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}


def _read(
    entries: dict[str, _Entry], names: list[str], permuted_heads: dict[str, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        value = _dequantise(entries[name]).reshape(entries[name].shape)
        module = ".".join(name.split(".")[3:-1])
        heads = permuted_heads.get(module)
        yield name, value if heads is None else interleaved_to_halves(value, heads)


def _dequantise(entry: _Entry) -> torch.Tensor:
    kind = entry.tensor.tensor_type
    if kind.name in ("F32", "F16"):
        return torch.from_numpy(np.array(entry.data))
    if kind.name == "BF16":
        return torch.from_numpy(np.array(entry.data)).view(torch.bfloat16)
    return torch.from_numpy(gguf.quants.dequantize(entry.data, kind))
