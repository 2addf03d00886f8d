"""Which files of a model path hold what: JSON, safetensors and GGUF. No torch, nothing is parsed but JSON."""

import json
from pathlib import Path
from typing import Any

from baton.engine.errors import bad_model

INDEX_NAME = "model.safetensors.index.json"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; `ModelError` naming the file (and the line) when it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise bad_model(file, f"cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise bad_model(file, f"is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    except json.JSONDecodeError as error:
        raise bad_model(file, f"is not JSON: {error.msg} in line {error.lineno}, column {error.colno}.") from None
    except RecursionError:
        raise bad_model(file, "is nested too deeply.") from None
    if not isinstance(value, dict):
        raise bad_model(file, f"must hold a JSON object, not a {type(value).__name__}.")
    return value


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that is the only model in the directory `path`.

    None: `path` is a directory in HF style (it has safetensors, or no GGUF file at all). `ModelError` when there is
    nothing at `path`, or a choice of GGUF files.
    """
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise bad_model(path, "is a file but not a .gguf file; give the model's directory.")
        return path
    if not path.is_dir():
        raise bad_model(path, "no such model directory or file.")
    if (path / INDEX_NAME).is_file() or any(path.glob("*.safetensors")):
        return None
    found = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf" and file.is_file())
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise bad_model(path, f"holds several GGUF files; name one of them: {names}.")
    return found[0] if found else None


def safetensors_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """(files in name order, tensor name -> file name as the index states it, None without an index).

    `ModelError` when there are none, when the index names a file that is missing or outside the directory.
    """
    index = directory / INDEX_NAME
    if not index.is_file():
        single = directory / "model.safetensors"
        files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
        if not files:
            raise bad_model(directory, "no *.safetensors file in this model directory.")
        return files, None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise bad_model(index, "missing field weight_map.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise bad_model(index, f"field weight_map names {name!r}, which is not a .safetensors file beside it.")
        if not (directory / name).is_file():
            raise bad_model(index, f"shard {name} is missing.")
    return [directory / name for name in names], {str(tensor): str(name) for tensor, name in weight_map.items()}
