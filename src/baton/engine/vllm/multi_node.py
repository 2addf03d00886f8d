"""`multi-node-serving.sh leader|worker`: what vLLM's helper script does with Ray, done with our own nodes.

Options, messages and exit codes are the script's (vLLM, examples/online_serving/multi-node-serving.sh). `leader` leaves a head
behind and returns when all nodes are there; `worker` is a node until the head is gone for too long.
"""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from baton.engine.vllm.cluster import DEFAULT_PORT, ClusterError, Count, Line, Nodes, own_host, remember_head
from baton.engine.vllm.member import Member

POLL_S = 0.5
REPORT_S = 5.0
"""The script's interval."""
RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Options:
    """The script's options; unset numbers are its defaults."""

    cluster_size: int | None = None
    address: str = ""
    port: int = DEFAULT_PORT
    init_timeout_s: float = 300.0
    others: tuple[str, ...] = ()
    """What the script hands to `ray start`."""


def parse(subcommand: str, argv: Sequence[str]) -> Options:
    """Raises ValueError with the script's message for what is missing or no number."""
    values: dict[str, str] = {}
    others: list[str] = []
    known = {"--ray_port", "--ray_init_timeout", "--ray_address" if subcommand == "worker" else "--ray_cluster_size"}
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name in known and equals:
            values[name] = value
        else:
            others.append(argument)
    needed = "--ray_address" if subcommand == "worker" else "--ray_cluster_size"
    if not values.get(needed):
        raise ValueError(f"Error: Missing argument {needed}")
    for name in values.keys() - {"--ray_address"}:
        if not values[name].isdigit() or (name == "--ray_cluster_size" and int(values[name]) < 1):
            raise ValueError(f"Error: {name} must be a whole number, got {values[name]!r}")
    if int(values.get("--ray_port", DEFAULT_PORT)) > 65535:
        raise ValueError(f"Error: --ray_port must be at most 65535, got {values['--ray_port']!r}")
    size = values.get("--ray_cluster_size")
    return Options(
        cluster_size=None if size is None else int(size),
        address=values.get("--ray_address", "").strip("[]"),
        port=int(values.get("--ray_port", DEFAULT_PORT)),
        init_timeout_s=float(values.get("--ray_init_timeout", 300)),
        others=tuple(others),
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str]) -> int:
    """Exit status."""
    logging.basicConfig(level="INFO", format="%(asctime)s node %(levelname)s %(message)s")
    subcommand = argv[0] if argv else ""
    if subcommand not in ("leader", "worker"):
        _say(f"unknown subcommand: {subcommand}")
        return 1
    try:
        options = parse(subcommand, argv[1:])
    except ValueError as error:
        _say(str(error))
        return 1
    if options.others:
        _say(f"No effect: {' '.join(options.others)} (options of `ray start`; nodes are gathered without Ray)")
    return lead(options) if subcommand == "leader" else asyncio.run(work(options))


def lead(options: Options) -> int:
    """Leave a head behind, that ends with the process that called this script; return when all nodes are there."""
    command = [sys.executable, "-m", "baton.engine.vllm.head", str(options.port), str(os.getppid())]
    head = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    started_s = reported_s = time.monotonic()
    while time.monotonic() - started_s < options.init_timeout_s:
        num_nodes = _count(options.port)
        if num_nodes is None and head.poll() is not None:
            return 1  # it said why
        if num_nodes is not None and num_nodes >= (options.cluster_size or 1):
            remember_head(options.port)
            _say("All ray workers are active and the ray cluster is initialized successfully.")
            return 0
        if time.monotonic() - reported_s >= REPORT_S:
            reported_s = time.monotonic()
            _say(f"Wait for all ray workers to be active. {num_nodes or 0}/{options.cluster_size} is active")
        time.sleep(POLL_S if num_nodes is not None else POLL_S / 10)
    _say("Waiting for all ray workers to be active timed out.")
    head.kill()
    return 1


def _count(port: int) -> int | None:
    """Nodes of the head at `port` of this pod; None: there is none yet."""
    with contextlib.suppress(ClusterError):
        line = Line(own_host(), port)
        try:
            line.send(Count())
            answer = line.receive()
            return answer.num_nodes if isinstance(answer, Nodes) else None
        finally:
            line.close()
    return None


async def work(options: Options) -> int:
    """Be a node. Returns 0 after a signal, 1 when there was no head for the time-out."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        return await _work(options)
    except asyncio.CancelledError:
        return 0


async def _work(options: Options) -> int:
    last_seen_s = reported_s = time.monotonic()
    while time.monotonic() - last_seen_s < options.init_timeout_s:
        member = Member(options.address, options.port)
        try:
            await member.run()
        except ClusterError as error:
            if member.has_joined:
                last_seen_s = time.monotonic()
                _say(str(error))
        if time.monotonic() - reported_s >= REPORT_S:
            reported_s = time.monotonic()
            _say("Waiting until the ray worker is active...")
        await asyncio.sleep(RETRY_S)
    _say(f"Ray worker starts timeout, head address: {options.address}:{options.port}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
