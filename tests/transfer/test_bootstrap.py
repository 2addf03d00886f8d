"""The bootstrap server speaks SGLang's protocol to the status and the text."""

import asyncio
import http.client
import json

import pytest
from tests.fakes.transfer_pair import bootstrap_server

from baton.transfer.bootstrap import Registration, look_up, register
from baton.transfer.errors import TransferError
from baton.transfer.slices import Slice

ENTRY = {
    "role": "Prefill", "attn_tp_size": 1, "attn_tp_rank": 0, "attn_dp_size": 1, "attn_dp_rank": 0, "pp_size": 1,
    "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0, "rank_ip": "10.0.0.1", "rank_port": 4711,
}  # fmt: skip
ALL = "/route?engine_rank=-1&target_dp_group=-1&target_pp_rank=-1"
RANK_0 = "/route?engine_rank=0&target_dp_group=0&target_pp_rank=0"


def call(port: int, method: str, target: str, body: bytes | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, target, body)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def put(port: int, **changes: object) -> tuple[int, str]:
    return call(port, "PUT", "/route", json.dumps(ENTRY | changes).encode())


def test_register_and_look_up() -> None:
    with bootstrap_server() as port:
        assert call(port, "GET", "/health") == (200, "OK")
        assert call(port, "GET", RANK_0) == (404, "Bootstrap info not Found")
        assert put(port, attn_tp_size=2) == (200, "OK")
        assert put(port, attn_tp_size=2, attn_tp_rank=1, rank_port=4712) == (200, "OK")
        sizes = {"prefill_attn_tp_size": 2, "prefill_dp_size": 1, "prefill_pp_size": 1}
        assert json.loads(call(port, "GET", ALL)[1]) == sizes
        assert json.loads(call(port, "GET", RANK_0)[1]) == {"rank_ip": "10.0.0.1", "rank_port": 4711}
        assert call(port, "GET", RANK_0.replace("engine_rank=0", "engine_rank=2")) == (404, "Bootstrap info not Found")


def test_a_restarted_rank_replaces_its_entry_and_new_sizes_replace_all() -> None:
    with bootstrap_server() as port:
        put(port, attn_tp_size=2, attn_tp_rank=1)
        put(port)
        put(port, rank_port=5000)
        assert json.loads(call(port, "GET", RANK_0)[1])["rank_port"] == 5000
        assert call(port, "GET", RANK_0.replace("engine_rank=0", "engine_rank=1"))[0] == 404


@pytest.mark.parametrize(
    ("system_dp_size", "group"), [(1, 3), (4, 2)], ids=["attention data parallelism", "system data parallelism"]
)
def test_data_parallel_groups(system_dp_size: int, group: int) -> None:
    with bootstrap_server() as port:
        put(port, attn_dp_size=4, attn_dp_rank=3, system_dp_size=system_dp_size, system_dp_rank=2)
        assert call(port, "GET", RANK_0.replace("group=0", f"group={group}"))[0] == 200
        assert json.loads(call(port, "GET", ALL)[1])["prefill_dp_size"] == 4


@pytest.mark.parametrize(
    ("method", "target", "body", "status", "text"),
    [
        ("GET", "/route", None, 400, "Missing inputs for bootstrap server."),
        ("GET", "/route?engine_rank=0&target_dp_group=0", None, 400, "Missing inputs for bootstrap server."),
        ("GET", RANK_0.replace("rank=0", "rank=x", 1), None, 400, "engine_rank must be an integer, got 'x'."),
        ("PUT", "/route", b"{", 400, "Bad registration"),
        ("PUT", "/route", b"\xff", 400, "Bad registration"),
        ("PUT", "/route", json.dumps(ENTRY | {"rank_port": "x"}).encode(), 400, "rank_port"),
        ("PUT", "/route", json.dumps({"role": "Prefill"}).encode(), 400, "attn_tp_size"),
        ("PUT", "/route", b" " * 70_000, 413, "larger than"),
        ("POST", "/route", b"{}", 405, ""),
        ("DELETE", "/route", None, 405, ""),
    ],
)
def test_bad_requests(method: str, target: str, body: bytes | None, status: int, text: str) -> None:
    with bootstrap_server() as port:
        answer = call(port, method, target, body)
        assert answer[0] == status
        assert text in answer[1]
        assert call(port, "GET", "/health") == (200, "OK")


async def test_look_up_explains_what_is_wrong() -> None:
    with bootstrap_server() as port:
        with pytest.raises(TransferError, match="no prefill rank has registered yet"):
            (await look_up("127.0.0.1", port)).need_all()
        await register("127.0.0.1", port, Registration(**ENTRY))  # type: ignore[arg-type]
        (alone,) = (await look_up("127.0.0.1", port)).ranks
        assert (alone.rank_port, alone.slice) == (4711, None)
        for pp_rank in (1, 0):
            entry = ENTRY | {
                "attn_tp_size": 2,
                "attn_tp_rank": 1,
                "pp_size": 2,
                "pp_rank": pp_rank,
                "rank_port": pp_rank,
            }
            await register("127.0.0.1", port, Registration(**entry, slice=Slice((0, 1), (1, 2))))  # type: ignore[arg-type]
        with pytest.raises(TransferError, match="only 2 of 4 prefill ranks have registered yet"):
            (await look_up("127.0.0.1", port)).need_all()
        for pp_rank in (0, 1):
            entry = ENTRY | {"attn_tp_size": 2, "pp_size": 2, "pp_rank": pp_rank, "rank_port": 2 + pp_rank}
            await register("127.0.0.1", port, Registration(**entry))  # type: ignore[arg-type]
        found = await look_up("127.0.0.1", port)
        found.need_all()
        ranks = found.ranks
        assert [rank.rank_port for rank in ranks] == [2, 0, 3, 1], "stage after stage"
        assert ranks[1].slice == Slice((0, 1), (1, 2))
        with pytest.raises(TransferError, match="no prefill rank"):
            (await look_up("127.0.0.1", port, dp_group=1)).need_all()
        assert call(port, "GET", "/ranks?target_dp_group=x")[0] == 400
    with pytest.raises(OSError):
        await look_up("127.0.0.1", port)


async def test_a_worker_of_an_older_version_is_named() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nNot Found")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1") as server:
        with pytest.raises(TransferError, match="the prefill worker is of another version than this one"):
            await look_up("127.0.0.1", server.sockets[0].getsockname()[1])
