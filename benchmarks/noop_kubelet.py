"""A node agent that runs nothing: pods that are bound become Ready at once, pods that are deleted go at once.

For benchmarks of the control plane. Speaks the Kubernetes API only, so it serves any API server.
"""

import asyncio
import time
from datetime import UTC, datetime

from baton.api.resources import NODES, PODS, Object
from baton.cluster_client import AlreadyExists, Client, ClientError, NotFound, follow


class NoopKubelet:
    """`answers` maps the resourceVersion of each status write to when it was sent and answered (monotonic seconds)."""

    def __init__(self, client: Client, num_nodes: int = 8, num_writers: int = 16) -> None:
        self._client = client
        self._num_nodes = num_nodes
        self._num_writers = num_writers
        self._queue: asyncio.Queue[Object] = asyncio.Queue()
        self.answers: dict[int, tuple[float, float]] = {}

    async def run(self) -> None:
        """Until cancelled."""
        await self._register()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._num_writers):
                group.create_task(self._write())
            seen: set[str] = set()
            async for change in follow(self._client, PODS):
                pod = change.object
                if pod is None or change.type == "DELETED" or not pod["spec"].get("nodeName"):
                    continue
                uid = pod["metadata"]["uid"] + str(bool(pod["metadata"].get("deletionTimestamp")))
                if uid not in seen:
                    seen.add(uid)
                    self._queue.put_nowait(pod)

    async def _register(self) -> None:
        capacity = {"cpu": "1000", "memory": "4Ti", "pods": "1000", "nvidia.com/gpu": "1000"}
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "does nothing"}
        for number in range(self._num_nodes):
            name = f"noop-{number}"
            node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
            try:
                await self._client.create(NODES, node)
            except AlreadyExists:
                continue
            status = {"capacity": capacity, "allocatable": capacity, "conditions": [ready]}
            await self._client.patch(NODES, name, None, {"status": status}, subresource="status")

    async def _write(self) -> None:
        while True:
            pod = await self._queue.get()
            try:
                await self._one(pod)
            except NotFound:
                continue
            except ClientError:
                self._queue.put_nowait(pod)
                await asyncio.sleep(0.1)

    async def _one(self, pod: Object) -> None:
        meta = pod["metadata"]
        if meta.get("deletionTimestamp"):
            await self._client.delete(PODS, meta["name"], meta["namespace"], grace_period_s=0, uid=meta["uid"])
            return
        sent = time.monotonic()
        answer = await self._client.patch(
            PODS, meta["name"], meta["namespace"], {"status": ready_status(pod)}, kind="strategic", subresource="status"
        )
        self.answers[int(answer["metadata"]["resourceVersion"])] = (sent, time.monotonic())


def ready_status(pod: Object) -> Object:
    """What a kubelet writes about a pod whose containers run and pass their probes."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    kinds = ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    number = int(pod["metadata"]["uid"].replace("-", "")[:6], 16)
    return {
        "phase": "Running",
        "podIP": f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}",
        "startTime": now,
        "conditions": [{"type": kind, "status": "True", "lastTransitionTime": now} for kind in kinds],
        "containerStatuses": [
            {
                "name": one["name"],
                "image": one["image"],
                "imageID": f"noop://{one['image']}",
                "ready": True,
                "started": True,
                "restartCount": 0,
                "state": {"running": {"startedAt": now}},
            }
            for one in pod["spec"]["containers"]
        ],
    }
