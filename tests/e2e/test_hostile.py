"""Peers and clients that mean harm, on every port of a pair and its router: all go on serving, in bounded memory."""

import contextlib
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from tests.e2e.chaos import Client, at_rest, body, info, until
from tests.e2e.service import Process, Service, running

from baton.transfer.base import PageLayout
from baton.transfer.frames import PROTOCOL_VERSION, Cancel, Frame, Hello, Mode, Notice, encode

NUM_SOCKETS = 200
MEMORY_GROWTH_KIB = 200 << 10
WRONG = PageLayout(model="x", dtype="float16", page_size=1, num_layers=1, num_kv_heads=1, head_dim=1, page_bytes=4)


@pytest.fixture(scope="module")
def pair(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(demo_model, tmp_path_factory.mktemp("hostile")) as service:
        service.worker("prefill", "prefill", "--log-level-http", "warning")
        service.worker("decode", "decode", "--log-level-http", "warning")
        service.wait_ready()
        service.router()
        service.wait_ready()
        served(service, 1)
        yield service


def served(service: Service, seed: int) -> None:
    """An answer through the router: every process still does its work. Twice, the same: nothing was spoiled."""
    answers = []
    for stream in (False, True):
        client = Client(service.processes["router"].url, body(200, seed, stream=stream)).start()
        assert client.end() == "answer", client.problem
        answers.append(client.answer["output_ids"])
    assert answers[0] == answers[1][-len(answers[0]) :]
    at_rest(service)


def memory_kib(process: Process) -> int:
    """Resident memory of the HTTP process and its rank, without the pool that both sides may map."""
    pids = [process.popen.pid, *([] if process.name == "router" else [process.rank_pid()])]
    return sum(
        int(line.split()[1])
        for pid in pids
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )


def port_of(process: Process) -> tuple[str, int]:
    return "127.0.0.1", int(process.url.rsplit(":", 1)[1])


def bootstrap_port(service: Service) -> tuple[str, int]:
    return "127.0.0.1", int(info(service.processes["prefill"])["disaggregation_bootstrap_port"])


def transfer_port(service: Service) -> tuple[str, int]:
    host, port = bootstrap_port(service)
    with urlopen(f"http://{host}:{port}/route?engine_rank=0&target_dp_group=0&target_pp_rank=0", timeout=10) as answer:
        return "127.0.0.1", int(json.loads(answer.read())["rank_port"])


def frames(*messages: Frame) -> bytes:
    return b"".join(map(encode, messages))


def hello(layout: PageLayout = WRONG) -> Hello:
    return Hello(PROTOCOL_VERSION, "stranger", layout)


GARBAGE = {
    "noise": bytes(range(256)) * 300,
    "half a frame": struct.pack("<I", 5000) + b"x" * 100,
    "length of 4 GiB": b"\xff\xff\xff\xff" + b"x" * 1000,
    "length of zero": b"\0\0\0\0",
    "http": b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    "wrong layout": frames(hello()),
    "wrong version": frames(Hello(99, "stranger", WRONG)),
    "a notice before hello": frames(Notice(1, 1, 0, 4)),
    "hello and mode at once": frames(hello(), Mode("tcp"), Notice(1, 1, 0, 4)),
    "cancel of nothing": frames(Cancel(7, "why not")),
    "nothing": b"",
}


def send_all(address: tuple[str, int], payload: bytes, stack: contextlib.ExitStack) -> socket.socket:
    connection = stack.enter_context(socket.create_connection(address, timeout=20))
    with contextlib.suppress(ConnectionError):  # refused while we still send: as good
        connection.sendall(payload)
    return connection


def ended(connection: socket.socket) -> bool:
    """The other side closes, whatever it says first."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass
    return True


def test_strangers_on_the_transfer_port_are_shown_the_door(pair: Service) -> None:
    address = transfer_port(pair)
    with contextlib.ExitStack() as stack:
        strangers = [(what, send_all(address, payload, stack)) for what, payload in GARBAGE.items() for _ in range(20)]
        served(pair, 10)
        for what, stranger in strangers:
            assert ended(stranger), what
    served(pair, 10)


def test_strangers_on_the_bootstrap_port(pair: Service) -> None:
    with contextlib.ExitStack() as stack:
        for payload in GARBAGE.values():
            send_all(bootstrap_port(pair), payload, stack)
        big = b"PUT /route HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n" + b"x" * 200_000
        assert b" 413 " in send_all(bootstrap_port(pair), big, stack).recv(1000)
        registration = b'{"role": "Prefill", "rank_ip": 7}'
        bad = b"PUT /route HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(registration) + registration
        assert b" 400 " in send_all(bootstrap_port(pair), bad, stack).recv(1000).partition(b"\r\n")[0]
        served(pair, 11)


@pytest.mark.parametrize("name", ["prefill", "decode", "router"])
def test_slow_broken_and_greedy_clients_take_neither_service_nor_memory(pair: Service, name: str) -> None:
    process = pair.processes[name]
    address = port_of(process)
    before = memory_kib(process)
    post = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    big_head = b"GET /health HTTP/1.1\r\nx: " + b"a" * (4 << 20)
    with contextlib.ExitStack() as stack:
        for index in range(NUM_SOCKETS):  # they stay open: slow heads, slow bodies, silent ones
            send_all(address, [b"", post, post + b"content-length: 9999\r\n\r\n{"][index % 3], stack)
        for index in range(NUM_SOCKETS):  # half-closed in the middle of something
            half = send_all(address, [b"", post, post + b"content-length: 9999\r\n\r\n{"][index % 3], stack)
            half.shutdown(socket.SHUT_WR)
        for _ in range(8):
            assert ended(send_all(address, big_head, stack))
        too_large = send_all(address, post + b"content-length: 99999999999\r\n\r\n" + b"x" * (40 << 20), stack)
        assert b" 413 " in too_large.recv(1000)
        served(pair, 12)
        growth = memory_kib(process) - before
        assert growth < MEMORY_GROWTH_KIB, f"{name} grew by {growth} KiB"
    served(pair, 12)


def test_a_thousand_streams_at_once_all_end_well(pair: Service) -> None:
    """Routers are known to fall over at this number of connections."""
    url = pair.processes["router"].url
    kinds = [body(24, seed, stream=True, max_new_tokens=3) for seed in range(20, 24)]
    clients = [Client(url, kinds[index % len(kinds)]).start() for index in range(1000)]
    ends = [client.end(within_s=100) for client in clients]
    assert ends == ["answer"] * len(clients), {client.problem for client in clients if client.problem}
    for index, client in enumerate(clients):
        assert client.answer["text"] == clients[index % len(kinds)].answer["text"]
    at_rest(pair)
    until("no request is in progress", lambda: pair.processes["router"].get("/readiness")[0] == 200)
