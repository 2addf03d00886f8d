"""GGUF: every known type is loaded under HF names in HF layout; a file that is not whole is refused by name."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.fakes.gguf_models import gguf_name, llama_cpp_layout, write_gguf
from tests.fakes.models import FAMILIES, MOE_FAMILIES, checkpoint, hf_model
from transformers import PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from baton.engine.errors import ModelError
from baton.engine.models.config import RopeScaling, load_config
from baton.engine.weights.fingerprint import model_fingerprint
from baton.engine.weights.gguf_file import GgufFile, open_gguf
from baton.engine.weights.loader import open_weights
from baton.engine.weights.names import expected_tensors

ROUNDTRIP_ERROR = {"F32": 0.0, "F16": 1e-3, "BF16": 8e-3, "Q8_0": 1e-2, "Q4_0": 0.15, "Q4_1": 0.15}
"""Largest error of a weight, relative to the largest weight of its tensor, that each type's precision allows."""


def load(path: Path) -> dict[str, torch.Tensor]:
    return dict(open_weights(path, "auto", load_config(path)))


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def trained(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    state = dict(checkpoint(model))
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@pytest.mark.parametrize("family", FAMILIES | MOE_FAMILIES)
def test_f32_files_give_back_the_model_bit_for_bit(tmp_path: Path, family: str) -> None:
    model = hf_model(family)
    path = write_gguf(tmp_path / "m.gguf", model)
    config = load_config(path)
    loaded = load(path)
    assert {name: tuple(value.shape) for name, value in loaded.items()} == expected_tensors(config)
    for name, value in trained(model).items():
        assert torch.equal(loaded[name], value), name
    model.save_pretrained(tmp_path / "hf")
    assert config == load_config(tmp_path / "hf")


@pytest.mark.parametrize(
    ("family", "kind"), [*(("llama", kind) for kind in ROUNDTRIP_ERROR), ("qwen3-moe", "Q8_0"), ("qwen3-moe", "BF16")]
)
def test_types_that_the_package_can_write(tmp_path: Path, family: str, kind: str) -> None:
    model = hf_model(family, **({} if family == "llama" else {"moe_intermediate_size": 64}))
    path = write_gguf(tmp_path / "m.gguf", model, kind)
    loaded = load(path)
    for name, value in trained(model).items():
        bound = (0.0 if value.ndim == 1 else ROUNDTRIP_ERROR[kind]) * float(value.abs().max())
        assert float((loaded[name].float() - value).abs().max()) <= bound, name
    native = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert loaded["model.embed_tokens.weight"].dtype == native
    assert load_config(path).dtype == {"F32": "float32", "F16": "float16"}.get(kind, "bfloat16")


def q4_k_block(block: NDArray[np.uint8]) -> NDArray[np.float32]:
    """256 weights of a Q4_K super-block, element by element as ggml's format describes it."""
    d, dmin = (float(value) for value in block[:4].view(np.float16))
    packed, quants = block[4:16].astype(int), block[16:].astype(int)
    out = np.zeros(256, np.float32)
    for group in range(8):
        if group < 4:
            scale, low = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = (packed[group + 4] & 15) | ((packed[group - 4] >> 6) << 4)
            low = (packed[group + 4] >> 4) | ((packed[group] >> 6) << 4)
        for index in range(32):
            byte = quants[(group // 2) * 32 + index]
            quant = byte >> 4 if group % 2 else byte & 15
            out[group * 32 + index] = d * scale * quant - dmin * low
    return out


def q6_k_block(block: NDArray[np.uint8]) -> NDArray[np.float32]:
    """256 weights of a Q6_K super-block, element by element as ggml's format describes it."""
    low, high = block[:128].astype(int), block[128:192].astype(int)
    scales, d = block[192:208].view(np.int8).astype(int), float(block[208:210].view(np.float16)[0])
    out = np.zeros(256, np.float32)
    for half in range(2):
        for index in range(32):
            for quarter in range(4):
                nibbles = low[half * 64 + index + (quarter % 2) * 32] >> (4 * (quarter // 2)) & 15
                quant = (nibbles | (high[half * 32 + index] >> (2 * quarter) & 3) << 4) - 32
                place = half * 128 + quarter * 32 + index
                out[place] = d * scales[place // 16] * quant
    return out


@pytest.mark.parametrize(("kind", "reference"), [("Q4_K", q4_k_block), ("Q6_K", q6_k_block)])
def test_k_types_follow_the_format(tmp_path: Path, kind: str, reference: Any) -> None:
    model = hf_model("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1, vocab_size=8)
    rng = np.random.default_rng(0)
    block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks: dict[str, NDArray[np.uint8]] = {}
    for hf_name, tensor in trained(model).items():
        if tensor.ndim == 2:
            raw = rng.integers(0, 256, (tensor.shape[0], tensor.shape[1] // 256, block_bytes), np.uint8)
            halves = rng.uniform(1e-4, 1e-2, (*raw.shape[:2], 2)).astype(np.float16).view(np.uint8)
            if kind == "Q4_K":
                raw[..., :4] = halves
            else:
                raw[..., 208:210] = halves[..., :2]
            blocks[gguf_name(hf_name)] = raw.reshape(tensor.shape[0], -1)
    path = write_gguf(tmp_path / "m.gguf", model, kind, replaced=blocks)
    loaded = load(path)
    for name, tensor in loaded.items():
        if tensor.ndim == 2:
            rows = blocks[gguf_name(name)]
            in_file = llama_cpp_layout(name, tensor.numpy(), model)
            for row in (0, len(rows) - 1):
                expected = np.concatenate([reference(block) for block in rows[row].reshape(-1, block_bytes)])
                np.testing.assert_allclose(in_file[row], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_own_gguf_reader_gives_the_same_tensors(tmp_path: Path, family: str) -> None:
    model = hf_model(family)
    path = write_gguf(tmp_path / "m.gguf", model, "Q8_0")
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    loaded = load(path)
    assert loaded.keys() == theirs.keys()
    for name, value in loaded.items():
        assert torch.equal(value, theirs[name]), name


def test_qwen_rows_are_not_permuted_and_llama_rows_are(tmp_path: Path) -> None:
    for family, permuted in (("qwen3", False), ("llama", True)):
        model = hf_model(family)
        path = write_gguf(tmp_path / f"{family}.gguf", model)
        name = "model.layers.0.self_attn.q_proj.weight"
        stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_q.weight").data
        assert np.array_equal(stored, model.state_dict()[name].numpy()) != permuted
        assert torch.equal(load(path)[name], model.state_dict()[name])


def test_a_file_cut_short_is_named_at_every_length(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", hf_model("qwen2"))
    whole = path.read_bytes()
    for length in (0, 3, 4, 12, 24, 60, 300, 900, 2500, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        message = refusal(path)
        assert message.startswith(f"{path}: is not a readable GGUF file: "), (length, message)
        assert length == 0 or "truncated" in message, (length, message)
    path.write_bytes(b"GGML" + whole[4:])
    assert "magic" in refusal(path)


METADATA_OF_EVERY_KIND: dict[str, Any] = {
    "some.texts": ["", "ä", "long " * 50, "x"],
    "some.numbers": [1, -2, 3],
    "some.fractions": [0.5, -1.25],
    "some.truths": [True, False],
    "some.text": "z\u00e9ro",
}


def test_metadata_is_what_the_packages_own_reader_gives(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", hf_model("llama"), metadata=METADATA_OF_EVERY_KIND)
    file = open_gguf(path)
    fields = gguf.GGUFReader(path).fields
    assert METADATA_OF_EVERY_KIND.items() <= {key: file.get(key) for key in fields}.items()
    for key, field in fields.items():
        assert file.get(key) == field.contents(), key


def test_files_of_the_other_byte_order_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", hf_model("llama"), endianess=gguf.GGUFEndian.BIG)
    assert refusal(path).endswith("it was written for machines of the other byte order.")


def test_metadata_cut_short_anywhere_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", hf_model("llama"), metadata=METADATA_OF_EVERY_KIND)
    whole = path.read_bytes()
    end_of_metadata = whole.index(b"token_embd.weight")
    for length in range(24, end_of_metadata, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"is not a readable GGUF file: truncated"):
            GgufFile(path)


@pytest.mark.parametrize("key", ["some.texts", "some.numbers"])
def test_an_absurd_length_in_the_header_ends_at_once(tmp_path: Path, key: str) -> None:
    model = hf_model("llama")
    path = write_gguf(tmp_path / "m.gguf", model, metadata=METADATA_OF_EVERY_KIND)
    whole = path.read_bytes()
    at = whole.index(key.encode()) + len(key) + 8
    path.write_bytes(whole[:at] + (2**62).to_bytes(8, "little") + whole[at + 8 :])
    assert refusal(path).startswith(f"{path}: is not a readable GGUF file: ")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.block_count": None}, "missing metadata key llama.block_count"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "missing metadata key llama.attention.layer_norm_rms"),
        ({"llama.block_count": 3}, "missing tensor model.layers.2."),
        ({"llama.block_count": 1}, "tensor model.layers.1.self_attn.q_proj.weight is not part of"),
        ({"llama.attention.head_count_kv": 3}, "not a multiple of head_count_kv 3"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.attention.sliding_window": 128}, "sliding window"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "'longrope' is not supported"),
        ({"llama.rope.freq_base": "big"}, "llama.rope.freq_base must be of type float, got 'big'"),
        ({"llama.attention.layer_norm_rms_epsilon": True}, "layer_norm_rms_epsilon must be of type float, got True"),
        ({"llama.rope.freq_base": -1.0}, "llama.rope.freq_base must be a positive number, got -1.0"),
        ({"llama.block_count": "2"}, "llama.block_count must be a positive integer, got '2'"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "must hold token ids, got 'x'"),
        ({"split.count": 2}, "one of 2 split GGUF files"),
    ],
)
def test_metadata_that_cannot_be_served_is_refused(tmp_path: Path, metadata: dict[str, Any], expected: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", hf_model("llama"), metadata=metadata)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_more_experts_of_a_token_than_there_are_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", hf_model("qwen3-moe"), metadata={"qwen3moe.expert_used_count": 9})
    assert refusal(path) == f"{path}: metadata key qwen3moe.expert_used_count is 9, but there are 8 experts."


def test_unknown_architectures_and_types_are_refused(tmp_path: Path) -> None:
    model = hf_model("llama")
    path = write_gguf(tmp_path / "q5.gguf", model, "Q5_0")
    assert "has type Q5_0, which is not supported; known: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K" in refusal(path)
    path = write_gguf(tmp_path / "missing.gguf", model, leave_out="blk.1.attn_v.weight")
    assert refusal(path) == f"{path}: missing tensor model.layers.1.self_attn.v_proj.weight."
    model.config.model_type = "mamba"
    path = write_gguf(tmp_path / "mamba.gguf", model)
    assert "unknown architecture 'mamba'; known: llama, qwen2, qwen3" in refusal(path)


def test_a_directory_with_one_gguf_file_is_that_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", hf_model("qwen3"))
    assert load(tmp_path).keys() == load(path).keys()
    assert load_config(tmp_path) == load_config(path)
    (tmp_path / "config.json").write_text("{}")
    assert load_config(tmp_path) == load_config(path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "config.json: missing field architectures" in refusal(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write_gguf(tmp_path / "n.gguf", hf_model("qwen3"))
    assert "several GGUF files; name one of them: m.gguf, n.gguf" in refusal(tmp_path)


def test_llama3_frequency_scaling_is_recognised_by_its_tensor(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = hf_model("llama", head_dim=128, rope_parameters=rope, max_position_embeddings=131072)
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    factors = (plain / model.model.rotary_emb.inv_freq.double().numpy()).astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": factors})
    assert load_config(path).rope_scaling == RopeScaling(
        "llama3", 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0
    )
    assert load(path).keys() == trained(model).keys()
    path = write_gguf(tmp_path / "odd.gguf", model, extra={"rope_freqs.weight": factors * 1.5})
    assert "rope_freqs.weight matches no known" in refusal(path)


def test_rope_scaling_metadata(tmp_path: Path) -> None:
    keys = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "m.gguf", hf_model("llama"), metadata=keys)
    scaling = load_config(path).rope_scaling
    assert scaling is not None
    assert (scaling.type, scaling.factor, scaling.original_max_position_embeddings) == ("yarn", 4.0, 512)


def test_the_fingerprint_sees_a_changed_tensor(tmp_path: Path) -> None:
    model = hf_model("llama")
    first = write_gguf(tmp_path / "a.gguf", model)
    same = write_gguf(tmp_path / "b.gguf", model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(1e-3)
    changed = write_gguf(tmp_path / "c.gguf", model)
    prints = [model_fingerprint(path, load_config(path)) for path in (first, same, changed)]
    assert prints[0] == prints[1] != prints[2]
