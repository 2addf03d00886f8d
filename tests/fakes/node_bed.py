"""A node agent on an in-memory API, and builders of the pods that its tests run."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.fakes.memory_api import MemoryApi

from baton.cluster.node.agent import NodeAgent, NodeConfig
from baton.cluster.node.backoff import Backoff
from baton.cluster.node.nodes import NodeSpec
from baton.cluster.node_connector import LogOptions
from baton.cluster_client import Object
from baton.cluster_client.resources import CONFIG_MAPS, PODS

NODE = "node-0"


class NodeBed:
    """One home, one API; agents come and go (`start`, `kill`)."""

    def __init__(self, home: Path, isolation: str, **options: Any) -> None:
        self.api = MemoryApi()
        options = {"backoff": Backoff(initial_s=0.3, max_s=5.0), "probe_scale": 0.02, **options}
        self.config = NodeConfig(home, isolation=isolation, nodes=(NodeSpec(NODE),), **options)  # type: ignore[arg-type]
        self.agent: NodeAgent | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> NodeAgent:
        self.agent = NodeAgent(self.api.client, self.config)
        self._task = asyncio.create_task(self.agent.run())
        ready = asyncio.create_task(self.agent.ready.wait())
        await asyncio.wait({self._task, ready}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            self._task.result()
        return self.agent

    async def kill(self) -> None:
        """The agent ends as a killed daemon would: nothing is said, pods run on."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def close(self) -> None:
        """Delete every pod and wait until its processes are gone."""
        if self._task is None:
            await self.start()
        pods = (await self.api.list(PODS)).items
        for pod in pods:
            meta = pod["metadata"]
            with contextlib.suppress(Exception):
                await self.api.delete(PODS, meta["name"], meta["namespace"], grace_period_s=0)
        slots = self.config.home / "node" / "slots"
        await eventually(lambda: not any(slots.iterdir()))
        await self.kill()
        assert self.agent is not None
        shutil.rmtree(self.agent.slots.shm_root, ignore_errors=True)

    async def create(self, pod: Object) -> Object:
        return await self.api.create(PODS, pod)

    async def config_map(self, name: str, data: dict[str, str]) -> Object:
        return await self.api.create(CONFIG_MAPS, {"metadata": {"name": name, "namespace": "default"}, "data": data})

    def status(self, name: str) -> Object:
        pod = self.api.pod(name)
        return (pod or {}).get("status") or {}

    def container(self, name: str, container: str = "main") -> Object:
        for one in [
            *self.status(name).get("containerStatuses", []),
            *self.status(name).get("initContainerStatuses", []),
        ]:
            if one["name"] == container:
                return dict(one)
        return {}

    async def until_ready(self, name: str) -> Object:
        return dict(await self.api.until(lambda: is_ready(self.status(name)) and self.status(name)))

    async def until_phase(self, name: str, phase: str) -> Object:
        return dict(await self.api.until(lambda: self.status(name).get("phase") == phase and self.status(name)))

    async def log(self, name: str, container: str = "main", **options: Any) -> str:
        assert self.agent is not None
        parts = [part async for part in self.agent.connector.logs("default", name, container, LogOptions(**options))]
        return b"".join(parts).decode()


async def eventually(condition: Callable[[], bool | Awaitable[bool]], timeout_s: float = 20.0) -> None:
    """For what real processes and files do, of which nothing tells: look again until it is so."""
    async with asyncio.timeout(timeout_s):
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.01)


def is_ready(status: Object) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions") or [])


def pod(name: str, *command: str, image: str = "busybox:1", **spec: Any) -> Object:
    """A pod on the test node with one container `main`; keywords with the name of a container field go there."""
    container_fields = (
        "args", "env", "envFrom", "ports", "volumeMounts", "workingDir", "readinessProbe", "livenessProbe",
        "startupProbe", "lifecycle", "resources",
    )  # fmt: skip
    container: Object = {"name": "main", "image": image, "command": list(command)}
    container |= {key: spec.pop(key) for key in container_fields if key in spec}
    if not command:
        del container["command"]
    labels = spec.pop("labels", {})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": spec.pop("namespace", "default"), "labels": labels},
        "spec": {"nodeName": NODE, "containers": [container], **spec},
    }


async def node_bed(home: Path, isolation: str, **options: Any) -> AsyncIterator[NodeBed]:
    bed = NodeBed(home, isolation, **options)
    await bed.start()
    try:
        yield bed
    finally:
        await bed.close()
