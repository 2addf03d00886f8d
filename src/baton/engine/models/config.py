"""The front door to a model's configuration: `load_config` for a directory or a GGUF file.

Whatever the engine cannot compute exactly (an unknown architecture, sliding windows, a rotary variant that depends on
the sequence length, quantised checkpoints) is refused here, by name, before a weight is read. Code in a model directory
is never run. Neighbours: `hf_config` reads `config.json`, `gguf_config` reads GGUF metadata, `spec` holds the result.
"""

import logging
from pathlib import Path

from baton.engine.errors import bad_model
from baton.engine.models.gguf_config import config_from_gguf
from baton.engine.models.hf_config import config_from_dict
from baton.engine.models.rope import RopeScaling
from baton.engine.models.spec import DTYPES, KNOWN_ARCHITECTURES, Architecture, ModelConfig
from baton.engine.weights.files import find_gguf, read_json

__all__ = ["DTYPES", "KNOWN_ARCHITECTURES", "Architecture", "ModelConfig", "RopeScaling", "load_config"]

logger = logging.getLogger(__name__)


def load_config(path: Path, *, trust_remote_code: bool = False) -> ModelConfig:
    """The config of a model directory or of a `.gguf` file.

    A directory needs `config.json` (and may have `generation_config.json`), or holds a single GGUF file.
    `trust_remote_code` changes nothing but a log line: code from a model directory is never run.
    Raises `ModelError` naming the file and the field.
    """
    gguf_path = find_gguf(path)
    if gguf_path is not None:
        return config_from_gguf(gguf_path)
    file = path / "config.json"
    if not file.is_file():
        raise bad_model(path, "no config.json and no .gguf file in this model directory.")
    raw = read_json(file)
    if raw.get("auto_map") and trust_remote_code:
        logger.warning("auto_map of %s is ignored: code from a model directory is never run", file)
    generation_file = path / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    return config_from_dict(raw, generation, file)
