"""Tensors of a directory of safetensors files, one by one, mapped rather than read."""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from baton.engine.errors import bad_model
from baton.engine.models.spec import ModelConfig
from baton.engine.weights.check import check_tensors
from baton.engine.weights.files import INDEX_NAME, safetensors_files
from baton.engine.weights.safetensors_header import DTYPE_BYTES, read_header


def safetensors_weights(
    directory: Path, config: ModelConfig, wanted: Collection[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, tensor in its stored dtype on the CPU) of all or the `wanted` ones, file after file.

    Everything is checked before the first tensor is given out. `ModelError` names the file and the tensor.
    """
    files, index = safetensors_files(directory)
    shapes: dict[str, tuple[int, ...]] = {}
    names_of_file: dict[Path, list[str]] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if entry.dtype not in DTYPE_BYTES:
                known = ", ".join(DTYPE_BYTES)
                raise bad_model(file, f"tensor {name} has dtype {entry.dtype}, which is not supported; known: {known}.")
            if name in shapes:
                raise bad_model(file, f"tensor {name} is in another file of this model too.")
            if index is not None and index.get(name, file.name) != file.name:
                raise bad_model(directory / INDEX_NAME, f"places tensor {name} in {index[name]}; it is in {file.name}.")
            shapes[name] = entry.shape
            names_of_file.setdefault(file, []).append(name)
    for name in index or ():
        if name not in shapes:
            raise bad_model(
                directory / str((index or {})[name]), f"missing tensor {name}, which the index places here."
            )
    names = set(check_tensors(files[0] if len(files) == 1 else directory, shapes, config))
    return _read(names_of_file, names if wanted is None else names.intersection(wanted))


def _read(names_of_file: dict[Path, list[str]], wanted: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for file, names in names_of_file.items():
        try:
            with safe_open(file, framework="pt") as opened:
                for name in names:
                    if name in wanted:
                        yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise bad_model(file, f"is not a readable safetensors file: {error}") from None
