"""The worker's HTTP port against clients that mean harm or are broken."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from tests.server.conftest import Bed, Start

from baton.engine.server import edge

BODY = b'{"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 2}}'
HEAD = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n"


@pytest.fixture
async def bed(start: Start) -> AsyncIterator[Bed]:
    async with start() as running:
        yield running


async def dial(bed: Bed) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = bed.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def read_by_worker(writer: asyncio.StreamWriter) -> None:
    """What was written has arrived: the worker reads on this very loop."""
    await writer.drain()
    for _ in range(50):
        await asyncio.sleep(0)


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, object]]:
    """Status and body of an answer after which the worker closes."""
    head, _, body = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


async def serves(bed: Bed) -> None:
    assert (await bed.post("/generate", json.loads(BODY))).status_code == 200


@pytest.mark.parametrize(
    "first",
    [b"GET /health?", b"GET /health HTTP/1.1\r\nx: ", b"GET /health HTTP/1.1\r\n"],
    ids=["url", "one header", "many headers"],
)
async def test_a_head_without_end_is_refused_before_it_fills_memory(bed: Bed, first: bytes):
    reader, writer = await dial(bed)
    writer.write(first)
    await read_by_worker(writer)
    part = b"a: b\r\n" if first.endswith(b"1.1\r\n") else b"a"
    writer.write(part * ((edge.MAX_HEAD_BYTES + 200) // len(part)))
    status, error = await answer(reader)
    assert status == 431
    assert str(edge.MAX_HEAD_BYTES) in str(error["message"])
    writer.close()
    await serves(bed)


async def test_trailers_without_end_are_refused(bed: Bed):
    reader, writer = await dial(bed)
    writer.write(b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n")
    await read_by_worker(writer)
    writer.write(b"t: " + b"x" * (edge.MAX_HEAD_BYTES + 200))
    status, _ = await answer(reader)
    assert status == 431
    writer.close()
    await serves(bed)


@pytest.mark.parametrize("sent", [b"POST /gen", HEAD % len(BODY)], ids=["half a line", "half a head"])
async def test_a_head_that_does_not_come_is_answered_and_closed(bed: Bed, monkeypatch: pytest.MonkeyPatch, sent: bytes):
    monkeypatch.setattr(edge, "READ_TIMEOUT_S", 0.1)
    reader, writer = await dial(bed)
    writer.write(sent)
    status, _ = await answer(reader)
    assert status == 408
    writer.close()
    await serves(bed)


async def test_a_connection_that_says_nothing_is_closed(bed: Bed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(edge, "READ_TIMEOUT_S", 0.1)
    reader, writer = await dial(bed)
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    await serves(bed)


async def test_a_body_that_stops_coming_is_given_up(bed: Bed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(edge, "READ_TIMEOUT_S", 0.1)
    reader, writer = await dial(bed)
    writer.write(HEAD % len(BODY) + b"\r\n" + BODY[:10])
    await asyncio.wait_for(reader.read(), 10)  # the connection ends
    writer.close()
    await serves(bed)


async def test_a_kept_connection_may_wait_between_requests_and_for_its_answer(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(edge, "READ_TIMEOUT_S", 0.1)
    reader, writer = await dial(bed)
    for _ in range(2):
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        fired = asyncio.Event()
        asyncio.get_running_loop().call_later(0.3, fired.set)
        await fired.wait()
    writer.close()


async def test_half_a_request_and_a_closed_socket_leave_nothing_behind(bed: Bed):
    for cut in (0, 9, len(HEAD % len(BODY)), len(HEAD % len(BODY)) + 20):
        _, writer = await dial(bed)
        writer.write((HEAD % len(BODY) + b"\r\n" + BODY)[:cut])
        writer.write_eof()
        writer.close()
    await serves(bed)
    await bed.until(lambda: bed.ctx.engines.num_in_flight == 0)
