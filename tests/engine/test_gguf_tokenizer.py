"""Tokenizers inside GGUF files: every known pre-tokenizer against transformers' own, the rest refused by name."""

from pathlib import Path
from typing import Any

import pytest
from tests.fakes.gguf_models import write_gguf
from tests.fakes.models import hf_model
from tokenizers import Regex, pre_tokenizers
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from baton.engine.errors import ModelError
from baton.engine.weights.gguf_tokenizer import tokenizer_config_from_gguf, tokenizer_from_gguf

TEXTS = [
    "Hello world, it's 2024 and they'LL don't",
    "  two  spaces\n\nlines \r\n end   ",
    "e\u0301 é ﬁ ½ ² ١٢٣4567",
    "日本語 text 👩‍👩‍👧 x_y-z(1)!?",
    "<|start|>user<|end|> <tool>x",
]
MERGES = ["h e", "l l", "Ġ w", "Ġ Ġ", "1 2", "Ċ Ċ", "he ll"]


def tokenizer_metadata(pre: str, **changes: Any) -> dict[str, Any]:
    tokens = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
    tokens += ["<|start|>", "<|end|>", "<tool>"]
    types = [1] * (len(tokens) - 3) + [3, 3, 4]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": MERGES,
        "bos_token_id": tokens.index("<|start|>"),
        "eos_token_id": tokens.index("<|end|>"),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


def test_qwen2_is_transformers_qwen2(path: Path) -> None:
    metadata = tokenizer_metadata("qwen2")
    ours = tokenizer_from_gguf(write_gguf(path, hf_model("qwen2"), metadata=metadata))
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    theirs = Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in MERGES])
    theirs.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    theirs.add_tokens(["<tool>"])
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text).input_ids, text
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == theirs.decode(theirs(text).input_ids)


def test_llama_bpe_splits_as_transformers_does(path: Path) -> None:
    tokenizer = tokenizer_from_gguf(write_gguf(path, hf_model("llama"), metadata=tokenizer_metadata("llama-bpe")))
    split = pre_tokenizers.Split(Regex(TikTokenConverter("").pattern), behavior="isolated")
    theirs = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    for text in TEXTS:
        assert tokenizer.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_the_first_token_is_added_where_the_file_says_so(path: Path) -> None:
    for pre, stated, expected in (("llama-bpe", None, True), ("llama-bpe", False, False), ("gpt-2", True, True)):
        changes = {} if stated is None else {"add_bos_token": stated}
        write_gguf(path, hf_model("llama"), metadata=tokenizer_metadata(pre, **changes))
        tokens = tokenizer_from_gguf(path).encode("hello").tokens
        assert (tokens[0] == "<|start|>") == expected
        assert tokenizer_from_gguf(path).encode("hello", add_special_tokens=False).tokens[0] != "<|start|>"
        assert tokenizer_config_from_gguf(path)["add_bos_token"] == expected


def test_special_tokens_vanish_in_text_and_user_tokens_stay(path: Path) -> None:
    tokenizer = tokenizer_from_gguf(write_gguf(path, hf_model("llama"), metadata=tokenizer_metadata("gpt-2")))
    ids = tokenizer.encode("<|start|>a<tool>b<|end|>").ids
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "a<tool>b"


def test_the_config_names_tokens_and_template(path: Path) -> None:
    metadata = tokenizer_metadata("gpt-2") | {"tokenizer.chat_template": "{{ messages }}"}
    config = tokenizer_config_from_gguf(write_gguf(path, hf_model("llama"), metadata=metadata))
    assert (config["bos_token"], config["eos_token"]) == ("<|start|>", "<|end|>")
    assert config["chat_template"] == "{{ messages }}"
    assert config["model_max_length"] == 512
    assert "pad_token" not in config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model: 'llama' is not supported"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre: 'tekken' is not supported; known: gpt-2, smollm, qwen2, llama-bpe"),
        ({"pre": None}, "tokenizer.ggml.pre"),
        ({"tokens": None}, "missing metadata key tokenizer.ggml.tokens"),
        ({"merges": None}, "missing metadata key tokenizer.ggml.merges"),
        ({"merges": ["no such"]}, "tokenizer.ggml.merges"),
        ({"token_type": [1, 3]}, "tokenizer.ggml.token_type has another length"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens must be of type list, got 'abc'"),
        ({"pre": 5}, "tokenizer.ggml.pre must be of type str, got 5"),
        ({"bos_token_id": 9999}, "tokenizer.ggml.bos_token_id: 9999 is not a token"),
    ],
)
def test_tokenizers_that_are_not_known_are_refused(path: Path, changes: dict[str, Any], expected: str) -> None:
    write_gguf(path, hf_model("llama"), metadata=tokenizer_metadata(**({"pre": "gpt-2"} | changes)))
    with pytest.raises(ModelError) as caught:
        tokenizer_from_gguf(path)
        tokenizer_config_from_gguf(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)
