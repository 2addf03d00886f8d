"""What can go wrong while a model's files are opened: one line, naming the file and the field or tensor."""

from pathlib import Path

from baton.protocol.errors import BatonError


class ModelError(BatonError):
    """A model directory, GGUF file or hub id that cannot be served as it is."""


def bad_model(path: Path, problem: str) -> ModelError:
    """A `ModelError` whose message is `path: problem` on one line."""
    return ModelError(f"{path}: {' '.join(problem.split())}")
