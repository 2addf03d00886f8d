"""What makes two loads the same model: a short digest of config and weights, never of a path.

It is part of every KV page's key, so it has to differ when any tensor differs in practice, and it has to be cheap: a few
hundred bytes of each tensor are read, not the file. How tensors are spread over files, and file names, do not matter.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from baton.engine.models.spec import ModelConfig
from baton.engine.weights.files import find_gguf, safetensors_files
from baton.engine.weights.gguf_file import open_gguf
from baton.engine.weights.safetensors_header import read_header

_SAMPLE_BYTES = 128
_SAMPLES_PER_TENSOR = 4


def model_fingerprint(path: Path, config: ModelConfig, load_format: str = "auto", *, dummy_seed: int = 0) -> str:
    """32 hex digits bound to the config and to sampled contents of every tensor. `ModelError` for unreadable files."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    if load_format == "dummy":
        digest.update(f"dummy:{dummy_seed}".encode())
        return digest.hexdigest()[:32]
    gguf_path = find_gguf(path)
    parts = _safetensors_parts(path) if gguf_path is None else _gguf_parts(gguf_path)
    for part in sorted(parts):
        digest.update(part)
    return digest.hexdigest()[:32]


def _safetensors_parts(directory: Path) -> Iterator[bytes]:
    for file in safetensors_files(directory)[0]:
        entries = read_header(file)
        with file.open("rb") as stream:
            for name, entry in entries.items():
                sampled = hashlib.sha256()
                for offset in _sample_offsets(entry.end - entry.start):
                    stream.seek(entry.start + offset)
                    sampled.update(stream.read(min(_SAMPLE_BYTES, entry.end - entry.start - offset)))
                yield f"{name}:{entry.dtype}:{entry.shape}:{sampled.hexdigest()};".encode()


def _gguf_parts(path: Path) -> Iterator[bytes]:
    for name, tensor in open_gguf(path).tensors.items():
        raw = tensor.data.reshape(-1).view("uint8")
        sampled = hashlib.sha256()
        for offset in _sample_offsets(raw.size):
            sampled.update(raw[offset : offset + _SAMPLE_BYTES].tobytes())
        yield f"{name}:{tensor.tensor_type.name}:{tensor.shape.tolist()}:{sampled.hexdigest()};".encode()


def _sample_offsets(size: int) -> list[int]:
    """Evenly spread over a tensor, first and last bytes included."""
    last = max(size - _SAMPLE_BYTES, 0)
    return sorted({last * index // (_SAMPLES_PER_TENSOR - 1) for index in range(_SAMPLES_PER_TENSOR)})
