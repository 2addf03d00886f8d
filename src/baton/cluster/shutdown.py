"""Ending every pod of this machine while their objects stay: what `baton down` does and a later start undoes.

Works on slots and processes alone, so it also cleans up after a daemon that was killed.
"""

from __future__ import annotations

import asyncio
import logging

from baton.api.names import NODE_STOPPED
from baton.api.resources import PODS, Object
from baton.cluster.node.slots import SlotStore
from baton.cluster.node.supervised import Supervised
from baton.cluster_client import Client, ClientError

logger = logging.getLogger(__name__)
GRACE_S = 10.0


async def stop_processes(slots: SlotStore, grace_s: float = GRACE_S) -> int:
    """SIGTERM to every container, SIGKILL after the grace; how many ran. Returns when all have ended."""
    running = []
    for slot in slots.existing():
        for launch in sorted((slot.directory / "containers").glob("*/*/launch.json")):
            name, attempt = launch.parent.parent.name, launch.parent.name
            process = Supervised.adopt(launch.parent, f"{slot.uid}/{name}/{attempt}")
            if process.exit is None:
                process.stop(grace_s)
                running.append(process)
    await asyncio.gather(*(process.ended.wait() for process in running))
    return len(running)


async def stop_pods(client: Client, slots: SlotStore) -> None:
    """Stop the processes, then tell the API that no pod is ready, so that nobody relies on it after the next start."""
    count = await stop_processes(slots)
    logger.info("pods stopped", extra={"containers": count})
    listed = await client.list(PODS)
    for pod in listed.items:
        conditions = (pod.get("status") or {}).get("conditions") or []
        ready = [one for one in conditions if one["type"] in ("Ready", "ContainersReady") and one["status"] == "True"]
        if not ready:
            continue
        body: Object = {"status": {"conditions": [_unready(one) for one in ready]}}
        meta = pod["metadata"]
        try:
            await client.patch(PODS, meta["name"], meta["namespace"], body, kind="strategic", subresource="status")
        except ClientError as error:
            logger.warning("pod status not written", extra={"pod": meta["name"], "error": str(error)})


def _unready(condition: Object) -> Object:
    return {"type": condition["type"], "status": "False", "reason": NODE_STOPPED, "message": "the cluster was stopped"}
