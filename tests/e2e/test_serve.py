"""`baton serve` and `baton down`, as `make up` and `make down` use them, with curl's and OpenAI's point of view."""

import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from tests.e2e.service import request
from tests.fakes.ports import free_port


def baton(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "baton.cli", *arguments]
    environment = {**os.environ, "BATON_HOME": str(home)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_serve_detach_answers_and_down_stops_everything(demo_model: Path, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    try:
        up = baton(tmp_path, "serve", "--prefill", "2", "--decode", "1", "--model", str(demo_model), "--port", str(port), "--detach")  # fmt: skip
        assert up.returncode == 0, up.stdout + up.stderr
        assert f"serving at {url}" in up.stdout
        assert len(up.stdout) > 100, "an answer was printed"
        second = baton(tmp_path, "serve", "--model", str(demo_model), "--port", str(port), "--detach")
        assert second.returncode != 0
        assert "already running" in second.stderr
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        model = client.models.list().data[0].id
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(model=model, messages=question, max_tokens=16, temperature=0)  # type: ignore[arg-type]
        assert "Paris" in str(answer.choices[0].message.content)
        asked = baton(tmp_path, "ask", "What is the capital of France?", "--url", url, "--max-tokens", "16")
        assert "Paris" in asked.stdout
    finally:
        down = baton(tmp_path, "down")
    assert "stopped" in down.stdout
    with pytest.raises(OSError, match="refused"):
        request(url, "GET", "/health")


def test_serve_names_the_port_that_is_in_use(demo_model: Path, tmp_path: Path, aggregated: object) -> None:
    port = str(aggregated.url).rsplit(":", 1)[1]  # type: ignore[attr-defined]
    result = baton(tmp_path, "serve", "--model", str(demo_model), "--port", port, "--detach")
    assert result.returncode != 0
    assert "in use" in result.stderr


def test_stand_ins_run_the_worker_and_the_router_under_their_upstream_names() -> None:
    standins = Path(__file__).parents[2] / "src" / "baton" / "standins"
    environment = {**os.environ, "PYTHONPATH": str(standins)}
    modules = ("sglang.launch_server", "sglang.srt.disaggregation.mini_lb", "sglang_router.launch_router")
    for module in (*modules, "vllm_router.launch_router"):
        command = [sys.executable, "-m", module, "--no-such-flag-at-all"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 2, result
        assert "unknown" in result.stderr
        assert "--no-such-flag-at-all" in result.stderr


def test_bad_models_are_start_up_errors_that_name_the_file(tmp_path: Path, demo_model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(demo_model / name)
    config = json.loads((demo_model / "config.json").read_text())
    config_file = tmp_path / "config.json"
    cases = {
        "FancyNetForCausalLM": json.dumps({**config, "architectures": ["FancyNetForCausalLM"]}),
        "hidden_size": json.dumps({key: value for key, value in config.items() if key != "hidden_size"}),
        "config.json": "{not json",
    }
    for expected, text in cases.items():
        config_file.write_text(text)
        result = baton(tmp_path, "engine", "--model-path", str(tmp_path), "--port", str(free_port()))
        assert result.returncode == 1
        assert expected in result.stderr
        assert "config.json" in result.stderr
    config_file.write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    weights = (demo_model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    result = baton(tmp_path, "engine", "--model-path", str(tmp_path), "--port", str(free_port()))
    assert result.returncode == 1
    assert "model.safetensors" in result.stderr
