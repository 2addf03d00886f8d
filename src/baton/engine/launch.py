"""One worker: bind the ports, start the rank process, serve HTTP in this one.

Front door of `baton engine` and of `python3 -m sglang.launch_server`. Ports are bound first, so that a port in use is an error
at once and not after the model has loaded.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence

from baton.engine.args import EngineArgs, parse_engine_args
from baton.engine.distributed.node import run_node
from baton.engine.distributed.processes import stop_ranks
from baton.engine.server.channel import ChannelAddress
from baton.engine.server.dialect import Dialect
from baton.engine.server.main import bind, run_server
from baton.engine.server.sglang_dialect import SGLANG
from baton.engine.weights.resolve import resolve_model
from baton.protocol.errors import BatonError

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Run one worker until a signal or its rank's end. Returns the exit status; flag errors exit with 2."""
    args = parse_engine_args(argv)
    log_format = f"%(asctime)s {args.disaggregation_mode} %(name)s %(levelname)s %(message)s"
    logging.basicConfig(level=args.log_level.upper(), format=log_format)
    try:
        return run_worker(args, argv) if args.node_rank == 0 else run_node(args, argv)
    except (BatonError, OSError) as error:
        logger.error("the worker cannot start: %s", error)
        return 1


def run_worker(args: EngineArgs, argv: Sequence[str], dialect: Dialect = SGLANG) -> int:
    """`argv`: the flags that made `args`, for the rank. Raises `BatonError` or OSError when the worker cannot start."""
    model_path = resolve_model(args.model_path, args.revision)
    http_socket = bind(args.host, args.port)
    bootstrap_socket = None
    overrides = ["--model-path", str(model_path)]
    if args.disaggregation_mode == "prefill":
        bootstrap_socket = bind(args.host, args.disaggregation_bootstrap_port)
        overrides += ["--disaggregation-bootstrap-port", str(bootstrap_socket.getsockname()[1])]
    address = ChannelAddress.create()
    rank = subprocess.Popen(
        [sys.executable, "-m", "baton.engine.rank", str(os.getpid()), address.directory, *argv, *overrides],
        stdin=subprocess.DEVNULL,
    )
    status = 1
    try:
        status = run_server(
            args,
            address,
            [rank.pid],
            http_socket=http_socket,
            bootstrap_socket=bootstrap_socket,
            model_path=model_path,
            dialect=dialect,
        )
        return status
    finally:
        # The rank ignores signals that a terminal sends to both: it ends when this process says so.
        stop_ranks([rank], on_purpose=status == 0)
        address.remove()
