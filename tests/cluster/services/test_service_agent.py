"""Services become listeners: as they come, change, go, and when their port is taken."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.cluster.services.test_proxy import listening, saying
from tests.fakes.memory_api import MemoryApi
from tests.fakes.node_bed import eventually
from tests.fakes.ports import free_port

from baton.cluster.services import agent as agent_module
from baton.cluster.services.agent import ServiceAgent
from baton.cluster_client.resources import ENDPOINT_SLICES, SERVICES

ADDRESS = "127.250.224.9"


@pytest.fixture
async def api() -> AsyncIterator[MemoryApi]:
    memory = MemoryApi()
    task = asyncio.create_task(ServiceAgent(memory.client).run())
    yield memory
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def service(port: int, address: str = ADDRESS, **spec: Any) -> dict[str, Any]:
    ports = [{"name": "http", "port": port, "protocol": "TCP"}]
    return {"metadata": {"name": "web", "namespace": "default"}, "spec": {"clusterIP": address, "ports": ports, **spec}}


def endpoints(*backends: tuple[str, int]) -> dict[str, Any]:
    return {
        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "ports": [{"name": "http", "port": backends[0][1]}],
        "endpoints": [{"addresses": [address]} for address, _ in backends],
    }


async def answer(port: int, address: str = ADDRESS) -> bytes:
    try:
        reader, writer = await asyncio.open_connection(address, port)
    except OSError:
        return b"refused"
    try:
        return await reader.read()
    except ConnectionResetError:
        return b"reset"
    finally:
        writer.close()


async def test_a_service_listens_relays_and_goes(api: MemoryApi) -> None:
    port = free_port()

    async def says(wanted: bytes) -> None:
        async def is_so() -> bool:
            return await answer(port) == wanted

        await eventually(is_so)

    async with listening(saying(b"one")) as one, listening(saying(b"two")) as two:
        await api.create(SERVICES, service(port))
        await says(b"reset")
        await api.create(ENDPOINT_SLICES, endpoints(one))
        await says(b"one")
        await api.patch(ENDPOINT_SLICES, "web-1", "default", endpoints(two))
        await says(b"two")
        await api.delete(SERVICES, "web", "default")
        await says(b"refused")


async def test_a_taken_port_is_told_and_tried_again(api: MemoryApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "RETRY_S", 0.01)
    with socket.socket() as blocker:
        blocker.bind((ADDRESS, 0))
        blocker.listen()
        port = blocker.getsockname()[1]
        await api.create(SERVICES, service(port))
        await api.until(api.events)
        assert api.events()[0] == ("FailedToListen", f"cannot listen on {ADDRESS}:{port}: Address already in use")

    async def is_open() -> bool:
        return await answer(port) == b"reset"

    await eventually(is_open)
    assert len(api.events()) == 1


async def test_an_address_of_another_machine_is_told(api: MemoryApi) -> None:
    await api.create(SERVICES, service(80, address="10.0.0.1"))
    await api.until(api.events)
    assert api.events()[0][0] == "UnusableAddress"
