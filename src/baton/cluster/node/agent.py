"""The node agent: one process that serves all virtual nodes of this machine.

Wires the room together: nodes, caches, one `PodWorker` a pod, hosts files, and the adoption of what an earlier agent
left running. `NodeAgent.run` is the front door; `NodeAgent.connector` is what the API server asks for logs and exec.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from baton.cluster.node import isolation
from baton.cluster.node.backoff import Backoff
from baton.cluster.node.connector import AgentConnector
from baton.cluster.node.environment import Object
from baton.cluster.node.hosts import HostsFiles
from baton.cluster.node.images import Catalogue
from baton.cluster.node.nodes import Nodes, NodeSpec, default_nodes
from baton.cluster.node.objects import Objects
from baton.cluster.node.pod_worker import NodeServices, PodWorker
from baton.cluster.node.slots import Slot, SlotStore
from baton.cluster.node.supervised import Supervised
from baton.cluster.node.volumes import referenced
from baton.cluster.services.agent import ServiceAgent
from baton.cluster_client import Change, Client

log = logging.getLogger(__name__)
ORPHAN_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """`home` is BATON_HOME. `volumes`: claim -> directory. `default_volume` makes the demo model's directory.

    `with_services` False: the proxies of Services run elsewhere (a process that outlives this one).
    """

    home: Path
    isolation: isolation.Wanted = "auto"
    nodes: tuple[NodeSpec, ...] = field(default_factory=default_nodes)
    volumes: Mapping[str, Path] = field(default_factory=dict)
    default_volume: Callable[[], Path] | None = None
    backoff: Backoff = field(default_factory=Backoff)
    probe_scale: float = 1.0
    with_services: bool = True
    now: Callable[[], float] = time.time


class NodeAgent:
    """Use one per BATON_HOME. Raises `IsolationError`, `CatalogueError` when it cannot be set up."""

    def __init__(self, client: Client, config: NodeConfig, slots: SlotStore | None = None) -> None:
        self.isolation = isolation.choose(config.isolation)
        self.slots = slots or SlotStore(config.home)
        self.objects = Objects(client)
        self.nodes = Nodes(client, config.nodes, self.isolation.name, config.now)
        self.ready = asyncio.Event()
        """Set when the nodes are registered and everything left behind was adopted."""
        self.connector = AgentConnector(self._worker_of, self.isolation.runtime, self.slots.ended)
        self._workers: dict[str, PodWorker] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._hosts = HostsFiles(self.objects, self._living_slots)
        self._services = ServiceAgent(client, self.objects.services) if config.with_services else None
        self._users: dict[tuple[str, str, str], set[str]] = {}
        self._shared = NodeServices(
            client=client, objects=self.objects, slots=self.slots, catalogue=Catalogue(config.home),
            runtime=self.isolation.runtime, backoff=config.backoff, now=config.now, directories=config.volumes,
            default_volume=config.default_volume, allocatable=self.nodes.allocatable, write_hosts=self._hosts.write,
            probe_scale=config.probe_scale,
        )  # fmt: skip

    async def run(self) -> None:
        """Until cancelled. Pods go on running then, for the next agent."""
        async with asyncio.TaskGroup() as group:
            self.objects.start(group)
            await self.objects.synced()
            await self.nodes.register()
            self._group = group
            await self._adopt()
            self.objects.pods.subscribe(self._on_pod)
            for pod in self.objects.pods.list():
                self._take(pod)
            for cache in (self.objects.config_maps, self.objects.secrets, self.objects.claims):
                cache.subscribe(self._on_reference)
            self.objects.persistent_volumes.subscribe(lambda _: self._wake_all())
            group.create_task(self._hosts.run(), name="hosts files")
            group.create_task(self.nodes.run(), name="node heartbeat")
            if self._services is not None:
                group.create_task(self._services.run(), name="service proxies")
            self.ready.set()

    async def _adopt(self) -> None:
        """Take over the slots of pods that still exist; end and forget the others."""
        pods = {str(pod["metadata"]["uid"]): pod for pod in self.objects.pods.list()}
        for slot in list(self.slots.existing()):
            pod = pods.get(slot.uid)
            if pod is not None and pod["spec"].get("nodeName") in self.nodes.names:
                self._start(pod, slot)
            else:
                log.info("clearing a slot without a pod", extra={"pod": f"{slot.namespace}/{slot.name}"})
                self._group.create_task(self._clear(slot), name=f"clear {slot.name}")

    async def _clear(self, slot: Slot) -> None:
        attempts = [path.parent for path in (slot.directory / "containers").glob("*/*/launch.json")]
        processes = [
            Supervised.adopt(path, f"{slot.uid}/{path.parent.name}/{path.name}") for path in attempts
        ]  # fmt: skip
        for process in processes:
            process.stop(ORPHAN_GRACE_S)
        for process in processes:
            await process.ended.wait()
        await asyncio.to_thread(self.slots.remove, slot)

    def _on_pod(self, change: Change) -> None:
        pod = change.object
        if pod is None:
            return
        worker = self._workers.get(str(pod["metadata"]["uid"]))
        if change.type == "DELETED":
            if worker is not None:
                worker.gone()
        elif worker is not None:
            worker.update(pod)
        else:
            self._take(pod)

    def _take(self, pod: Object) -> None:
        """Start a worker for a pod of ours that has none."""
        if pod["metadata"]["uid"] in self._workers:
            return
        node = pod["spec"].get("nodeName")
        if not node:
            self.nodes.grow_for(pod)
        elif node in self.nodes.names:
            self._start(pod, None)

    def _start(self, pod: Object, slot: Slot | None) -> None:
        uid = str(pod["metadata"]["uid"])
        worker = PodWorker(pod, self._shared, slot)
        self._workers[uid] = worker
        namespace = str(pod["metadata"]["namespace"])
        for kind, name in referenced(pod):
            self._users.setdefault((kind, namespace, name), set()).add(uid)
        task = self._group.create_task(worker.run(), name=f"pod {namespace}/{pod['metadata']['name']}")
        self._tasks[uid] = task
        task.add_done_callback(lambda _: self._forget(uid))

    def _forget(self, uid: str) -> None:
        self._workers.pop(uid, None)
        self._tasks.pop(uid, None)
        for key in [key for key, users in self._users.items() if uid in users]:
            self._users[key].discard(uid)
            if not self._users[key]:
                del self._users[key]

    def _on_reference(self, change: Change) -> None:
        obj = change.object
        if obj is None:
            return
        key = (str(obj.get("kind")), str(obj["metadata"].get("namespace")), str(obj["metadata"]["name"]))
        for uid in self._users.get(key, ()):
            self._workers[uid].wake()

    def _wake_all(self) -> None:
        for worker in self._workers.values():
            worker.wake()

    def _living_slots(self) -> list[tuple[Object, Slot]]:
        return [(worker.pod, worker.slot) for worker in self._workers.values() if worker.slot is not None]

    def _worker_of(self, namespace: str, name: str) -> PodWorker | None:
        for worker in self._workers.values():
            meta = worker.pod["metadata"]
            if (meta["namespace"], meta["name"]) == (namespace, name):
                return worker
        return None
