"""postStart and preStop hooks of a container (exec, httpGet, sleep; tcpSocket is refused by name), and the time to end in."""

from __future__ import annotations

import asyncio

from baton.cluster.node import probes
from baton.cluster.node.environment import ContainerConfigError, Object
from baton.cluster.node.probes import ProbeTarget

HOOKS = {"postStart": "PostStartHook", "preStop": "PreStopHook"}
POST_START_TIMEOUT_S = 300.0
"""A kubelet waits for ever; here a hook that hangs becomes a failed one."""


def grace_s(pod: Object) -> float:
    """terminationGracePeriodSeconds, with Kubernetes' default."""
    value = pod["spec"].get("terminationGracePeriodSeconds")
    return 30.0 if value is None else float(value)


def check(container: Object, where: str) -> None:
    """Raises `ContainerConfigError` for a hook that this node cannot run."""
    for name, hook in (container.get("lifecycle") or {}).items():
        if name in HOOKS and not any(hook.get(kind) for kind in ("exec", "httpGet", "sleep")):
            raise ContainerConfigError(f"{where}.lifecycle.{name}: wants one of exec, httpGet, sleep")


async def run(container: Object, name: str, target: ProbeTarget, timeout_s: float) -> str | None:
    """Run the hook if there is one. What went wrong, or None."""
    hook = (container.get("lifecycle") or {}).get(name)
    if not hook:
        return None
    if hook.get("sleep"):
        await asyncio.sleep(min(float(hook["sleep"].get("seconds") or 0), timeout_s))
        return None
    ok, message = await probes.attempt(hook, container, target, timeout_s)
    return None if ok else message
