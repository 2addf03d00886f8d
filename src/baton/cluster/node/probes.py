"""Readiness, liveness and startup probes of one container, with a kubelet's timings.

`Prober` runs them against the pod's address and reports every change; what follows from a change (not ready, restart) is
`container`'s. A kind that this node cannot do (grpc) is refused by name before the container starts: `check`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from baton.cluster.node import commands
from baton.cluster.node.environment import ContainerConfigError, Object
from baton.cluster.node.supervised import Launch

Kind = Literal["readiness", "liveness", "startup"]
FIELD: dict[Kind, str] = {"readiness": "readinessProbe", "liveness": "livenessProbe", "startup": "startupProbe"}
MAX_BODY_BYTES = 10240


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds and counts of one probe, with Kubernetes' defaults."""

    initial_delay_s: float
    period_s: float
    timeout_s: float
    success_threshold: int
    failure_threshold: int
    grace_s: float | None

    @classmethod
    def of(cls, probe: Object) -> Timing:
        grace = probe.get("terminationGracePeriodSeconds")
        return cls(
            float(probe.get("initialDelaySeconds") or 0), float(probe.get("periodSeconds") or 10),
            float(probe.get("timeoutSeconds") or 1), int(probe.get("successThreshold") or 1),
            int(probe.get("failureThreshold") or 3), None if grace is None else float(grace),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ProbeTarget:
    """What probes of one running container are aimed at. `enter` makes the launch of a command inside it."""

    address: str
    ports: dict[str, int]
    enter: Callable[[list[str]], Launch]
    scale: float = 1.0
    """Multiplies the waits between probes; below 1 only in tests."""


@dataclass(frozen=True, slots=True)
class Change:
    """A probe crossed its threshold (`is_ok` says which way), or merely failed (`is_ok` None)."""

    kind: Kind
    is_ok: bool | None
    message: str
    grace_s: float | None = None


def check(container: Object, where: str) -> None:
    """Raises `ContainerConfigError` naming the field of a probe that this node cannot do."""
    for field in FIELD.values():
        probe = container.get(field)
        if probe is None:
            continue
        if probe.get("grpc"):
            raise ContainerConfigError(
                f"{where}.{field}.grpc: not supported by this node; use httpGet, tcpSocket or exec"
            )
        if not any(probe.get(kind) for kind in ("tcpSocket", "httpGet", "exec")):
            raise ContainerConfigError(f"{where}.{field}: wants one of httpGet, tcpSocket, exec")
        handler = probe.get("tcpSocket") or probe.get("httpGet")
        if handler is not None:
            port_number(container, handler["port"], f"{where}.{field}")


def port_number(container: Object, port: Any, where: str) -> int:
    """A number, or the container port of that name."""
    if isinstance(port, int) or str(port).isdigit():
        return int(port)
    for one in container.get("ports") or []:
        if one.get("name") == port:
            return int(one["containerPort"])
    raise ContainerConfigError(f"{where}: container has no port named {port!r}")


class Prober:
    """The probes of one attempt, as tasks of its own that `close` ends. `report` is called in the loop."""

    def __init__(self, container: Object, target: ProbeTarget, report: Callable[[Change], None]) -> None:
        self._container, self._target, self._report = container, target, report
        self._started = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._run(kind, container[field]), name=f"{kind} probe of {container['name']}")
            for kind, field in FIELD.items()
            if container.get(field) is not None
        ]
        if container.get("startupProbe") is None:
            self._started.set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, kind: Kind, probe: Object) -> None:
        timing = Timing.of(probe)
        if kind != "startup":
            await self._started.wait()
        await asyncio.sleep(timing.initial_delay_s * self._target.scale)
        streak, last = 0, None
        state: bool | None = None
        while True:
            ok, message = await attempt(probe, self._container, self._target, timing.timeout_s)
            streak = streak + 1 if ok is last else 1
            last = ok
            threshold = timing.success_threshold if ok else timing.failure_threshold
            crossed = streak >= threshold and state is not ok
            if not ok:
                self._report(Change(kind, None, f"{kind.capitalize()} probe failed: {message}"))
            if crossed:
                state = ok
                self._report(Change(kind, ok, message, timing.grace_s))
                if kind == "startup" and ok:
                    self._started.set()
                    return
                if kind != "readiness" and not ok:
                    return
            await asyncio.sleep(timing.period_s * self._target.scale)


async def attempt(probe: Object, container: Object, target: ProbeTarget, timeout_s: float) -> tuple[bool, str]:
    """One probe: whether it succeeded, and what to say when it did not."""
    action: Awaitable[tuple[bool, str]]
    if probe.get("exec"):
        action = _exec(probe["exec"], target, timeout_s)
    elif probe.get("httpGet"):
        action = _http(probe["httpGet"], container, target, timeout_s)
    else:
        action = _tcp(probe["tcpSocket"], container, target, timeout_s)
    try:
        return await action
    except ContainerConfigError as problem:
        return False, str(problem)


async def _tcp(handler: Object, container: Object, target: ProbeTarget, timeout_s: float) -> tuple[bool, str]:
    host, port = str(handler.get("host") or target.address), port_number(container, handler["port"], "tcpSocket")
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return False, f"dial tcp {host}:{port}: i/o timeout"
    except OSError as error:
        return False, f"dial tcp {host}:{port}: connect: {_refusal(error)}"
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True, ""


async def _http(handler: Object, container: Object, target: ProbeTarget, timeout_s: float) -> tuple[bool, str]:
    host, port = str(handler.get("host") or target.address), port_number(container, handler["port"], "httpGet")
    path = str(handler.get("path") or "/")
    url = f"{str(handler.get('scheme') or 'HTTP').lower()}://{host}:{port}/{path.lstrip('/')}"
    headers = {"User-Agent": "kube-probe/1.33", "Accept": "*/*"}
    headers |= {str(one["name"]): str(one["value"]) for one in handler.get("httpHeaders") or []}
    try:
        # A probe asks whether the pod answers, not who it is: no certificate is verified.
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=False, force_close=True),
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as session,
            session.get(url, headers=headers, allow_redirects=False) as response,
        ):
            await response.content.read(MAX_BODY_BYTES)
            if 200 <= response.status < 400:
                return True, ""
            return False, f"HTTP probe failed with statuscode: {response.status}"
    except TimeoutError:
        return False, f'Get "{url}": context deadline exceeded'
    except aiohttp.ClientConnectorError as error:
        return False, f'Get "{url}": dial tcp {host}:{port}: connect: {_refusal(error.os_error)}'
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return False, f'Get "{url}": {str(error) or type(error).__name__}'


async def _exec(handler: Object, target: ProbeTarget, timeout_s: float) -> tuple[bool, str]:
    command = [str(word) for word in handler.get("command") or []]
    try:
        done = await commands.run(target.enter(command), timeout_s)
    except TimeoutError:
        return False, f"command timed out: {command} timed out after {timeout_s:g}s"
    except OSError as error:
        return False, str(error)
    return done.code == 0, done.output or f"command exited with status {done.code}"


def _refusal(error: OSError) -> str:
    """The system's words alone: asyncio puts the address in place of them."""
    return os.strerror(error.errno).lower() if error.errno else str(error)
