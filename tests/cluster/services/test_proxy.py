"""The TCP proxy of a Service: relays both ways, round robin, around endpoints that are gone, with clean and broken ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from tests.fakes.ports import free_port

from baton.cluster.services.agent import backends
from baton.cluster.services.proxy import Frontend, Proxy

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[tuple[str, int]]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield "127.0.0.1", server.sockets[0].getsockname()[1]


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    one = Proxy(Frontend("127.0.0.1", free_port()))
    await one.start()
    yield one
    await one.stop()


async def ask(proxy: Proxy, data: bytes = b"") -> bytes:
    reader, writer = await asyncio.open_connection(proxy.frontend.address, proxy.frontend.port)
    try:
        writer.write(data)
        writer.write_eof()
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def saying(name: bytes) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(name)

    return handler


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def test_bytes_go_both_ways_and_half_closing_works(proxy: Proxy) -> None:
    async with listening(echo) as backend:
        proxy.set_backends((backend,))
        data = bytes(range(256)) * 4096
        assert await ask(proxy, data) == data


async def test_endpoints_take_turns(proxy: Proxy) -> None:
    async with listening(saying(b"a")) as one, listening(saying(b"b")) as two:
        proxy.set_backends((one, two))
        assert sorted([await ask(proxy) for _ in range(4)]) == [b"a", b"a", b"b", b"b"]


async def test_an_endpoint_that_refuses_is_passed_over(proxy: Proxy) -> None:
    async with listening(saying(b"alive")) as alive:
        proxy.set_backends((("127.0.0.1", free_port()), alive))
        assert [await ask(proxy) for _ in range(3)] == [b"alive"] * 3


async def test_without_an_endpoint_the_connection_breaks_at_once(proxy: Proxy) -> None:
    with pytest.raises(ConnectionResetError):
        await ask(proxy, b"hello")


async def test_a_broken_endpoint_is_a_broken_connection_not_an_end(proxy: Proxy) -> None:
    async def breaks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"partial")
        await writer.drain()
        await reader.readexactly(1)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        writer.transport.abort()

    async with listening(breaks) as backend:
        proxy.set_backends((backend,))
        reader, writer = await asyncio.open_connection(proxy.frontend.address, proxy.frontend.port)
        assert await reader.readexactly(7) == b"partial"
        writer.write(b"x")
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 10)
        writer.close()


async def test_a_connection_in_progress_stays_with_its_endpoint(proxy: Proxy) -> None:
    async with listening(echo) as first, listening(saying(b"second")) as second:
        proxy.set_backends((first,))
        reader, writer = await asyncio.open_connection(proxy.frontend.address, proxy.frontend.port)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        proxy.set_backends((second,))
        writer.write(b"two")
        assert await reader.readexactly(3) == b"two"
        assert await ask(proxy) == b"second"
        writer.close()
        await writer.wait_closed()


async def test_stopping_cuts_what_runs() -> None:
    one = Proxy(Frontend("127.0.0.1", free_port()))
    await one.start()
    async with listening(echo) as backend:
        one.set_backends((backend,))
        reader, writer = await asyncio.open_connection(one.frontend.address, one.frontend.port)
        writer.write(b"x")
        await reader.readexactly(1)
        await asyncio.wait_for(one.stop(), 10)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
        with pytest.raises(OSError):
            await asyncio.open_connection(one.frontend.address, one.frontend.port)


def test_backends_are_the_ready_endpoints_of_the_port_with_that_name() -> None:
    slices = [
        {
            "ports": [{"name": "http", "port": 8000}, {"name": "other", "port": 9}],
            "endpoints": [
                {"addresses": ["127.1.0.2"], "conditions": {"ready": True}},
                {"addresses": ["127.1.0.1"], "conditions": {}},
                {"addresses": ["127.1.0.3"], "conditions": {"ready": False}},
            ],
        },
        {"ports": [{"name": "http", "port": 8001}], "endpoints": [{"addresses": ["127.1.0.4"]}]},
        {"ports": [{"name": "http", "port": 8000}], "endpoints": [{"addresses": ["127.1.0.1"]}]},
        {"ports": None, "endpoints": None},
    ]
    assert backends({"name": "http", "port": 80}, slices) == (
        ("127.1.0.1", 8000), ("127.1.0.2", 8000), ("127.1.0.4", 8001)
    )  # fmt: skip
    assert backends({"port": 80}, slices) == ()
