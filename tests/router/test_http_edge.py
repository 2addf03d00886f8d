"""The client's side of HTTP/1.1: limits, bad input, framing, keep-alive, pipelining, HTTP/1.0."""

import json
import socket

import pytest
from tests.fakes.fake_worker import expected_text
from tests.fakes.router_bed import bed, connect, eventually, http_request

from baton.router.config import LimitsConfig

BODY = {"model": "fake", "prompt": "p", "max_tokens": 4}
LIMITS = LimitsConfig(max_payload_bytes=1000, max_header_bytes=2000)


async def raw(port: int, data: bytes):
    client = await connect(port)
    client.send(data)
    try:
        return await client.reply()
    finally:
        client.close()


@pytest.mark.parametrize(
    ("data", "status", "word"),
    [
        (b"nonsense\r\n\r\n", 400, "HTTP"),
        (b"GET /nowhere HTTP/1.1\r\n\r\n", 404, "/nowhere"),
        (b"GET /generate HTTP/1.1\r\n\r\n", 405, "POST"),
        (b"POST /v1/models HTTP/1.1\r\ncontent-length: 0\r\n\r\n", 405, "GET"),
        (http_request("/generate", b"{broken"), 400, "JSON"),
        (http_request("/generate", b'["text"]'), 400, "object"),
        (http_request("/generate", b'{"text":"\xff\xfe'), 400, "JSON"),
        (http_request("/generate", b""), 400, "JSON"),
        (http_request("/generate", {"text": "x" * 1000}), 413, "1000"),
        (
            b"POST /generate HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n7d0\r\n" + b"x" * 2000,
            413,
            "--max-payload-size",
        ),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 3000 + b"\r\n\r\n", 431, "2000"),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 3000, 431, "2000"),
        (b"POST /generate HTTP/1.1\r\nexpect: coffee\r\ncontent-length: 1\r\n\r\n", 417, "100-continue"),
        (b"POST /generate HTTP/1.1\r\ncontent-length: x\r\n\r\n", 400, "HTTP"),
    ],
)
async def test_bad_input_gets_a_typed_error_and_the_router_goes_on(data, status, word):
    async with bed(limits=LIMITS) as b:
        reply = await raw(b.router.port, data)
        assert reply.status == status
        error = reply.json["error"]
        assert error["code"] == status
        assert word in error["message"]
        assert error["request_id"] == reply.headers["x-request-id"]
        assert (await b.ask("/v1/completions", BODY)).status == 200


async def test_a_connection_is_kept_and_used_again():
    async with bed() as b:
        client = await connect(b.router.port)
        for _ in range(3):
            client.send(http_request("/v1/completions", BODY))
            assert (await client.reply()).status == 200
        for stream in (True, False):
            client.send(http_request("/v1/completions", BODY | {"stream": stream}))
            assert (await client.reply()).status == 200
        assert len(b.router.connections) == 1
        assert len(b.decode[0].connections) == 1, "so is the worker's"


async def test_connection_close_is_kept():
    async with bed() as b:
        client = await connect(b.router.port)
        client.send(http_request("/v1/completions", BODY, {"connection": "close"}))
        assert (await client.reply()).headers["connection"] == "close"
        await eventually(client.closed.is_set)


async def test_pipelined_requests_are_answered_in_order():
    async with bed() as b:
        client = await connect(b.router.port)
        bodies = [BODY | {"prompt": f"p{i}", "stream": i % 2 == 1} for i in range(8)]
        client.send(b"".join(http_request("/v1/completions", body) for body in bodies))
        for i, body in enumerate(bodies):
            reply = await client.reply()
            answers = [event for event in reply.events if event != "[DONE]"] if body["stream"] else [reply.json]
            assert "".join(one["choices"][0]["text"] for one in answers) == expected_text(f"p{i}", 0, 4)


async def test_too_many_pipelined_requests_are_refused():
    async with bed() as b:
        b.decode[0].faults.hang = True
        client = await connect(b.router.port)
        client.send(http_request("/v1/completions", BODY) + http_request("/health", method="GET") * 70)
        await eventually(lambda: b.decode[0].seen)
        (connection,) = b.router.connections
        assert len(connection._waiting) == 0, "refused: nothing of it is kept"
        client.close()


async def test_chunked_bodies_arrive_whole():
    async with bed() as b:
        data = json.dumps(BODY).encode()
        head = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        parts = b"".join(b"%x\r\n%b\r\n" % (len(data[i : i + 5]), data[i : i + 5]) for i in range(0, len(data), 5))
        reply = await raw(b.router.port, head + parts + b"0\r\n\r\n")
        assert reply.json["choices"][0]["text"] == expected_text("p", 0, 4)
        assert b.decode[0].seen[0].headers["content-length"] == str(len(b.decode[0].seen[0].raw))


