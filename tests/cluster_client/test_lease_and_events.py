"""Leader election and events against the embedded API server, on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from baton.cluster.apiserver import ApiServer, Store, serve
from baton.cluster_client import Client, ClusterConfig, EventRecorder, LeaderElector, LeadershipLost, LeaseTiming
from baton.cluster_client.resources import CONFIG_MAPS, EVENTS, LEASES


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    store = Store(tmp_path / "state.db")
    nodes: Any = None  # no pod runs here, so nothing asks for a node
    serving = await serve(ApiServer(store, nodes, token=None))
    try:
        async with Client(ClusterConfig(serving.url)) as found:
            yield found
    finally:
        await serving.close()
        await store.close()


class Clock:
    """Time moves only by sleeping; each sleep lets other tasks run once."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def elector(client: Client, name: str, clock: Clock) -> LeaderElector:
    timing = LeaseTiming(duration_s=15, renew_deadline_s=10, retry_s=2)
    return LeaderElector(client, "op", "default", name, timing=timing, monotonic=clock.monotonic, sleep=clock.sleep)


async def holder(client: Client) -> tuple[str, int]:
    spec = (await client.get(LEASES, "op", "default"))["spec"]
    return spec["holderIdentity"], spec["leaseTransitions"]


async def test_one_leads_and_another_takes_over_only_when_the_lease_is_stale(client: Client) -> None:
    one, two_clock = elector(client, "one", Clock()), Clock()
    await one.acquire()
    assert (one.is_leader, await holder(client)) == (True, ("one", 0))
    two = elector(client, "two", two_clock)
    await two.acquire()  # "one" never renews
    assert two_clock.now > 15
    assert await holder(client) == ("two", 1)
    with pytest.raises(LeadershipLost, match="two leads"):
        await one.hold()
    assert not one.is_leader


async def test_a_released_lease_is_free_at_once(client: Client) -> None:
    one, clock = elector(client, "one", Clock()), Clock()
    await one.acquire()
    await one.release()
    two = elector(client, "two", clock)
    await two.acquire()
    assert clock.now == 0


async def test_a_leader_that_cannot_renew_gives_up_before_others_may_start() -> None:
    clock = Clock()
    async with Client(ClusterConfig("http://127.0.0.1:9")) as nowhere:
        with pytest.raises(LeadershipLost, match="not renewed for 10 s"):
            await elector(nowhere, "one", clock).hold()
    assert clock.now < 15


def test_timings_that_would_allow_two_leaders_are_refused() -> None:
    with pytest.raises(ValueError, match="renew_deadline"):
        LeaseTiming(duration_s=5, renew_deadline_s=10)


async def test_the_same_event_is_counted_not_repeated(client: Client) -> None:
    about = await client.create(
        CONFIG_MAPS, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}, "default"
    )
    recorder = EventRecorder(client, "test", now=lambda: datetime(2026, 1, 1, tzinfo=UTC))
    for message in ("x", "x", "y", "x"):
        await recorder.record(about, "Warning", "Odd", message)
    found = {e["message"]: e for e in (await client.list(EVENTS, "default")).items}
    assert {message: e["count"] for message, e in found.items()} == {"x": 3, "y": 1}
    assert found["x"]["involvedObject"]["uid"] == about["metadata"]["uid"]
    assert (found["x"]["type"], found["x"]["reason"], found["x"]["source"]["component"]) == ("Warning", "Odd", "test")


async def test_events_of_one_second_keep_their_order_by_name(client: Client) -> None:
    about = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default", "uid": "u-order"}}
    ticks = (datetime(2026, 1, 1, 0, 0, 0, micro, tzinfo=UTC) for micro in range(1, 9))
    recorder = EventRecorder(client, "test", now=lambda: next(ticks))
    told = ["Scheduled", "Pulled", "Created", "Started"]
    for reason in told:
        await recorder.record(about, "Normal", reason, "as it came")
    found = [e for e in (await client.list(EVENTS, "default")).items if e["involvedObject"].get("uid") == "u-order"]
    assert [e["reason"] for e in sorted(found, key=lambda e: e["metadata"]["name"])] == told


async def test_an_event_that_cannot_be_written_fails_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async with Client(ClusterConfig("http://127.0.0.1:9")) as nowhere:
        about = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default"}}
        await EventRecorder(nowhere, "test").record(about, "Normal", "R", "m")
    assert "event not written" in caplog.text
