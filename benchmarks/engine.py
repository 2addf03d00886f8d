"""Engine speed beside its peers and the machine's limits, all in one run.

    .venv/bin/python benchmarks/engine.py                                  # ours, transformers, roofline
    .venv/bin/python benchmarks/engine.py --vllm-python VENV/bin/python    # and vLLM's CPU build
    .venv/bin/python benchmarks/engine.py --tp 2 --pp 2                    # and two ranks on this host, by shared memory, TCP and gloo;
                                                                           # and two pipeline stages, with one KV pool and with two
    .venv/bin/python benchmarks/engine.py --dp 2                           # and two engines behind one port, which share the cores

SmolLM2-135M-Instruct, random 512-token prompts, 128 new tokens, greedy, bursts of 1, 8 and 32 requests over HTTP:
- prefill: prompt tokens/s of a burst that asks for one token each;
- long prefill: prompt tokens/s of one prompt of 6144 tokens, which takes three chunks;
- decode: output tokens/s after the last first token's time, prompts cached, so that no prefill interferes;
- cold: output tokens/s of the whole burst, prefill included; TTFT and TPOT p50/p99 of it.
Rounds of the servers alternate; figures are medians. The client shares the two cores with the server, for every server alike.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from host import describe_machine, memory_mb, wait_quiet
from load import Timing, burst, random_prompts
from machine import measure_limits, roofline

PROMPT_LEN, NEW_TOKENS, CONCURRENCY = 512, 128, (1, 8, 32)
POOL_TOKENS = 49152
"""Of each engine of ours: unset, it depends on the memory that the servers before it left. A round's prompts fit, whatever came before."""
LONG_PROMPT_LEN = 6144
READY_TIMEOUT_S = 180


class Server:
    """One HTTP server under test, in its own process group."""

    def __init__(
        self,
        name: str,
        command: list[str],
        port: int,
        environment: dict[str, str] | None = None,
        ready_path: str = "/health",
    ) -> None:
        self.name, self.port, self._ready_path = name, port, ready_path
        self.log = tempfile.NamedTemporaryFile(prefix=f"{name}-", suffix=".log", delete=False)  # noqa: SIM115
        started = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env={**os.environ, **(environment or {})}, start_new_session=True
        )
        self._wait_ready()
        self.start_s = time.perf_counter() - started
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10) as response:
            self.model = json.load(response)["data"][0]["id"]

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self._ready_path}", timeout=2):
                    return
            except OSError:
                time.sleep(0.1)
        raise SystemExit(f"{self.name} did not get ready; log: {self.log.name}")

    def burst(self, prompts: list[list[int]], max_tokens: int) -> list[Timing]:
        return asyncio.run(burst("127.0.0.1", self.port, self.model, prompts, max_tokens))

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def measure(server: Server, concurrency: int, seed: int) -> dict[str, float]:
    """One round of one server at one concurrency."""
    prompts, others = (random_prompts(concurrency, PROMPT_LEN, seed + offset) for offset in (0, 1))
    wait_quiet()
    started = time.perf_counter()
    server.burst(others, 1)
    prefill_s = time.perf_counter() - started
    cold = server.burst(prompts, NEW_TOKENS)
    cold_s = max(t.started_s + t.token_times_s[-1] for t in cold) - min(t.started_s for t in cold)
    warm = server.burst(prompts, NEW_TOKENS)
    first = max(t.started_s + t.ttft_s for t in warm)
    last = max(t.started_s + t.token_times_s[-1] for t in warm)
    tokens_after = sum(sum(t.started_s + at > first for at in t.token_times_s) for t in warm)
    long_prefill_s = long_prefill(server, seed + 2) if concurrency == 1 else None
    return {
        **({} if long_prefill_s is None else {"long_prefill_tokens_per_s": LONG_PROMPT_LEN / long_prefill_s}),
        "prefill_tokens_per_s": concurrency * PROMPT_LEN / prefill_s,
        "decode_tokens_per_s": tokens_after / (last - first),
        "cold_output_tokens_per_s": sum(len(t.token_times_s) for t in cold) / cold_s,
        "ttft_p50_s": quantile([t.ttft_s for t in cold], 0.5),
        "ttft_p99_s": quantile([t.ttft_s for t in cold], 0.99),
        "tpot_p50_ms": 1e3 * quantile([t.tpot_s for t in cold], 0.5),
        "tpot_p99_ms": 1e3 * quantile([t.tpot_s for t in cold], 0.99),
        "cached_ttft_p50_s": quantile([t.ttft_s for t in warm], 0.5),
        "memory_mb": memory_mb(server.process.pid),
    }


def long_prefill(server: Server, seed: int) -> float:
    """Seconds that a prompt of several chunks takes alone."""
    prompts = random_prompts(1, LONG_PROMPT_LEN, seed)
    wait_quiet()
    started = time.perf_counter()
    server.burst(prompts, 1)
    return time.perf_counter() - started


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def worker_command(model: Path, port: int) -> list[str]:
    command = [sys.executable, "-m", "baton.cli", "engine", "--model-path", str(model), "--port", str(port)]
    return [*command, "--max-total-tokens", str(POOL_TOKENS)]


