"""Does a checkpoint hold exactly the tensors that its config implies? Asked before the first one is read."""

from collections.abc import Mapping
from pathlib import Path

from baton.engine.errors import bad_model
from baton.engine.models.spec import ModelConfig
from baton.engine.weights.names import expected_tensors, is_ignorable


def check_tensors(path: Path, found: Mapping[str, tuple[int, ...]], config: ModelConfig) -> list[str]:
    """Names to load, in model order. `found`: HF name -> shape.

    `ModelError` naming the file and the first tensor that is missing, of another shape, or not of this architecture
    (a bias nobody would add, a layer nobody would run: silently dropping it would answer with wrong tokens).
    """
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise bad_model(path, f"missing tensor {missing[0]}{more}.")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise bad_model(path, f"tensor {name} has shape {list(found[name])}, the config implies {list(shape)}.")
    for name in found:
        if name not in expected and not is_ignorable(name, config):
            raise bad_model(path, f"tensor {name} is not part of a {config.architecture} with this config.")
    return list(expected)
