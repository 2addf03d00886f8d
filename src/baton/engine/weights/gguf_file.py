"""One GGUF file: its metadata and tensor table, opened once per process. Parsing is the `gguf` package's.

Owns: bounds checks (a file cut short is an error that says so), typed access to metadata, refusal of split files.
Not here: what the metadata means (models.gguf_config), the tokenizer (gguf_tokenizer), tensor values (gguf_weights).
"""

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
import numpy.typing as npt

from baton.engine.errors import ModelError, bad_model

T = TypeVar("T")


class _Reader(gguf.GGUFReader):
    """`GGUFReader` that never reads behind the end of the file (it would see short arrays and loop on them), and that
    reads an array at once (it keeps two numpy arrays for each element: seconds for a vocabulary)."""

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"truncated: byte {end} is needed but the file has {len(self.data)}.")
        return super()._get(int(offset), dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """(size in bytes, parts, indices of the value in parts, types); of an array the value is one list."""
        if self.byte_order == "S":
            raise ValueError("it was written for machines of the other byte order.")
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        length = int(self._get(orig_offs + 4, np.uint64)[0])
        start = orig_offs + 12
        if item_type == gguf.GGUFValueType.STRING:
            values, end = self._strings(start, length)
        elif item_type in self.gguf_scalar_to_np:
            items = self._get(start, self.gguf_scalar_to_np[item_type], length)
            values, end = items.tolist(), start + items.nbytes
        else:
            raise ValueError(f"arrays of {item_type.name} are not supported.")
        return end - orig_offs, [values], [0], [raw_type, item_type]

    def _strings(self, start: int, length: int) -> tuple[list[str], int]:
        """(strings, offset behind the last). Each is a 64-bit length and its bytes."""
        data: memoryview = self.data.data
        values = []
        offset = start
        for _ in range(length):
            text_start = offset + 8
            offset = text_start + int.from_bytes(data[offset:text_start], sys.byteorder)
            if offset > len(data):
                raise ValueError(f"truncated: byte {offset} is needed but the file has {len(data)}.")
            values.append(str(data[text_start:offset], "utf-8"))
        return values, offset


class GgufFile:
    """Metadata and tensors of one GGUF file. Tensor data stays on disk (mapped) until it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = _Reader(path)
        except Exception as error:  # the parser raises whatever its arithmetic meets; the reader of this line needs one
            text = str(error) or type(error).__name__
            raise bad_model(path, f"is not a readable GGUF file: {text}") from None
        self._fields = reader.fields
        self.tensors: dict[str, gguf.ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        if self.get("split.count", 1) > 1:
            raise bad_model(
                path, f"is one of {self.get('split.count')} split GGUF files; merge them first (gguf-split)."
            )

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as int, float, bool, str or list; `default` when the key is absent.

        `ModelError` naming the key when there is a default and the value is of another type.
        """
        field = self._fields.get(key)
        if field is None:
            return default
        try:
            value = field.parts[field.data[0]] if field.types[0] == gguf.GGUFValueType.ARRAY else field.contents()
        except (UnicodeDecodeError, IndexError) as error:
            raise bad_model(self.path, f"metadata key {key} cannot be read: {error}") from None
        return value if default is None else self._checked(key, value, type(default))

    def need(self, key: str, kind: type[T]) -> T:
        """Like `get`; `ModelError` naming the key when it is absent or not a `kind`."""
        value = self.get(key)
        if value is None:
            raise bad_model(self.path, f"missing metadata key {key}.")
        return self._checked(key, value, kind)

    def _checked(self, key: str, value: Any, kind: type[T]) -> T:
        if kind is float and type(value) is int:
            value = float(value)
        # type() and not isinstance(): a truth value is no number here.
        if type(value) is not kind:
            raise bad_model(self.path, f"metadata key {key} must be of type {kind.__name__}, got {value!r:.80}.")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key, default)
        if value is None:
            raise bad_model(self.path, f"missing metadata key {key}.")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise bad_model(self.path, f"metadata key {key} must be a positive integer, got {value!r}.")
        return value


def open_gguf(path: Path) -> GgufFile:
    """The parsed file, cached by path, size and modification time: parsing 50,000 tokens takes seconds."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}.") from None
    return _open_gguf(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=2)
def _open_gguf(path: Path, _size: int, _mtime_ns: int) -> GgufFile:
    return GgufFile(path)
