"""`vllm serve` and `python3 -m vllm.entrypoints.openai.api_server`: our worker with vLLM's flags, over the nodes that were gathered.

Where a `head` runs in this container and the model has several ranks, the head's workers each run a node of the same worker;
they end with this process. Front door of the stand-in package `vllm`.
"""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence

import baton
from baton.engine.args import engine_args
from baton.engine.distributed.node import run_node
from baton.engine.flags import effect_notes
from baton.engine.launch import run_worker
from baton.engine.log import start_logging
from baton.engine.server.vllm_dialect import VllmDialect
from baton.engine.vllm.args import SIDE_CHANNEL_PORT, VllmArgs, engine_flags, parse_vllm_args
from baton.engine.vllm.cluster import ClusterError, Ended, Lead, Line, Message, Nodes, Start, known_head, own_host
from baton.protocol.errors import BatonError
from baton.protocol.pod import listen_host, manifest_path

logger = logging.getLogger(__name__)

LOST_NODE_GRACE_S = 10.0
"""How long the ranks may take to notice that a node is gone, and to answer what is in flight, before this process ends itself."""
_LOCAL_FLAGS = ("--host=", "--port=", "--api-key=", "--served-model-name=", "--enable-metrics")
"""Of the HTTP server: other nodes have none."""
_PATH_FLAGS = ("--model-path=", "--tokenizer-path=", "--chat-template=")


def cli_main(argv: Sequence[str]) -> int:
    """`vllm ...`: only `serve` is here."""
    command, *rest = argv or ["--help"]
    if command in ("-v", "--version"):
        sys.stdout.write(f"Baton {baton.__version__}, with vLLM's command line\n")
        return 0
    if command != "serve":
        sys.stderr.write(f"vllm {command}: only `vllm serve MODEL [flags]` is served here; see `vllm serve --help`\n")
        return 2
    if rest and not rest[0].startswith("-"):
        rest = ["--model", *rest]
    return api_server_main(rest)


def api_server_main(argv: Sequence[str]) -> int:
    """Serve until a signal or the end of a rank. Returns the exit status; flag errors exit with 2."""
    args = parse_vllm_args(argv)
    start_logging("vllm", "info")
    for note in effect_notes(args, "cuda"):
        logger.warning("%s", note)
    port = os.environ.get("VLLM_NIXL_SIDE_CHANNEL_PORT", str(SIDE_CHANNEL_PORT))
    if not port.isdigit():
        sys.stderr.write(f"vllm: VLLM_NIXL_SIDE_CHANNEL_PORT must be a port number, got {port!r}\n")
        return 2
    flags = engine_flags(args, args.api_key or os.environ.get("VLLM_API_KEY"), int(port))
    try:
        if args.node_rank > 0:
            return run_node(engine_args(flags), flags)
        flags += gather(args, flags)
        return run_worker(engine_args(flags), flags, dialect_of(args))
    except (BatonError, OSError) as error:
        logger.error("the server cannot start: %s", error)
        return 1


def dialect_of(args: VllmArgs) -> VllmDialect:
    return VllmDialect(
        served_names=args.names,
        response_role=args.response_role,
        max_logprobs=args.max_logprobs,
        tokens_as_token_ids=args.return_tokens_as_token_ids,
        always_usage=args.enable_force_include_usage,
        tracks_load=args.enable_server_load_tracking,
        own_host=os.environ.get("VLLM_NIXL_SIDE_CHANNEL_HOST") or _reachable(listen_host(args.host or "0.0.0.0")),
    )


def _reachable(host: str) -> str:
    """An address of this machine where `host` means all of them."""
    if host not in ("0.0.0.0", "::", ""):
        return host
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as one:
        try:
            one.connect(("192.0.2.1", 9))  # sends nothing; asks for the address of the way out
            return str(one.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def gather(args: VllmArgs, flags: Sequence[str]) -> list[str]:
    """Start nodes on the head's workers. Returns the flags that make this process their node 0; [] when it is alone.

    Raises `ClusterError` when the nodes cannot be had.
    """
    if args.num_ranks == 1 or args.nnodes > 1 or args.distributed_executor_backend in ("mp", "uni"):
        return []
    port = known_head()
    if port is not None and args.local_engines.count > 1:
        logger.warning("--data-parallel-size %d: all engines are on this node", args.data_parallel_size)
        return []
    if port is None:
        if args.distributed_executor_backend == "ray":
            logger.warning("--distributed-executor-backend ray: no nodes were gathered here; this node serves alone")
        return []
    try:
        line = Line(own_host(), port)
        line.send(Lead())
        answer = line.receive()
    except ClusterError as error:
        logger.warning("the nodes that were gathered here are gone, this node serves alone: %s", error)
        return []
    if not isinstance(answer, Nodes):
        raise ClusterError(answer.reason if isinstance(answer, Ended) else f"the head answered {answer}")
    num_nodes = nodes_for(args.num_ranks, answer.num_nodes)
    if num_nodes == 1:
        line.close()
        return []
    if num_nodes < answer.num_nodes:
        logger.warning(
            "%d of %d nodes serve: %d ranks must be spread evenly", num_nodes, answer.num_nodes, args.num_ranks
        )
    ours = [f"--nnodes={num_nodes}", f"--dist-init-addr={_joined(answer.host, _free_port(answer.host))}"]
    line.send(Start([*flags_of_nodes(flags), *ours], num_nodes - 1))
    threading.Thread(target=_end_with_nodes, args=(line,), name="nodes", daemon=True).start()
    logger.info("%d ranks over %d nodes, as node 0", args.num_ranks, num_nodes)
    return ours


def nodes_for(num_ranks: int, num_nodes: int) -> int:
    """The most nodes over which the ranks spread evenly."""
    return max(count for count in range(1, min(num_ranks, num_nodes) + 1) if num_ranks % count == 0)


def flags_of_nodes(flags: Sequence[str]) -> list[str]:
    """The leader's flags for another pod: without its HTTP, and with paths as the manifest has them."""
    found = []
    for flag in flags:
        name, equals, value = flag.partition("=")
        if not flag.startswith(_LOCAL_FLAGS):
            found.append(name + equals + manifest_path(value) if flag.startswith(_PATH_FLAGS) else flag)
    return found


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _free_port(host: str) -> int:
    with contextlib.closing(
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    ) as one:
        port: int = one.getsockname()[1]
        return port


def _end_with_nodes(line: Line) -> None:
    """A thread: hold the connection that makes this process the leader, and end the process when a node is lost."""
    try:
        message: Message | str = line.receive(None)
    except ClusterError as error:
        message = str(error)
    reason = message.reason if isinstance(message, Ended) else message
    logger.error("a node of this server is lost: %s", reason)
    time.sleep(LOST_NODE_GRACE_S)
    os._exit(1)
