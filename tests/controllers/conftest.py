"""A real API server (the embedded one) with the real runner and a kubelet that makes every pod Ready at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from baton import api
from baton.api.resources import CUSTOM_RESOURCE_DEFINITIONS, NODES, PODS, Object, Resource
from baton.cluster.apiserver import ApiServer, Store, serve
from baton.cluster_client import Cache, Change, Client, ClusterConfig, Conflict, NotFound
from baton.controllers.plan import format_time
from baton.controllers.runner import Runner, builtin_controllers, our_controllers
from baton.controllers.runner.runner import utc_now

NODE: Object = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "node-0", "labels": {"kubernetes.io/hostname": "node-0"}},
    "status": {
        "allocatable": {"cpu": "64", "memory": "512Gi", "pods": "1000", "nvidia.com/gpu": "16", "aliyun/erdma": "16"},
        "conditions": [{"type": "Ready", "status": "True"}],
    },
}


class NoNodes:
    """No node agent stands behind this API server: logs and exec have nowhere to go."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test asked the node for {name}")


class Bench:
    """The cluster of one test. ``until`` waits for a fact about the server's objects, seen through watches."""

    def __init__(self, client: Client, runner: Runner, config: ClusterConfig) -> None:
        self.client, self.runner, self.config = client, runner, config
        self.ready_pods = True
        self._moved = asyncio.Event()
        self.pods = Cache(client, PODS)
        self.groups = Cache(client, api.resources.ROLE_BASED_GROUPS)
        self._caches: dict[Resource, Cache] = {PODS: self.pods, api.resources.ROLE_BASED_GROUPS: self.groups}
        self._ids = 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for cache in self._caches.values():
                cache.subscribe(lambda _: self._moved.set())
                tasks.create_task(cache.run())
            tasks.create_task(self.runner.run())
            await self.pods.synced()
            self.pods.subscribe(lambda change: self._kubelet(change, tasks))

    def _kubelet(self, change: Change, tasks: asyncio.TaskGroup) -> None:
        pod = change.object
        if pod is None or change.type == "DELETED":
            return
        if pod["metadata"].get("deletionTimestamp"):
            tasks.create_task(self._let_go(pod))
        elif self.ready_pods and pod["spec"].get("nodeName") and self._needs_work(pod):
            tasks.create_task(self.make_ready(pod))

    async def _let_go(self, pod: Object) -> None:
        meta = pod["metadata"]
        with contextlib.suppress(NotFound, Conflict):
            await self.client.delete(PODS, meta["name"], meta["namespace"], grace_period_s=0, uid=meta["uid"])

    @staticmethod
    def _needs_work(pod: Object) -> bool:
        running = {c["name"]: c["image"] for c in (pod.get("status") or {}).get("containerStatuses") or []}
        return running != {c["name"]: c["image"] for c in pod["spec"]["containers"]}

    async def make_ready(self, pod: Object) -> None:
        meta = pod["metadata"]
        old = {c["name"]: c for c in (pod.get("status") or {}).get("containerStatuses") or []}
        statuses = []
        for container in pod["spec"]["containers"]:
            self._ids += 1
            before = old.get(container["name"])
            statuses.append({"name": container["name"], "image": container["image"], "imageID": container["image"],
                             "containerID": f"baton://{self._ids}", "ready": True,
                             "restartCount": before["restartCount"] + 1 if before else 0})  # fmt: skip
        condition = {"type": "Ready", "status": "True", "lastTransitionTime": format_time(utc_now())}
        kept = [c for c in (pod.get("status") or {}).get("conditions") or [] if c["type"] != "Ready"]
        status = {"phase": "Running", "podIP": f"127.9.0.{self._ids}", "conditions": [*kept, condition],
                  "containerStatuses": statuses}  # fmt: skip
        with contextlib.suppress(NotFound):
            await self.client.patch(PODS, meta["name"], meta["namespace"], {"status": status}, subresource="status")

    async def until(self, fact: Callable[[], Any], timeout_s: float = 20.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not fact():
                self._moved.clear()
                await self._moved.wait()

    async def runner_turn(self) -> None:
        """Let the runner go on; for facts that no watch of this test shows. The caller's test has a time limit."""
        await self.client.text("/healthz")

    def group_condition(self, name: str, kind: str) -> Object:
        group = self.groups.get(name, "default") or {}
        found = [c for c in (group.get("status") or {}).get("conditions") or [] if c["type"] == kind]
        return found[0] if found else {}

    def is_settled(self, name: str) -> bool:
        group = self.groups.get(name, "default")
        if group is None:
            return False
        ready, rolling = self.group_condition(name, "Ready"), self.group_condition(name, "RollingUpdateInProgress")
        seen = (group.get("status") or {}).get("observedGeneration") == group["metadata"]["generation"]
        return bool(seen and ready.get("status") == "True" and rolling.get("status") == "False")


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    store = Store(tmp_path / "state.db")
    conversions = {"rolebasedgroups.workloads.x-k8s.io": lambda obj, to: api.convert(obj, to.rpartition("/")[2])}
    server = ApiServer(store, NoNodes(), token=None, conversions=conversions)
    serving = await serve(server)
    config = ClusterConfig(serving.url)
    try:
        async with Client(config) as client:
            for crd in api.crd_manifests():
                await client.create(CUSTOM_RESOURCE_DEFINITIONS, crd)
            await client.create(NODES, NODE)
            await client.patch(NODES, "node-0", None, {"status": NODE["status"]}, subresource="status")
            made = Bench(client, Runner(client, [*our_controllers(), *builtin_controllers()]), config)
            task = asyncio.create_task(made.run())
            try:
                yield made
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
    finally:
        await serving.close()
        await store.close()
