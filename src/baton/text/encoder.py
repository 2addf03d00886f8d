"""A model's text to token ids: reads `tokenizer.json`, `tokenizer_config.json` and the chat template, and encodes.

Used by workers (`engine.tokenizer` adds what generation needs) and by the router, which must find the very ids that a worker
finds. Neighbours: `chat_template`, `messages`. Not here: ids to text; no code from a model directory is ever run.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from baton.protocol.errors import bad_request
from baton.text.errors import bad_model

INLINE_CHARS = 4096
"""Texts up to this length are encoded in the event loop (well under a millisecond); longer ones in a thread."""


@dataclass(frozen=True)
class TextFiles:
    """What a model directory says about text; everything but `tokenizer` may be missing."""

    tokenizer: Tokenizer
    config: Mapping[str, Any] = field(default_factory=dict)
    """tokenizer_config.json."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json."""
    chat_template: str | None = None


class TextEncoder:
    """Encodes for one model. `encode` gives what transformers' AutoTokenizer gives for the same text."""

    def __init__(self, files: TextFiles) -> None:
        self.tokenizer = files.tokenizer
        self.config = files.config
        self.chat_template = files.chat_template
        self.special_tokens = special_tokens(files.config)
        self._missing_bos = self._bos_not_added()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Raises `RequestError` (400) for text that is no Unicode (a lone surrogate)."""
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError):
            raise bad_request("the text holds a lone surrogate, which is no Unicode character.", "text") from None
        return self._missing_bos + ids if add_special_tokens else ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Like `encode`; a long text does not block the event loop (the encoder works without the interpreter lock)."""
        if len(text) <= INLINE_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens=add_special_tokens)

    def _bos_not_added(self) -> list[int]:
        """The bos token where the config asks for it (`add_bos_token`) and tokenizer.json does not put it in itself."""
        bos_id = self.tokenizer.token_to_id(self.special_tokens.get("bos_token", ""))
        if not self.config.get("add_bos_token") or bos_id is None:
            return []
        return [] if bos_id in self.tokenizer.encode("", add_special_tokens=True).ids else [bos_id]


def read_text_files(directory: Path) -> TextFiles:
    """Of a directory with a `tokenizer.json`. Raises `ModelError` naming the file."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise bad_model(directory, "there is no tokenizer.json here.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every kind of bad file
        raise bad_model(file, str(error)) from None
    # A tokenizer.json may carry training-time truncation; a server must never cut a prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _read_object(directory / "tokenizer_config.json")
    return TextFiles(
        tokenizer=tokenizer,
        config=config,
        generation=_read_object(directory / "generation_config.json"),
        chat_template=_chat_template(directory, config),
    )


def _read_object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise bad_model(path, f"is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_model(path, "must hold a JSON object.")
    return value


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config's `chat_template`, which may be a list of named ones."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise bad_model(directory / "tokenizer_config.json", "chat_template must be text or a list of named templates.")
    return template


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text: what a chat template may use."""
    found: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found
