"""The header of a safetensors file: names, dtypes, shapes and byte ranges, checked against the file's size.

Read here rather than by the safetensors package, because only the byte ranges let the fingerprint sample a tensor
without loading it. Not here: tensor values (safetensors_weights).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.engine.errors import bad_model

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Weights of other dtypes are refused by name."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies. Invariant: end - start is the size that dtype and shape imply."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Absolute byte offset in the file."""
    end: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Tensor name -> entry. `ModelError` naming the file (and the tensor) when the file is cut short or wrong."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
            raise bad_model(file, "is not a safetensors file: its first 8 bytes are not a header length.")
        if 8 + length > size:
            raise bad_model(file, f"is truncated: the header ends at byte {8 + length} but the file has {size}.")
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise bad_model(file, "is not a safetensors file: its header is not JSON.") from None
    if not isinstance(header, dict):
        raise bad_model(file, "is not a safetensors file: its header is not a JSON object.")
    return {name: _entry(file, name, raw, 8 + length, size) for name, raw in header.items() if name != "__metadata__"}


def _entry(file: Path, name: str, raw: Any, data_start: int, size: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = str(raw["dtype"]), tuple(raw["shape"]), raw["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise bad_model(file, f"the header entry of tensor {name} is not a safetensors entry.") from None
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in (*shape, start, end)):
        raise bad_model(file, f"the header entry of tensor {name} holds sizes that are not natural numbers.")
    if data_start + end > size:
        raise bad_model(file, f"is truncated: tensor {name} ends at byte {data_start + end} but the file has {size}.")
    if dtype in DTYPE_BYTES and end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise bad_model(
            file, f"tensor {name} has {end - start} bytes, its dtype {dtype} and shape imply another number."
        )
    return TensorEntry(dtype, shape, data_start + start, data_start + end)
