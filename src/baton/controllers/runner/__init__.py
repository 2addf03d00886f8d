"""The runner: the only part of `controllers` that does I/O. Front door: :class:`Runner` and :func:`builtin_controllers`.

It talks to an API server through `baton.cluster_client` and makes no difference between the embedded one and any other.
"""

from typing import Any

from baton.controllers.lws import leader_worker_set
from baton.controllers.network import endpoints
from baton.controllers.placement import scheduler
from baton.controllers.plan import Controller
from baton.controllers.rbg import group
from baton.controllers.runner.metrics import RunnerMetrics
from baton.controllers.runner.runner import Runner
from baton.controllers.volumes import binder
from baton.controllers.workloads import deployment, replica_set, stateful_set


def our_controllers() -> list[Controller[Any]]:
    """Controllers of our own kinds: what any cluster lacks."""
    return [group.CONTROLLER, leader_worker_set.CONTROLLER]


def builtin_controllers(default_source: binder.DefaultSource | None = None) -> list[Controller[Any]]:
    """What a real cluster has and the embedded one lacks. ``default_source``: see `volumes.binder`."""
    return [
        stateful_set.CONTROLLER,
        deployment.CONTROLLER,
        replica_set.CONTROLLER,
        endpoints.CONTROLLER,
        binder.controller(default_source),
        scheduler.CONTROLLER,
    ]


__all__ = ["Runner", "RunnerMetrics", "builtin_controllers", "our_controllers"]
