"""The tiers behind prefill and decode: two prefill workers, one decode worker and a router share one store, and something
happens to the store between rounds 5 and 6. The hit rate of round 6 must stay what it is when nothing happens.

The file store has no process of its own: a restart of the store is a restart of every worker that has it open, a crash of it
is the SIGKILL of a worker that is writing. Called by `tiers.py --pd`.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from baton.bench.args import MultiturnArgs
from baton.bench.multiturn import measure
from baton.bench.report import RoundSummary
from engine import Server, free_port

ROUND_BEFORE = 4
"""Index of the round after which it happens: the fifth."""
NUM_PREFILL = 2
HEALTHY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class PdRow:
    name: str
    hit_rate: float
    next_hit_rate: float
    """Of the round after the event."""
    next_from_store: float
    ttft_mean_s: float
    failed: int
    output_hash: str
    rounds: list[RoundSummary]


class Service:
    """Prefill workers with `flags`, a decode worker and the router to ask."""

    def __init__(self, model: Path, flags: Sequence[str]) -> None:
        routing: list[str] = ["--pd-disaggregation", "--policy", "cache_aware", "--health-check-interval-secs", "1"]
        self._servers: dict[str, Server] = {}
        self._commands: dict[str, tuple[list[str], int]] = {}
        for index in range(NUM_PREFILL):
            port, bootstrap = free_port(), str(free_port())
            mode = ["--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", bootstrap]
            self._start(f"prefill-{index}", _worker(model, port, [*mode, *flags]), port)
            routing += ["--prefill", f"http://127.0.0.1:{port}", bootstrap]
        port = free_port()
        self._start("decode", _worker(model, port, ["--disaggregation-mode", "decode"]), port)
        routing += ["--decode", f"http://127.0.0.1:{port}"]
        self.port = free_port()
        router = [sys.executable, "-m", "baton.cli", "router", "--port", str(self.port), *routing]
        self._servers["router"] = Server("router", router, self.port, ready_path="/readiness")

    def restart_store(self) -> None:
        """Every worker that has the store open ends in order, and is started again."""
        names = [name for name in self._servers if name.startswith("prefill")]
        for name in names:
            self._servers[name].stop()
        for name in names:
            self._start(name, *self._commands[name])
        self._wait_healthy()

    def kill_a_writer(self) -> None:
        """SIGKILL of a prefill worker, which has just answered and still writes."""
        process = self._servers["prefill-0"].process
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        self._start("prefill-0", *self._commands["prefill-0"])
        self._wait_healthy()

    def stop(self) -> None:
        for server in reversed(self._servers.values()):
            server.stop()

    def _start(self, name: str, command: list[str], port: int) -> None:
        self._commands[name] = (command, port)
        self._servers[name] = Server(name, command, port)

    def _wait_healthy(self) -> None:
        deadline = time.monotonic() + HEALTHY_TIMEOUT_S
        while time.monotonic() < deadline:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/workers", timeout=5) as response:
                workers = json.load(response)["workers"]
            if all(one["is_healthy"] and one["circuit_breaker"] == "closed" for one in workers):
                return
            time.sleep(0.1)
        raise SystemExit(f"the router does not see all workers healthy: {workers}")


EVENTS: dict[str, Callable[[Service], None]] = {
    "undisturbed": lambda service: None,
    "store restarted": Service.restart_store,
    "writer killed": Service.kill_a_writer,
}


def measure_pd(
    model: Path, args_of: Callable[[int], MultiturnArgs], flags_of: Callable[[Path], list[str]]
) -> list[PdRow]:
    """`args_of(port)`: the workload; `flags_of(directory)`: a prefill worker's flags with a store in `directory`."""
    rows = []
    for name, event in EVENTS.items():
        with tempfile.TemporaryDirectory(prefix="baton-tiers-") as directory:
            service = Service(model, flags_of(Path(directory)))
            try:
                rows.append(_measure(name, service, event, args_of(service.port)))
            finally:
                service.stop()
        print(json.dumps({key: value for key, value in asdict(rows[-1]).items() if key != "rounds"}), flush=True)
    return rows


def _measure(name: str, service: Service, event: Callable[[Service], None], args: MultiturnArgs) -> PdRow:
    async def between_rounds(round_idx: int) -> None:
        if round_idx == ROUND_BEFORE:
            await asyncio.to_thread(event, service)

    console = Console(stderr=True, soft_wrap=True)
    result = asyncio.run(measure(args, console, request_rate=args.request_rate, between_rounds=between_rounds))
    after = result.rounds[ROUND_BEFORE + 1]
    return PdRow(
        name, result.summary.cache_hit_rate, after.cache_hit_rate,
        after.cached_by_tier.get("storage", 0) / max(1, after.prompt_tokens), result.summary.average_ttft,
        len(result.run.failures), result.output_hash, result.rounds,
    )  # fmt: skip


def _worker(model: Path, port: int, flags: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "baton.cli", "engine", "--model-path", str(model), "--port", str(port)]
    return [*command, "--log-level-http", "warning", "--enable-cache-report", *flags]


def pd_table(rows: Sequence[PdRow]) -> str:
    """Markdown; the first row is the one that the others are compared with."""
    lines = [
        "| between rounds 5 and 6 | hit rate of round 6 | of it from the store | all rounds | failed |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.next_hit_rate:.1%} | {row.next_from_store:.1%} | {row.hit_rate:.1%} | {row.failed} |"
        )
    equal = len({row.output_hash for row in rows}) == 1
    return "\n".join([*lines, "", f"Greedy answers of all rows are {'the same' if equal else 'NOT the same'}."]) + "\n"
