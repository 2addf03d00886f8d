"""Model configs: what transformers writes is read back field by field; what the engine cannot compute is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from baton.engine.errors import ModelError
from baton.engine.models.config import RopeScaling, load_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


def write(directory: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.mark.parametrize(
    ("family", "architecture", "extra"),
    [
        (LlamaConfig, "LlamaForCausalLM", {}),
        (LlamaConfig, "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
        (Qwen2Config, "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
        (Qwen3Config, "Qwen3ForCausalLM", {"head_dim": 32, "attention_bias": True}),
        (
            LlamaConfig,
            "LlamaForCausalLM",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 256,
                }
            },
        ),
    ],
)
def test_configs_written_by_transformers_are_read(
    tmp_path: Path, family: type[PretrainedConfig], architecture: str, extra: dict[str, Any]
) -> None:
    theirs = family(
        architectures=[architecture],
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=120,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        eos_token_id=7,
        bos_token_id=3,
        dtype="float16",
        **extra,
    )
    theirs.save_pretrained(tmp_path)
    ours = load_config(tmp_path)
    assert ours.architecture == architecture
    assert (ours.hidden_size, ours.intermediate_size, ours.num_layers) == (64, 96, 3)
    assert (ours.num_heads, ours.num_kv_heads, ours.vocab_size) == (4, 2, 120)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_position_embeddings == 512
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.dtype == "float16"
    assert ours.eos_token_ids == (7,)
    assert ours.bos_token_id == 3
    assert ours.qk_norm == (family is Qwen3Config)
    if "rope_parameters" in extra:
        assert ours.rope_scaling == RopeScaling("llama3", 8.0, 256, low_freq_factor=1.0, high_freq_factor=4.0)
    else:
        assert ours.rope_scaling is None


def test_end_of_sequence_ids_of_both_files_are_merged(tmp_path: Path) -> None:
    write(tmp_path, LLAMA | {"eos_token_id": 2}, {"eos_token_id": [5, 2], "bos_token_id": 1})
    config = load_config(tmp_path)
    assert config.eos_token_ids == (5, 2)
    assert config.bos_token_id == 1


def test_old_style_rope_scaling_and_missing_optional_fields(tmp_path: Path) -> None:
    raw = LLAMA | {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2}}
    del raw["num_key_value_heads"], raw["torch_dtype"]
    config = load_config(write(tmp_path, raw))
    assert config.num_kv_heads == 4
    assert config.dtype == "float32"
    assert config.rope_theta == 5000.0
    assert config.rope_scaling == RopeScaling("linear", 2.0)


def test_qwen2_that_states_but_does_not_use_a_sliding_window_is_accepted(tmp_path: Path) -> None:
    raw = LLAMA | {
        "architectures": ["Qwen2ForCausalLM"],
        "sliding_window": 128,
        "use_sliding_window": False,
        "max_window_layers": 1,
    }
    config = load_config(write(tmp_path, raw))
    assert config.attention_bias
    assert not config.attention_out_bias


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "unknown architecture 'GPT2LMHeadModel'; known: LlamaForCausalLM,"),
        ({"architectures": None}, "missing field architectures"),
        ({"hidden_size": None}, "missing field hidden_size"),
        ({"rms_norm_eps": None}, "missing field rms_norm_eps"),
        ({"num_hidden_layers": 0}, "field num_hidden_layers must be a positive integer, got 0"),
        ({"vocab_size": "many"}, "field vocab_size must be a positive integer, got 'many'"),
        ({"rms_norm_eps": True}, "field rms_norm_eps must be a positive number"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"torch_dtype": "float8_e4m3fn"}, "field dtype: 'float8_e4m3fn'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: 'awq'"),
        ({"sliding_window": 4096}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rotary type 'longrope'"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "rotary type 'mrope'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor must be a number"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "original_max_position_embeddings"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_theta": "big"}, "rope_theta must be a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"eos_token_id": "</s>"}, "eos_token_id must hold token ids"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_file_and_field(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ModelError) as caught:
        load_config(write(tmp_path, LLAMA | change))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    assert expected in message
    assert "\n" not in message


def test_qwen_needs_its_kv_heads_stated(tmp_path: Path) -> None:
    raw = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": None}
    with pytest.raises(ModelError, match="missing field num_key_value_heads"):
        load_config(write(tmp_path, raw))


def test_qwen2_sliding_layers_are_refused(tmp_path: Path) -> None:
    raw = LLAMA | {
        "architectures": ["Qwen2ForCausalLM"],
        "sliding_window": 128,
        "use_sliding_window": True,
        "max_window_layers": 1,
    }
    with pytest.raises(ModelError, match="sliding window"):
        load_config(write(tmp_path, raw))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"hidden_size": ', "is not JSON"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        (b"[1, 2]", "must hold a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_config_file_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert expected in str(caught.value)


def test_paths_without_a_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json and no \.gguf file"):
        load_config(tmp_path)
    with pytest.raises(ModelError, match="no such model directory"):
        load_config(tmp_path / "missing")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"not a \.gguf file"):
        load_config(tmp_path / "weights.bin")


def test_code_of_a_model_directory_is_never_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "modeling.py").write_text("raise RuntimeError('code of the model directory ran')")
    write(tmp_path, LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}})
    with caplog.at_level(logging.WARNING):
        load_config(tmp_path)
        assert not caplog.records
        load_config(tmp_path, trust_remote_code=True)
    assert "auto_map" in caplog.text