async def test_a_body_in_pieces_arrives_whole():
    async with bed() as b:
        client = await connect(b.router.port)
        for byte in http_request("/v1/completions", BODY):
            client.send(bytes([byte]))
        assert (await client.reply()).status == 200


async def test_expect_100_continue():
    async with bed() as b:
        client = await connect(b.router.port)
        request = http_request("/v1/completions", BODY, {"expect": "100-continue"})
        end = request.index(b"\r\n\r\n") + 4
        client.send(request[:end])
        await eventually(lambda: client.parser.get_status_code() == 100)
        client.send(request[end:])
        assert (await client.reply()).status == 200


async def test_http_1_0_gets_an_unchunked_answer_and_a_closed_connection():
    async with bed() as b:
        data = json.dumps(BODY | {"stream": True}).encode()
        client = await connect(b.router.port)
        client.send(b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data))
        await eventually(client.closed.is_set)
        assert "transfer-encoding" not in client.headers
        assert client.body.endswith(b"data: [DONE]\n\n")
        assert client.body.count(b"data: {") == 4


async def test_head_has_no_body():
    async with bed() as b:
        client = await connect(b.router.port)
        client.send(b"HEAD /health HTTP/1.1\r\n\r\n")
        await eventually(lambda: client.headers)
        assert client.headers["content-length"] == "2"
        assert client.body == b""


async def test_slow_requests_and_idle_connections_end():
    limits = LimitsConfig(read_timeout_s=60, keep_alive_s=75)
    async with bed(limits=limits) as b:
        idle, slow = await connect(b.router.port), await connect(b.router.port)
        slow.send(b"POST /generate HTTP/1.1\r\ncontent-le")
        await eventually(lambda: sum(connection._in_message for connection in b.router.connections) == 1)
        now_s = b.router.loop.time()
        for connection in list(b.router.connections):
            connection.sweep(now_s + 59)
        assert len(b.router.connections) == 2
        for connection in list(b.router.connections):
            connection.sweep(now_s + 61)
        assert (await slow.reply()).status == 408
        for connection in list(b.router.connections):
            connection.sweep(now_s + 80)
        await eventually(idle.closed.is_set)


async def test_request_ids_come_in_and_go_out():
    async with bed(request_id_headers=("x-correlation-id", "x-request-id")) as b:
        reply = await b.ask("/v1/completions", BODY, {"X-Request-Id": "mine-1"})
        assert reply.headers["x-request-id"] == "mine-1"
        assert b.prefill[0].seen[0].headers["x-request-id"] == "mine-1"
        reply = await b.ask("/v1/completions", BODY, {"X-Request-Id": "a", "X-Correlation-Id": "b"})
        assert reply.headers["x-request-id"] == "b"
        first, second = [(await b.ask("/v1/completions", BODY)).headers["x-request-id"] for _ in range(2)]
        assert first != second


async def test_headers_that_workers_need_are_handed_on():
    async with bed() as b:
        sent = {"authorization": "Bearer k", "traceparent": "00-1-2-01", "x-tenant": "t", "cookie": "secret"}
        await b.ask("/v1/completions", BODY, sent)
        got = b.decode[0].seen[0].headers
        assert (got["authorization"], got["traceparent"], got["x-tenant"]) == ("Bearer k", "00-1-2-01", "t")
        assert "cookie" not in got


async def test_an_upgrade_is_not_taken_up():
    async with bed() as b:
        asked = {"upgrade": "h2c", "connection": "upgrade"}
        reply = await b.ask("/v1/completions", BODY, asked)
        assert reply.status == 400
        assert "Upgrade" in reply.json["error"]["message"]
        reply = await raw(b.router.port, b"GET /health HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n")
        assert reply.status == 200


async def test_a_slow_reader_holds_the_worker_back():
    async with bed() as b:
        client = await connect(b.router.port)
        assert client.transport is not None
        client.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.transport.pause_reading()
        await eventually(lambda: b.router.connections)
        (connection,) = b.router.connections
        assert connection.transport is not None
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.transport.set_write_buffer_limits(4096)
        client.send(
            http_request("/generate", {"text": "p", "stream": True, "sampling_params": {"max_new_tokens": 300}})
        )
        await eventually(lambda: b.router.core.exchanges)
        (exchange,) = b.router.core.exchanges
        await eventually(lambda: exchange.attempt is not None and exchange.attempt.decode.connection._paused)
        client.transport.resume_reading()
        reply = await client.reply()
        assert len(reply.events) == 301
        client.send(http_request("/v1/completions", BODY))
        assert (await client.reply()).status == 200, "the worker's connection reads again"
