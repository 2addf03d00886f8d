"""Start one worker: a rank process for each of its engines beside the HTTP process that this one becomes, or the ranks of one more node.

Owns the processes and the sockets that must exist before them. Not here: what either process does (`rank`, `server.main`).
"""

import dataclasses
import logging
import os
import subprocess
import sys
from collections.abc import Sequence

from baton.engine.args import EngineArgs, parse_engine_args
from baton.engine.distributed.engines import EnginePlan, plan_of_host
from baton.engine.distributed.fits import need_fit_of_model
from baton.engine.distributed.node import run_node
from baton.engine.distributed.processes import stop_ranks
from baton.engine.log import name_of_worker, start_logging
from baton.engine.server.channel import ChannelAddress
from baton.engine.server.dialect import Dialect
from baton.engine.server.main import EngineProcess, bind, run_server
from baton.engine.server.sglang_dialect import SGLANG
from baton.engine.weights.resolve import resolve_model
from baton.protocol.errors import BatonError

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Run one worker until a signal or its rank's end. Returns the exit status; flag errors exit with 2."""
    args = parse_engine_args(argv)
    if args.disaggregation_mode == "both":
        sys.stderr.write(
            "baton engine: --disaggregation-mode both is for `vllm serve`, whose requests say which half they want\n"
        )
        return 2
    start_logging(name_of_worker(args), args.log_level)
    try:
        return run_worker(args, argv) if args.node_rank == 0 else run_node(args, argv)
    except (BatonError, OSError) as error:
        logger.error("the worker cannot start: %s", error)
        return 1


def run_worker(args: EngineArgs, argv: Sequence[str], dialect: Dialect = SGLANG) -> int:
    """`argv`: the flags that made `args`, for the ranks. Raises `BatonError` or OSError when the worker cannot start."""
    model_path = resolve_model(args.model_path, args.revision)
    need_fit_of_model(args, model_path, os.environ)
    plan = plan_of_host(args)
    if plan.note is not None:
        logger.warning("%s", plan.note)
    # What answers, metrics and the other side of a hand-over are told is what runs.
    args = dataclasses.replace(args, dp_size=len(plan.engines))
    http_socket = bind(args.host, args.port)
    bootstrap_socket = None
    overrides = ["--model-path", str(model_path), "--dp-size", str(args.dp_size)]
    if args.prefills_for_others:
        bootstrap_socket = bind(args.host, args.disaggregation_bootstrap_port)
        overrides += ["--disaggregation-bootstrap-port", str(bootstrap_socket.getsockname()[1])]
    if args.dp_size > 1:
        # The ranks of each engine meet by themselves.
        overrides += ["--dist-init-addr", "127.0.0.1:0"]
    engines: list[_Engine] = []
    status = 1
    try:
        for plan_of_one in plan.engines:
            engines.append(_Engine(plan_of_one, [*argv, *overrides]))
        status = run_server(
            args,
            [EngineProcess(one.address, one.rank.pid) for one in engines],
            http_socket=http_socket,
            bootstrap_socket=bootstrap_socket,
            model_path=model_path,
            dialect=dialect,
        )
        return status
    finally:
        # The ranks ignore signals that a terminal sends to all: they end when this process says so.
        stop_ranks([one.rank for one in engines], on_purpose=status == 0)
        for one in engines:
            one.address.remove()


class _Engine:
    """The first rank of one engine, which starts the others."""

    def __init__(self, plan: EnginePlan, flags: Sequence[str]) -> None:
        self.address = ChannelAddress.create()
        command = [sys.executable, "-m", "baton.engine.rank", str(os.getpid()), self.address.directory]
        self.rank = subprocess.Popen(
            [*command, *flags, "--dp-rank", str(plan.dp_rank)],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **plan.environ},
        )
