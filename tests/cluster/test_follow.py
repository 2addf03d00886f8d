"""When `baton up` stops waiting: all ready, all that is not ready is stuck, or time is over."""

import asyncio
from typing import Any

from tests.fakes.memory_api import MemoryApi

from baton.api.resources import PERSISTENT_VOLUME_CLAIMS, PODS
from baton.cluster.follow import Follower, Target, standing
from baton.cluster.progress import Row

Object = dict[str, Any]
READY = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
LOOPS = {
    "containerStatuses": [
        {
            "name": "c",
            "restartCount": 5,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 1}},
        }
    ]
}


def pod(name: str, status: Object, **metadata: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", **metadata},
        "spec": {"nodeName": "n", "containers": [{"name": "c"}]},
        "status": status,
    }


async def wait(api: MemoryApi, *targets: Object, timeout_s: float = 20.0, patience_s: float = 20.0) -> Any:
    told: list[list[Row]] = []
    follower = Follower(api.client, [Target(PODS, one, "f.yaml:3: ") for one in targets])
    async with follower.running():
        outcome = await follower.wait(timeout_s, told.append, patience_s)
    assert told[-1] == outcome.rows
    return outcome


async def test_it_returns_as_soon_as_everything_is_ready() -> None:
    api = MemoryApi()
    starting = await api.create(PODS, pod("a", {"phase": "Pending"}))
    follower = Follower(api.client, [Target(PODS, starting)])
    states: list[str] = []

    def tell(rows: list[Row]) -> None:
        if not states:
            api_tasks.append(asyncio.ensure_future(api.patch(PODS, "a", "default", {"status": READY})))
        states.append(rows[0].state)

    api_tasks: list[asyncio.Future[Object]] = []
    async with follower.running():
        outcome = await follower.wait(20.0, tell)
    assert outcome.is_ready
    assert (states[0], states[-1]) == ("waiting", "ready")


async def test_it_gives_up_on_what_is_stuck_and_says_where_that_is_written() -> None:
    api = MemoryApi()
    fine, broken = await api.create(PODS, pod("a", READY)), await api.create(PODS, pod("b", LOOPS))
    outcome = await wait(api, fine, broken, patience_s=0.0)
    assert not outcome.is_ready
    assert [(row.state, row.where) for row in outcome.rows] == [("ready", "f.yaml:3: "), ("stuck", "f.yaml:3: ")]


async def test_what_still_moves_gets_all_the_time() -> None:
    api = MemoryApi()
    moving, broken = await api.create(PODS, pod("a", {"phase": "Pending"})), await api.create(PODS, pod("b", LOOPS))
    outcome = await wait(api, moving, broken, timeout_s=0.0, patience_s=1000.0)
    assert [row.state for row in outcome.rows] == ["waiting", "stuck"]


async def test_an_object_that_somebody_deleted_is_told() -> None:
    api = MemoryApi()
    gone = await api.create(PODS, pod("a", READY))
    await api.delete(PODS, "a", "default", grace_period_s=0)
    outcome = await wait(api, gone, patience_s=0.0)
    assert [str(row) for row in outcome.rows] == ["pod/a: is gone: deleted by somebody else"]


async def test_a_resumed_cluster_waits_for_what_nothing_owns() -> None:
    api = MemoryApi()
    await api.create(PODS, pod("free", READY))
    await api.create(PODS, pod("owned", READY, ownerReferences=[{"uid": "x", "kind": "RoleBasedGroup", "name": "g"}]))
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "m", "namespace": "default"}}
    await api.create(PERSISTENT_VOLUME_CLAIMS, claim)
    assert [one.object["metadata"]["name"] for one in await standing(api.client)] == ["m", "free"]
