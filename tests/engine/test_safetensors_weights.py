"""Safetensors: what transformers saves is loaded bit for bit; a file that is not whole is refused by name."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fakes.models import FAMILIES, hf_model

from baton.engine.errors import ModelError
from baton.engine.models.config import load_config
from baton.engine.weights.fingerprint import model_fingerprint
from baton.engine.weights.loader import open_weights
from baton.engine.weights.names import expected_tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("single")
    hf_model("llama").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    hf_model("llama").save_pretrained(directory, max_shard_size="100KB")
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def sharded_copy(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def load(directory: Path, load_format: str = "auto") -> dict[str, torch.Tensor]:
    return dict(open_weights(directory, load_format, load_config(directory)))


def refusal(directory: Path, load_format: str = "auto") -> str:
    with pytest.raises(ModelError) as caught:
        load(directory, load_format)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_size", ["100KB", "1GB"])
def test_every_tensor_of_a_transformers_model_is_loaded(tmp_path: Path, family: str, shard_size: str) -> None:
    model = hf_model(family)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "100KB")
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    loaded = load(tmp_path)
    assert expected_tensors(load_config(tmp_path)) == {name: tuple(value.shape) for name, value in state.items()}
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    hf_model("qwen2").to(dtype).save_pretrained(tmp_path)
    assert {value.dtype for value in load(tmp_path).values()} == {dtype}


def test_two_files_without_an_index_are_one_model(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    (copy / "model.safetensors").unlink()
    save_file({name: tensors[name] for name in names[:5]}, copy / "a.safetensors")
    save_file({name: tensors[name] for name in names[5:]}, copy / "b.safetensors")
    assert load(copy).keys() == tensors.keys()
    save_file({name: tensors[name] for name in names[4:]}, copy / "b.safetensors")
    assert refusal(copy) == f"{copy / 'b.safetensors'}: tensor {names[4]} is in another file of this model too."


def test_a_file_cut_short_is_named_at_every_length(copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (0, 5, 8, header_end // 2, header_end - 1, header_end, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        message = refusal(copy)
        assert message.startswith(f"{file}: "), message
        assert "truncated" in message or "first 8 bytes" in message, (length, message)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"not json", "header is not JSON"),
        (b"[]", "header is not a JSON object"),
        (b'{"a": 1}', "the header entry of tensor a"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "tensor a holds sizes"),
        (b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}', "tensor a has 4 bytes"),
        (b'{"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}', "tensor a has dtype I8"),
    ],
)
def test_a_wrong_header_is_named(copy: Path, header: bytes, expected: str) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    message = refusal(copy)
    assert message.startswith(f"{file}: ")
    assert expected in message


def change_tensors(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = directory / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def test_missing_unexpected_and_misshapen_tensors_are_named(copy: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(copy, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    assert f"tensor {name} has shape [95, 64], the config implies [96, 64]" in refusal(copy)
    change_tensors(copy, lambda tensors: tensors.pop(name))
    assert refusal(copy) == f"{copy / 'model.safetensors'}: missing tensor {name}."


def test_a_tensor_nobody_would_use_is_refused_but_rotary_buffers_are_not(copy: Path) -> None:
    change_tensors(copy, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in load(copy)
    change_tensors(copy, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    assert "tensor model.layers.0.self_attn.q_proj.bias is not part of a LlamaForCausalLM" in refusal(copy)


def test_unsupported_dtype_is_named(copy: Path) -> None:
    name = "model.norm.weight"
    change_tensors(copy, lambda tensors: tensors.update({name: tensors[name].to(torch.float64)}))
    assert f"tensor {name} has dtype F64, which is not supported; known: F32, F16, BF16" in refusal(copy)


def test_a_missing_shard_and_a_wrong_index_are_named(sharded_copy: Path) -> None:
    index = json.loads((sharded_copy / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    moved = dict(index["weight_map"])
    name = next(name for name, shard in moved.items() if shard == shards[0])
    moved[name] = shards[1]
    (sharded_copy / INDEX).write_text(json.dumps({"weight_map": moved}))
    assert f"places tensor {name} in {shards[1]}; it is in {shards[0]}" in refusal(sharded_copy)
    (sharded_copy / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {"extra": shards[0]}}))
    assert f"{sharded_copy / shards[0]}: missing tensor extra" in refusal(sharded_copy)
    (sharded_copy / INDEX).write_text(json.dumps({"weight_map": {name: "../outside.safetensors"}}))
    assert "names '../outside.safetensors'" in refusal(sharded_copy)
    (sharded_copy / INDEX).write_text("{}")
    assert "missing field weight_map" in refusal(sharded_copy)
    (sharded_copy / INDEX).write_text(json.dumps(index))
    (sharded_copy / shards[1]).unlink()
    assert refusal(sharded_copy) == f"{sharded_copy / INDEX}: shard {shards[1]} is missing."


def test_a_directory_without_weights_is_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert refusal(copy) == f"{copy}: no *.safetensors file in this model directory."


@pytest.mark.parametrize(
    ("load_format", "expected"),
    [
        ("pt", "pickled weights can run code"),
        ("npcache", "--load-format npcache is not supported; known: auto, safetensors, gguf, dummy"),
        ("bitsandbytes", "not supported"),
        ("nonsense", "--load-format nonsense is unknown"),
        ("gguf", "--load-format gguf was asked for"),
    ],
)
def test_load_formats_that_are_not_read_are_refused_by_name(saved: Path, load_format: str, expected: str) -> None:
    assert expected in refusal(saved, load_format)


def test_dummy_weights_need_no_files_and_depend_on_the_seed_alone(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    config = load_config(copy)
    first, again = load(copy, "dummy"), load(copy, "dummy")
    other = dict(open_weights(copy, "dummy", config, dummy_seed=1))
    assert {name: tuple(value.shape) for name, value in first.items()} == expected_tensors(config)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])
        assert value.dtype == torch.float32
        assert float(value.abs().max()) < 1.1
    assert model_fingerprint(copy, config, "dummy") != model_fingerprint(copy, config, "dummy", dummy_seed=1)


def test_the_fingerprint_follows_content_not_paths_or_files(saved: Path, sharded: Path, copy: Path) -> None:
    original = model_fingerprint(saved, load_config(saved))
    assert len(original) == 32
    assert model_fingerprint(copy, load_config(copy)) == original
    assert model_fingerprint(sharded, load_config(sharded)) == original
    change_tensors(copy, lambda tensors: tensors["model.layers.1.self_attn.k_proj.weight"].add_(1e-3))
    changed = model_fingerprint(copy, load_config(copy))
    assert changed != original
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 1e-3}))
    assert model_fingerprint(copy, load_config(copy)) not in (original, changed)
