"""What prefill and decode on separate workers cost and buy on one machine: one worker beside a 1P1D and a 2P1D service.

    .venv/bin/python benchmarks/disaggregation.py [--rounds 3] [--json FILE]

SmolLM2-135M-Instruct, random 512-token prompts, 128 new tokens, greedy, over HTTP (pairs through the router). Bursts of 1 and 32 at
t = 0 are the worst case for a pair on shared cores; `steady` sends 32 requests one after the other, 0.4 s apart, while the earlier ones
decode. Rounds alternate; figures are medians. The gap between two tokens of a stream is what a reader sees.
"""

import argparse
import asyncio
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from engine import Server, free_port, quantile, start_ours
from host import describe_machine, wait_quiet
from load import Timing, complete, random_prompts

PROMPT_LEN, NEW_TOKENS, STEADY_INTERVAL_S = 512, 128, 0.4


def start_pair(name: str, model: Path, num_prefill: int) -> list[Server]:
    """Workers, then the router; the router is the last one and the one to ask."""
    servers, routing = [], ["--pd-disaggregation", "--policy", "round_robin"]
    for index in range(num_prefill + 1):
        mode, port, bootstrap = ("prefill" if index < num_prefill else "decode"), free_port(), str(free_port())
        command = ["engine", "--model-path", str(model), "--port", str(port), "--disaggregation-mode", mode]
        command += ["--disaggregation-bootstrap-port", bootstrap] if mode == "prefill" else []
        servers.append(Server(f"{name}-{mode}-{index}", [sys.executable, "-m", "baton.cli", *command], port))
        routing += [f"--{mode}", f"http://127.0.0.1:{port}", *([bootstrap] if mode == "prefill" else [])]
    port = free_port()
    router = [sys.executable, "-m", "baton.cli", "router", "--port", str(port), *routing]
    return [*servers, Server(name, router, port, ready_path="/readiness")]


async def load(server: Server, prompts: list[list[int]], interval_s: float) -> list[Timing]:
    async def one(index: int, prompt: list[int]) -> Timing:
        await asyncio.sleep(index * interval_s)
        return await complete("127.0.0.1", server.port, server.model, prompt, NEW_TOKENS)

    return list(await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts))))


def measure(server: Server, count: int, interval_s: float, seed: int) -> dict[str, float]:
    wait_quiet()
    timings = asyncio.run(load(server, random_prompts(count, PROMPT_LEN, seed), interval_s))
    gaps = [b - a for t in timings for a, b in zip(t.token_times_s, t.token_times_s[1:], strict=False)]
    elapsed = max(t.started_s + t.token_times_s[-1] for t in timings) - min(t.started_s for t in timings)
    return {
        "ttft_mean_s": statistics.mean(t.ttft_s for t in timings),
        "ttft_p99_s": quantile([t.ttft_s for t in timings], 0.99),
        "tpot_mean_ms": 1e3 * statistics.mean(t.tpot_s for t in timings),
        "gap_p99_ms": 1e3 * quantile(gaps, 0.99),
        "gap_max_ms": 1e3 * max(gaps),
        "output_tokens_per_s": sum(len(t.token_times_s) for t in timings) / elapsed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from baton.engine.weights.demo import prepare_demo_model

    model = prepare_demo_model()
    services = {"one worker": [start_ours(model)]}
    cases = {"burst of 1": (1, 0.0), "burst of 32": (32, 0.0), "steady 32": (32, STEADY_INTERVAL_S)}
    report: dict[str, Any] = {"command": " ".join(sys.argv), "machine": describe_machine(), "results": {}}
    try:
        for name, num_prefill in (("1P1D", 1), ("2P1D", 2)):
            services[name] = start_pair(name, model, num_prefill)
        for case_idx, (case, (count, interval_s)) in enumerate(cases.items()):
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in services}
            for round_ in range(options.rounds):
                for index, (name, servers) in enumerate(services.items()):
                    runs[name].append(measure(servers[-1], count, interval_s, 1000 * case_idx + 100 * round_ + index))
            for name, rounds in runs.items():
                figures = {key: statistics.median(run[key] for run in rounds) for key in rounds[0]}
                report["results"].setdefault(case, {})[name] = figures
                print(
                    f"{case:12} {name:11}",
                    "  ".join(f"{key} {value:9.3f}" for key, value in figures.items()),
                    flush=True,
                )
    finally:
        for servers in services.values():
            for server in reversed(servers):
                server.stop()
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
