"""Services on 127.0.0.1: what is published, what a client sees through the port, and a port that is taken."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.memory_api import MemoryApi

from baton.api.resources import SERVICES
from baton.cluster import publish
from baton.cluster.claims import default_source
from baton.cluster.home import HomeError
from baton.cluster.manifests import parse
from baton.cluster.publish import PUBLISHED, WANTED, Publisher, Route, check_names, routes

Object = dict[str, Any]


def service(kind: str, ports: list[Object], *, port: str | None = None, address: str = "127.0.0.1") -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "s", "namespace": "default", "annotations": {WANTED: port} if port else {}},
        "spec": {"type": kind, "clusterIP": address, "ports": ports},
    }


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (service("ClusterIP", [{"port": 1}]), ()),
        (service("LoadBalancer", [{"port": 1}, {"port": 2}]), (Route(1, "127.0.0.1", 1), Route(2, "127.0.0.1", 2))),
        (service("LoadBalancer", [{"port": 1}, {"port": 2}], port="9"), (Route(9, "127.0.0.1", 1), Route(2, "127.0.0.1", 2))),
        (service("ClusterIP", [{"port": 1}, {"port": 2}], port="9"), (Route(9, "127.0.0.1", 1),)),
        (service("LoadBalancer", [{"port": 1, "protocol": "UDP"}]), ()),
        (service("LoadBalancer", [{"port": 1}], address="None"), ()),
        (service("LoadBalancer", [{"port": 1}], address=""), ()),
    ],
)  # fmt: skip
def test_what_is_published(one: Object, expected: tuple[Route, ...]) -> None:
    assert routes(one) == expected


def test_a_port_for_a_service_that_is_not_there_is_refused_with_the_names_that_are() -> None:
    manifests, _ = parse("apiVersion: v1\nkind: Service\nmetadata: {name: web}\n", "f.yaml")
    check_names(manifests, {"web": 1})
    with pytest.raises(HomeError, match=r"--publish pd=8000: no Service of that name in the files; there is: web"):
        check_names(manifests, {"pd": 8000})


@contextlib.asynccontextmanager
async def running(api: MemoryApi) -> AsyncIterator[None]:
    task = asyncio.create_task(Publisher(api.client).run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def free_server() -> tuple[asyncio.Server, int]:
    """A server that answers what it was told, in upper case, after the client has finished sending."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


def published_at(api: MemoryApi) -> str | None:
    found = api.objects.get((SERVICES.full_name, "default", "s"), {"metadata": {}})
    return (found["metadata"].get("annotations") or {}).get(PUBLISHED)


async def ask(port: int, text: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(text)
        writer.write_eof()
        return await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_a_published_port_leads_to_the_service_and_goes_with_it() -> None:
    api = MemoryApi()
    backend, target = await free_server()
    blocker, port = await free_server()
    blocker.close()
    await blocker.wait_closed()
    async with running(api):
        await api.create(SERVICES, service("LoadBalancer", [{"port": target}], port=str(port)))
        assert await api.until(lambda: published_at(api)) == f"127.0.0.1:{port}"
        assert await ask(port, b"hello") == b"HELLO"
        # a half-closed connection carries a large answer whole
        assert await ask(port, b"x" * 3_000_000) == b"X" * 3_000_000
        await api.delete(SERVICES, "s", "default")
        async with asyncio.timeout(5):
            while True:
                try:
                    await ask(port, b"")
                except ConnectionRefusedError:
                    break
    backend.close()


async def test_a_port_in_use_is_told_once_and_taken_when_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "RETRY_S", 0.02)
    api = MemoryApi()
    backend, target = await free_server()
    other, port = await free_server()
    async with running(api):
        await api.create(SERVICES, service("LoadBalancer", [{"port": target}], port=str(port)))
        await api.until(api.events)
        reason, message = api.events()[0]
        assert reason == "PortNotPublished"
        assert (
            message
            == f"port {port} on 127.0.0.1 is in use by another program; choose another with `baton up FILE --publish s=PORT`"
        )
        assert published_at(api) is None
        other.close()
        await other.wait_closed()
        assert await api.until(lambda: published_at(api)) == f"127.0.0.1:{port}"
        assert len(api.events()) == 1
        assert await ask(port, b"now") == b"NOW"
    backend.close()


async def test_a_service_without_endpoints_resets_the_connection() -> None:
    api = MemoryApi()
    gone, target = await free_server()
    gone.close()
    await gone.wait_closed()
    free, port = await free_server()
    free.close()
    await free.wait_closed()
    async with running(api):
        await api.create(SERVICES, service("LoadBalancer", [{"port": target}], port=str(port)))
        await api.until(lambda: published_at(api))
        with pytest.raises(ConnectionResetError):
            await ask(port, b"hello")


def claim(modes: list[str]) -> Object:
    return {"metadata": {"namespace": "ns", "name": "data", "uid": "0123456789"}, "spec": {"accessModes": modes}}


def test_what_a_claim_without_a_volume_is() -> None:
    own, given = Path("/own"), {"data": Path("/given")}
    assert default_source(claim(["ReadOnlyMany"]), given, own) == {"hostPath": {"path": "/given"}}
    assert default_source(claim(["ReadOnlyMany"]), {"ns/data": Path("/x")}, own) == {"hostPath": {"path": "/x"}}
    assert default_source(claim(["ReadWriteMany"]), {}, own)["csi"]["driver"] == "demo-model.baton.dev"
    data = default_source(claim(["ReadWriteOnce"]), {}, own)["hostPath"]
    assert data == {"path": "/own/ns-data-01234567", "type": "DirectoryOrCreate"}
