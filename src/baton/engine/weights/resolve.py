"""From what a user calls a model (--model-path) to files on this machine."""

import re
from pathlib import Path

from baton.engine.errors import ModelError
from baton.engine.weights.demo import is_demo_name, prepare_demo_model

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
"""What is fetched of a hub repository: never pickled weights, never code."""


def resolve_model(name_or_path: str, revision: str | None = None) -> Path:
    """The directory or `.gguf` file of a model.

    A path that exists wins; then the demo model's name; then a hub id `owner/name` (through huggingface_hub, at
    `revision`). Raises `ModelError` saying what to do.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path and path.exists():
        return path
    if is_demo_name(name_or_path):
        return prepare_demo_model()
    if not _HUB_ID.fullmatch(name_or_path):
        raise ModelError(
            f"{name_or_path}: no such model directory or .gguf file, and not a hub id (owner/name) or the demo model "
            "(smollm2)."
        )
    return _from_hub(name_or_path, revision)


def _from_hub(hub_id: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download  # the optional extra "hub"
    except ImportError:
        raise ModelError(
            f"{hub_id}: no such directory; to fetch it from the Hugging Face hub install the extra: "
            "pip install 'baton-llm[hub]'"
        ) from None
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the client raises its HTTP library's and its own errors; all mean "not fetched"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"{hub_id}: no such directory, and the Hugging Face hub did not give it{at} ({reason}); check the name and "
            "the network, or download it elsewhere and give its directory."
        ) from None
