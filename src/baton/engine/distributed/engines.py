"""How many engines a worker has (`--dp-size`) and what of its host each of them gets. Plain arithmetic; no torch, no sockets.

An engine is a group of ranks with its own scheduler and KV pool. Its processes see only their own GPUs (CUDA_VISIBLE_DEVICES) and use
only their share of the cores (OMP_NUM_THREADS). Not here: which request goes to which engine (`server.dispatch`).
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.engine.args import EngineArgs
from baton.engine.distributed.topology import RANKS_PER_HOST, forced_ranks_per_host, plan_topology
from baton.engine.errors import ModelError

DEVICES = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"
COUNT_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """One engine of this host."""

    dp_rank: int
    environ: Mapping[str, str]
    """What its processes have beside the worker's environment."""


@dataclass(frozen=True, slots=True)
class EnginesPlan:
    engines: Sequence[EnginePlan]
    """At least one."""
    note: str | None
    """What has to be said where fewer engines run than were asked for."""


def plan_engines(
    args: EngineArgs, device: str, environ: Mapping[str, str], *, num_cores: int, num_gpus: int = 0
) -> EnginesPlan:
    """`device`: "cpu" or "cuda". `num_gpus`: how many a process with this environment sees.

    Raises `ModelError` where there are not enough GPUs, or for an environment variable that is no number.
    """
    ranks = plan_topology(args, device, environ).ranks_per_node
    if args.enable_dp_attention:
        note = None
        if args.dp_size > 1:
            note = (
                f"--enable-dp-attention with --dp-size {args.dp_size}: served as one engine of --tp-size {args.tp_size}, "
                "whose ranks split attention by heads; the answers are the same"
            )
        return EnginesPlan([EnginePlan(args.dp_rank, _own_gpus(args, device, environ, 0, ranks, num_gpus))], note)
    num_engines, note = args.dp_size, None
    if device == "cpu":
        num_engines = min(args.dp_size, max(1, forced_ranks_per_host(environ) // ranks))
        note = _note(args, num_engines)
    threads = {}
    if num_engines > 1 and device == "cpu":
        share = max(1, num_cores // (num_engines * ranks))
        threads = {THREADS: str(min(share, _given_threads(environ) or share))}
    engines = [
        EnginePlan(args.dp_rank + index, threads | _own_gpus(args, device, environ, index, ranks, num_gpus))
        for index in range(num_engines)
    ]
    return EnginesPlan(engines, note)


def _note(args: EngineArgs, num_engines: int) -> str | None:
    if num_engines == args.dp_size:
        return None
    engines = "1 engine runs" if num_engines == 1 else f"{num_engines} engines run"
    return (
        f"--dp-size {args.dp_size}: {engines}, since a rank is a whole CPU and more of them on one host only cost time "
        f"({RANKS_PER_HOST} forces them)"
    )


def _own_gpus(
    args: EngineArgs, device: str, environ: Mapping[str, str], index: int, ranks: int, num_gpus: int
) -> dict[str, str]:
    """The GPUs of engine `index`; {} where all that are visible are its own to take from the first on."""
    if device == "cpu" or (args.dp_size == 1 and not args.base_gpu_id and args.gpu_id_step == 1):
        return {}
    wanted = [args.base_gpu_id + (index * ranks + rank) * args.gpu_id_step for rank in range(ranks)]
    visible = [one.strip() for one in environ.get(DEVICES, "").split(",") if one.strip()]
    if wanted[-1] >= num_gpus:
        raise ModelError(
            f"--dp-size {args.dp_size} of {ranks} GPUs each, from --base-gpu-id {args.base_gpu_id} in steps of "
            f"--gpu-id-step {args.gpu_id_step}: GPU {wanted[-1]} is wanted, and {num_gpus} are there."
        )
    return {DEVICES: ",".join(visible[one] if visible else str(one) for one in wanted)}


def _given_threads(environ: Mapping[str, str]) -> int | None:
    text = environ.get(THREADS, "").partition(",")[0]
    return int(text) if text.isdigit() and int(text) else None


def plan_of_host(args: EngineArgs) -> EnginesPlan:
    """The plan for this host, whose GPUs are counted where the plan depends on them. Raises `ModelError`."""
    if args.dp_size == 1 and not args.base_gpu_id and args.gpu_id_step == 1:
        return EnginesPlan([EnginePlan(args.dp_rank, {})], None)
    num_gpus = 0 if args.device == "cpu" else _count_gpus()
    device = args.device or ("cuda" if num_gpus else "cpu")
    num_cores = len(os.sched_getaffinity(0))
    return plan_engines(args, device, os.environ, num_cores=num_cores, num_gpus=num_gpus)


def _count_gpus() -> int:
    """In a process of its own: this one goes on without torch. Raises `ModelError`."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        counted = subprocess.run(command, check=True, capture_output=True, text=True, timeout=COUNT_TIMEOUT_S)
    except (subprocess.SubprocessError, OSError) as error:
        raise ModelError(f"the GPUs of this host cannot be counted: {error}") from None
    return int(counted.stdout)