def start_ours(model: Path) -> Server:
    return start_ranks(model, "baton", 1, 1, "auto")


def start_ranks(model: Path, name: str, tp_size: int, pp_size: int, collective: str) -> Server:
    """One worker of `tp_size` rank processes in each of `pp_size` stages, which share the cores."""
    port = free_port()
    command = worker_command(model, port)
    environment = {"BATON_RANKS_PER_HOST": str(tp_size * pp_size), "BATON_COLLECTIVE": collective}
    return Server(name, [*command, "--tp-size", str(tp_size), "--pp-size", str(pp_size)], port, environment)


def start_engines(model: Path, dp_size: int) -> Server:
    """One worker of `dp_size` engines with a rank each, which share the cores. A repeated prompt goes where it went: it is cached there."""
    port = free_port()
    command = worker_command(model, port)
    environment = {"BATON_RANKS_PER_HOST": str(dp_size)}
    flags = ["--dp-size", str(dp_size), "--load-balance-method", "cache_aware"]
    return Server(f"dp{dp_size}", [*command, *flags], port, environment)


def start_vllm(python: Path, model: Path) -> Server:
    """vLLM's CPU build as it runs best here: both cores bound, Intel's OpenMP preloaded, 2 GiB of KV."""
    port = free_port()
    libraries = sorted(python.resolve().parent.parent.glob("lib/libiomp5.so")) or sorted(
        python.parent.parent.glob("lib/libiomp5.so")
    )
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1",
        **({"LD_PRELOAD": str(libraries[0])} if libraries else {}),
    }  # fmt: skip
    command = [str(python.parent / "vllm"), "serve", str(model), "--port", str(port), "--max-model-len", "2048"]
    return Server("vllm-cpu", [*command, "--dtype", "bfloat16"], port, environment)


def transformers_figures(model: Path) -> dict[str, Any]:
    """transformers (eager, bf16, sdpa) in a process of its own, one round at each concurrency."""
    script = Path(__file__).parent / "transformers_peer.py"
    command = [sys.executable, str(script), str(model), str(PROMPT_LEN), str(NEW_TOKENS), *map(str, CONCURRENCY)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))


def run(servers: list[Server], rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {server.name: {"start_s": server.start_s} for server in servers}
    for server in servers:
        measure(server, 1, seed=1)
    for concurrency in CONCURRENCY:
        samples: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
        for round_ in range(rounds):
            for server in servers:
                samples[server.name].append(measure(server, concurrency, seed=1000 * concurrency + 10 * round_))
                print(f"  {server.name} x{concurrency} round {round_ + 1}/{rounds}", file=sys.stderr)
        for name, runs in samples.items():
            results[name][str(concurrency)] = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
    return results


def print_table(results: dict[str, Any]) -> None:
    columns = ("prefill_tokens_per_s", "long_prefill_tokens_per_s", "decode_tokens_per_s", "cold_output_tokens_per_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_ms", "tpot_p99_ms", "cached_ttft_p50_s", "memory_mb")  # fmt: skip
    print(f"{'':14}{'x':>3} " + " ".join(f"{column:>26}" for column in columns))
    for name, figures in results.items():
        for concurrency in map(str, CONCURRENCY):
            row = figures.get(concurrency, {})
            cells = " ".join(f"{row[column]:>26.3f}" if column in row else f"{'':>26}" for column in columns)
            print(f"{name:14}{concurrency:>3} {cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory (default: the demo model)")
    parser.add_argument("--vllm-python", type=Path, help="python of an environment with vllm-cpu")
    parser.add_argument("--tp", type=int, default=1, help="also measure a worker of this many ranks on this host")
    parser.add_argument("--dp", type=int, default=1, help="also measure a worker of this many engines on this host")
    parser.add_argument(
        "--pp", type=int, default=1, help="also measure a worker of this many pipeline stages on this host"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if options.model is None:
        from baton.engine.weights.demo import prepare_demo_model

        options.model = prepare_demo_model()
    limits = measure_limits()
    results: dict[str, Any] = {"roofline": roofline(options.model, limits, PROMPT_LEN, CONCURRENCY)}
    if not options.no_transformers:
        results["transformers"] = transformers_figures(options.model)
    servers: list[Server] = []
    try:
        servers.append(start_ours(options.model))
        if options.tp > 1:
            servers += [
                start_ranks(options.model, f"tp{options.tp}-{way}", options.tp, 1, collective)
                for way, collective in (("memory", "auto"), ("tcp", "tcp"), ("gloo", "gloo"))
            ]
        if options.pp > 1:
            servers += [
                start_ranks(options.model, f"pp{options.pp}-{way}", 1, options.pp, collective)
                for way, collective in (("memory", "auto"), ("tcp", "tcp"))
            ]
        if options.dp > 1:
            servers.append(start_engines(options.model, options.dp))
        if options.vllm_python:
            servers.append(start_vllm(options.vllm_python, options.model))
        results |= run(servers, options.rounds)
    finally:
        for server in servers:
            server.stop()
    print_table(results)
    report = {"command": " ".join(sys.argv), "machine": describe_machine(), "limits": limits, "results": results}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
