"""A model's tokenizer for one HTTP process: text to ids, ids to text, and what the model directory says about both.

Opens a directory's files (`text.encoder` reads them) or the same facts from a GGUF file. Neighbours: `detokenizer` makes text
out of generated ids, `text.chat_template` renders messages. Not here: weights, torch, transformers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.engine.detokenizer import Vocabulary
from baton.engine.errors import bad_model
from baton.text.encoder import TextEncoder, TextFiles, read_text_files

SAMPLING_DEFAULT_KEYS = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
"""What `--sampling-defaults model` takes from generation_config.json (SGLang's list)."""


class TextTokenizer(TextEncoder):
    """Encodes and decodes for one model."""

    def __init__(self, files: TextFiles) -> None:
        super().__init__(files)
        self.vocabulary = Vocabulary(files.tokenizer)
        self.sampling_defaults = sampling_defaults(files.generation)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def open_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer of a model directory, of a `tokenizer.json` or of a GGUF file. Raises `ModelError` naming the file."""
    if path.suffix == ".gguf":
        return TextTokenizer(_files_from_gguf(path))
    directory = path if path.is_dir() else path.parent
    if (directory / "tokenizer.json").is_file():
        return TextTokenizer(read_text_files(directory))
    gguf_files = sorted(directory.glob("*.gguf")) if directory.is_dir() else []
    if gguf_files:
        return TextTokenizer(_files_from_gguf(gguf_files[0]))
    raise bad_model(path, "no tokenizer.json and no .gguf file here; give --tokenizer-path or --skip-tokenizer-init.")


def _files_from_gguf(path: Path) -> TextFiles:
    # A function-level import: only GGUF models need the reader, and it costs start-up time.
    from baton.engine.weights.gguf_tokenizer import tokenizer_config_from_gguf, tokenizer_from_gguf

    config = tokenizer_config_from_gguf(path)
    return TextFiles(tokenizer=tokenizer_from_gguf(path), config=config, chat_template=config.get("chat_template"))


def sampling_defaults(generation: Mapping[str, Any]) -> dict[str, float]:
    """The sampling parameters that a model's authors recommend."""
    return {key: generation[key] for key in SAMPLING_DEFAULT_KEYS if isinstance(generation.get(key), int | float)}
