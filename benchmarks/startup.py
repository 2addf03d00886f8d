"""How long a worker takes to be ready, and what it uses when idle: wall and CPU seconds, medians.

.venv/bin/python benchmarks/startup.py [--rounds 5] [--json FILE]
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from engine import Server, start_ours
from host import cpu_seconds, describe_machine, memory_mb, wait_quiet

IDLE_S = 10.0


def measure(model: Path) -> dict[str, float]:
    wait_quiet()
    server: Server = start_ours(model)
    try:
        server.burst([[1000] * 64], 8)
        wait_quiet()
        before = cpu_seconds(server.process.pid)
        time.sleep(IDLE_S)
        idle = cpu_seconds(server.process.pid) - before
        return {
            "ready_s": server.start_s,
            "idle_cpu_percent": 100 * idle / IDLE_S,
            "memory_mb": memory_mb(server.process.pid),
        }
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from baton.engine.weights.demo import prepare_demo_model

    runs = [measure(prepare_demo_model()) for _ in range(options.rounds)]
    report: dict[str, Any] = {"command": " ".join(sys.argv), "machine": describe_machine()}
    report |= {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
