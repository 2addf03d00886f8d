"""Whether a model can be cut as the flags ask. Needs the model's config alone, so that nothing has to start to find out; no torch.

Not here: how it is cut (`models.shard`, `models.stages`).
"""

from collections.abc import Mapping
from pathlib import Path

from baton.engine.args import EngineArgs
from baton.engine.distributed.topology import Topology, plan_topology
from baton.engine.errors import ModelError
from baton.engine.models.config import load_config
from baton.engine.models.spec import ModelConfig
from baton.engine.models.stages import plan_stages


def need_fit(args: EngineArgs, config: ModelConfig, topology: Topology, environ: Mapping[str, str]) -> None:
    """Raises `ModelError` naming the flag where a rank of those that run would have nothing to compute, or nothing it can."""
    tp_size, experts = topology.tp_size, config.experts
    widest = min(config.num_heads, config.intermediate_size)
    if tp_size > widest:
        raise ModelError(
            f"--tp-size {args.tp_size}: {tp_size} ranks cannot share the model's {config.num_heads} query heads and "
            f"{config.intermediate_size} feed-forward columns; at most {widest} can."
        )
    if args.ep_size > 1 and experts is None:
        raise ModelError(f"--ep-size {args.ep_size}: this {config.architecture} has no experts; leave the flag out.")
    if experts is not None and args.ep_size > experts.num_experts:
        raise ModelError(f"--ep-size {args.ep_size}: the model has {experts.num_experts} experts.")
    plan_stages(config, topology.pp_size, environ, topology.asked_pp)


def need_fit_of_model(args: EngineArgs, path: Path, environ: Mapping[str, str]) -> None:
    """The same before any rank has started. Where the device is chosen by what there is, a CPU is assumed: with GPUs as many ranks
    run or more, and they look again."""
    if args.tp_size * args.pp_size * args.ep_size > 1:
        config = load_config(path)
        need_fit(args, config, plan_topology(args, args.device or "cpu", environ), environ)
