"""The tokenizer inside a GGUF file, as the `tokenizers` library's object and as an HF `tokenizer_config.json`.

Covers byte-level BPE ("gpt2" in GGUF terms) with the pre-tokenizers listed here; any other is refused by name, since a
wrong pre-tokenizer gives wrong tokens silently. Not here: chat rendering, detokenising (engine.server).
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from baton.engine.errors import bad_model
from baton.engine.weights.gguf_file import GgufFile, open_gguf

_CONTROL, _USER_DEFINED = 3, 4
"""Values of tokenizer.ggml.token_type: special tokens; tokens matched whole in text but shown like any other."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLIT_PATTERNS = {
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""Pre-tokenizers that are one pattern in front of the byte mapping."""


def tokenizer_from_gguf(path: Path) -> Tokenizer:
    """A `tokenizers.Tokenizer` equal to the model's own. `ModelError` names the file and the metadata key."""
    file = open_gguf(path)
    kind = file.need("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise bad_model(path, f"metadata key tokenizer.ggml.model: {kind!r} is not supported; known: gpt2.")
    texts: list[str] = file.need("tokenizer.ggml.tokens", list)
    types: list[int] = file.get("tokenizer.ggml.token_type", [1] * len(texts))
    merges = [str(merge).partition(" ")[::2] for merge in file.need("tokenizer.ggml.merges", list)]
    if len(types) != len(texts):
        raise bad_model(path, "metadata key tokenizer.ggml.token_type has another length than tokenizer.ggml.tokens.")
    vocabulary = {text: token_id for token_id, text in enumerate(texts)}
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=file.get("tokenizer.ggml.pre") == "llama-bpe")
    except Exception as error:  # the library raises bare Exception for merges outside the vocabulary
        raise bad_model(path, f"metadata key tokenizer.ggml.merges: {error}") from None
    tokenizer = Tokenizer(model)
    _set_pre_tokenizer(tokenizer, file)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, texts, types)
    if _adds_bos(file):
        bos_id = _token_id(file, "bos", len(texts))
        if bos_id is None:
            raise bad_model(path, "missing metadata key tokenizer.ggml.bos_token_id.")
        bos = texts[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def tokenizer_config_from_gguf(path: Path) -> dict[str, Any]:
    """What an HF `tokenizer_config.json` for this file says; `chat_template` only when the file has one."""
    file = open_gguf(path)
    texts: list[str] = file.need("tokenizer.ggml.tokens", list)
    arch = file.need("general.architecture", str)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.count(f"{arch}.context_length"),
        "add_bos_token": _adds_bos(file),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = _token_id(file, key, len(texts))
        if token_id is not None:
            config[f"{name}_token"] = texts[token_id]
    template = file.get("tokenizer.chat_template", "")
    if template:
        config["chat_template"] = template
    return config


def _adds_bos(file: GgufFile) -> bool:
    """Whether encoding puts the begin-of-sequence token first; Llama 3's files leave the key out and mean yes."""
    return bool(file.get("tokenizer.ggml.add_bos_token", file.get("tokenizer.ggml.pre", "") == "llama-bpe"))


def _token_id(file: GgufFile, name: str, num_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id: int | None = file.get(key)
    if token_id is not None and (type(token_id) is not int or not 0 <= token_id < num_tokens):
        raise bad_model(file.path, f"metadata key {key}: {token_id} is not a token.")
    return token_id


def _set_pre_tokenizer(tokenizer: Tokenizer, file: GgufFile) -> None:
    name = file.get("tokenizer.ggml.pre", "missing")
    if name in ("gpt-2", "gpt2"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif name in _SPLIT_PATTERNS:
        split = pre_tokenizers.Split(Regex(_SPLIT_PATTERNS[name]), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        if name == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
    else:
        known = ", ".join(("gpt-2", "smollm", *_SPLIT_PATTERNS))
        raise bad_model(file.path, f"metadata key tokenizer.ggml.pre: {name!r} is not supported; known: {known}.")


def _add_tokens(tokenizer: Tokenizer, texts: list[str], types: list[int]) -> None:
    control = [text for text, kind in zip(texts, types, strict=True) if kind == _CONTROL]
    user = [text for text, kind in zip(texts, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in user])
