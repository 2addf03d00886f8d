"""What a host tier and a store buy in multi-turn chat: the published workload, scaled to this machine, in one command.

    .venv/bin/python benchmarks/tiers.py --publish     # table, plot and JSON into docs/ and benchmarks/results/
    .venv/bin/python benchmarks/tiers.py --pd          # 2 prefill, 1 decode, and what befalls the store between two rounds

`baton bench multiturn` with the shape of the published runs (10 rounds, one token out, 4 at once, 16 per second, a barrier
between rounds, synthetic prompts) against one worker with three sets of flags. Pools keep their proportion to the working
set: the device holds a quarter of it, the host tier 54 %, the store all. Greedy answers must be the same in every row, and
hit rates those of an ideal LRU cache (`baton.bench.lru`), which knows no hardware.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from baton.bench import lru
from baton.bench.args import MultiturnArgs
from baton.bench.multiturn import Result, measure
from baton.bench.plot import need_matplotlib, plot_rounds
from baton.engine.weights.demo import prepare_demo_model
from engine import Server, free_port
from host import cpu_seconds, describe_machine, memory_mb, wait_quiet
from load import random_prompts
from tiers_pd import measure_pd, pd_table

NUM_ROUNDS, RATE, PAGE = 10, 16.0, 16
ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/tiers.json"
BLOCK_END = "<!-- to here -->\n"
PREFETCH_POLICY = "wait_complete"


@dataclass(frozen=True)
class Shape:
    """The workload and its pools. The published one: 150 clients, 2048 tokens."""

    num_clients: int
    request_length: int
    device_share: float = 0.255
    host_share: float = 0.54
    """Of the working set: the pages of all conversations at their end."""

    @property
    def device_pages(self) -> int:
        return int(self.device_share * self._working_set)

    @property
    def host_pages(self) -> int:
        return int(self.host_share * self._working_set)

    @property
    def _working_set(self) -> int:
        return self.num_clients * (NUM_ROUNDS * (self.request_length + 1) // PAGE)

    def args(self, port: int) -> MultiturnArgs:
        return MultiturnArgs(
            num_clients=self.num_clients, request_length=self.request_length, output_length=1, num_rounds=NUM_ROUNDS,
            max_parallel=4, request_rate=RATE, host="127.0.0.1", port=port, disable_auto_run=True,
            disable_random_sample=True, enable_round_barrier=True,
        )  # fmt: skip

    def device_flags(self) -> list[str]:
        return ["--max-total-tokens", str(self.device_pages * PAGE), "--page-size", str(PAGE)]

    def host_flags(self) -> list[str]:
        # The ratio may round down by a page; half a page more does not round up to one too many.
        ratio = (self.host_pages + 0.5) / self.device_pages
        return ["--enable-hierarchical-cache", "--hicache-ratio", f"{ratio:.6f}"]

    def store_flags(self, directory: Path) -> list[str]:
        # SGLang's threshold of 256 tokens, an eighth of the published request, in the same proportion.
        extra = {"path": str(directory), "capacity": "64gb", "prefetch_threshold": self.request_length // 8}
        policy = ["--hicache-storage-prefetch-policy", PREFETCH_POLICY]
        return [
            "--hicache-storage-backend",
            "file",
            *policy,
            "--hicache-storage-backend-extra-config",
            json.dumps(extra),
        ]


@dataclass(frozen=True)
class Row:
    """One set of flags, measured. Times in seconds, rates in shares of 1."""

    name: str
    hit_rate: float
    lru_hit_rate: float
    """Of an ideal cache with pools of these sizes, for the same requests in the same order."""
    ttft_mean_s: float
    ttft_p90_s: float
    input_tokens_per_s: float
    duration_s: float
    cpu_s: float
    """Of the worker, all threads: what the row costs, whatever else the machine does."""
    memory_mb: float
    failed: int
    output_hash: str


def start_worker(name: str, model: Path, flags: Sequence[str]) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "baton.cli", "engine", "--model-path", str(model), "--port", str(port)]
    return Server(name, [*command, "--log-level-http", "warning", *flags], port)


def warm_up(server: Server, length: int) -> None:
    """Requests that no row has in its cache."""
    server.burst(random_prompts(4, length, seed=99), 2)


def simulated(result: Result, capacities: Sequence[int | None]) -> float:
    names = lru.PageNames(PAGE)
    uses = [
        names.use(
            result.run.histories[one.client][: one.answer.prompt_len + one.answer.output_len], one.answer.prompt_len
        )
        for one in result.run.records
        if one.answer is not None
    ]
    return lru.hit_rate(uses, lru.simulate(uses, capacities, PAGE))


def measure_row(
    name: str, model: Path, shape: Shape, flags: Sequence[str], capacities: Sequence[int | None]
) -> tuple[Row, Result]:
    server = start_worker(name.replace(" ", ""), model, flags)
    try:
        warm_up(server, shape.request_length)
        wait_quiet()
        console = Console(stderr=True, soft_wrap=True)
        spent_s = cpu_seconds(server.process.pid)
        result = asyncio.run(measure(shape.args(server.port), console, request_rate=RATE))
        spent_s, used_mb = cpu_seconds(server.process.pid) - spent_s, memory_mb(server.process.pid)
    finally:
        server.stop()
    summary = result.summary
    row = Row(
        name, summary.cache_hit_rate, simulated(result, capacities), summary.average_ttft, summary.p90_ttft,
        summary.input_token_throughput, result.run.duration_s, spent_s, used_mb, len(result.run.failures), result.output_hash,
    )  # fmt: skip
    print(json.dumps(asdict(row)), flush=True)
    return row, result


def measure_rows(model: Path, shape: Shape) -> list[tuple[Row, Result]]:
    device, host = shape.device_pages, shape.host_pages
    with tempfile.TemporaryDirectory(prefix="baton-tiers-") as directory:
        cases: list[tuple[str, list[str], list[int | None]]] = [
            ("device only", shape.device_flags(), [device]),
            ("+ host", shape.device_flags() + shape.host_flags(), [device, host]),
            ("+ store", shape.device_flags() + shape.host_flags() + shape.store_flags(Path(directory)), [device, host, None]),
        ]  # fmt: skip
        return [measure_row(name, model, shape, flags, capacities) for name, flags, capacities in cases]


def table(rows: Sequence[Row]) -> str:
    """Markdown; the last row beside the first one."""
    lines = [
        "| | hit rate | ideal LRU | mean TTFT | P90 TTFT | input tokens/s | worker's CPU time |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.hit_rate:.1%} | {row.lru_hit_rate:.1%} | {row.ttft_mean_s:.2f} s | {row.ttft_p90_s:.2f} s "
            f"| {row.input_tokens_per_s:.0f} | {row.cpu_s:.0f} s |"
        )
    first, last = rows[0], rows[-1]
    equal = len({row.output_hash for row in rows}) == 1
    lines += [
        "",
        f"{last.name} beside {first.name}: mean TTFT {last.ttft_mean_s / first.ttft_mean_s - 1:+.0%}, P90 "
        f"{last.ttft_p90_s / first.ttft_p90_s - 1:+.0%}, throughput {last.input_tokens_per_s / first.input_tokens_per_s:.2f} "
        f"times. Greedy answers of all rows are {'the same' if equal else 'NOT the same'}"
        + (f" (SHA-256 `{first.output_hash[:16]}…`)." if equal else "."),
    ]
    return "\n".join(lines) + "\n"


def ceiling(shape: Shape) -> list[float]:
    """Best hit rate of each round: everything of the last prompt in whole pages."""
    lengths = [turn * (shape.request_length + 1) + shape.request_length for turn in range(NUM_ROUNDS)]
    return [0.0] + [before // PAGE * PAGE / length for before, length in pairwise(lengths)]


def write_block(name: str, text: str) -> None:
    """Put `text` where docs/tiers.md has room for it."""
    page, begin = ROOT / "docs/tiers.md", f"<!-- benchmarks/tiers.py writes {name} from here -->\n"
    before, found, rest = page.read_text().partition(begin)
    if not found:
        raise SystemExit(f"{page} has no line {begin.strip()}")
    page.write_text(before + begin + text + BLOCK_END + rest.partition(BLOCK_END)[2])


def run_rows(shape: Shape, model: Path, *, is_published: bool) -> list[dict[str, Any]]:
    rows = measure_rows(model, shape)
    text = table([row for row, _ in rows])
    print(text)
    if is_published:
        plot_rounds({row.name: result.rounds for row, result in rows}, ROOT / "docs/tiers.svg", ceiling=ceiling(shape))
        write_block("rows", text)
    return [asdict(row) | {"rounds": [asdict(one) for one in result.rounds]} for row, result in rows]


def run_pd(shape: Shape, model: Path, *, is_published: bool) -> list[dict[str, Any]]:
    def flags(directory: Path) -> list[str]:
        return shape.device_flags() + shape.host_flags() + shape.store_flags(directory)

    rows = measure_pd(model, shape.args, flags)
    text = pd_table(rows)
    print(text)
    if is_published:
        write_block("pd", text)
    return [asdict(row) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, help="default: 60; with --pd 24")
    parser.add_argument("--request-length", type=int, default=256)
    parser.add_argument(
        "--pd", action="store_true", help="2 prefill, 1 decode: what befalls the store between two rounds"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--publish", action="store_true", help="write docs/tiers.md, docs/tiers.svg and the results")
    options = parser.parse_args()
    if options.publish:
        need_matplotlib()
    part, run = ("pd", run_pd) if options.pd else ("rows", run_rows)
    # Two prefill workers have two sets of pools.
    sizes = Shape(options.clients or 24, options.request_length, 0.2, 0.35) if options.pd else None
    shape = sizes or Shape(options.clients or 60, options.request_length)
    figures = {
        "command": " ".join(sys.argv),
        "machine": describe_machine(),
        "shape": asdict(shape) | {"device_pages": shape.device_pages, "host_pages": shape.host_pages},
        part: run(shape, prepare_demo_model(), is_published=options.publish),
    }
    for path in (*([options.json] if options.json else []), *([RESULTS] if options.publish else [])):
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | {part: figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
