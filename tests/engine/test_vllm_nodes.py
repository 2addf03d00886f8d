"""Nodes that gather without Ray: who joins, who leads, and what everybody hears when one of them goes."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton.engine.vllm import multi_node
from baton.engine.vllm.cluster import (
    ClusterError,
    Count,
    Ended,
    Lead,
    Message,
    Nodes,
    Start,
    decode,
    encode,
    known_head,
    remember_head,
)
from baton.engine.vllm.head import Head
from baton.engine.vllm.member import Member

NODE = """
import os, pathlib, sys, time
directory, parent, *flags = sys.argv[1:]
mine = pathlib.Path(directory) / str(os.getpid())
mine.write_text(" ".join(flags))
while mine.exists():
    time.sleep(0.01)
sys.exit(3)
"""


@dataclass
class Peer:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, message: Message) -> None:
        self.writer.write(encode(message))

    async def receive(self) -> Message:
        return decode(await asyncio.wait_for(self.reader.readline(), 10), "the head")


@dataclass
class Bed:
    """A head with members whose nodes are small programs: each writes its flags to a file, and ends when that is removed."""

    port: int
    nodes: Path
    members: list[asyncio.Task[None]]
    peers: list[Peer]

    def join(self) -> None:
        command = (sys.executable, "-S", "-c", NODE, str(self.nodes))
        self.members.append(asyncio.create_task(Member("127.0.0.1", self.port, command).run()))

    async def connect(self) -> Peer:
        self.peers.append(Peer(*await asyncio.open_connection("127.0.0.1", self.port)))
        return self.peers[-1]

    async def count(self) -> int:
        peer = await self.connect()
        peer.send(Count())
        answer = await peer.receive()
        assert isinstance(answer, Nodes)
        return answer.num_nodes

    async def until_count(self, wanted: int) -> None:
        async with asyncio.timeout(10):
            while await self.count() != wanted:  # noqa: ASYNC110  (it is asked over a socket)
                await asyncio.sleep(0.005)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110  (it is another process's state)
                await asyncio.sleep(0.005)

    def started(self) -> list[str]:
        return sorted(one.read_text() for one in self.nodes.iterdir())


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    head = asyncio.create_task(Head().serve("127.0.0.1", 0, ready.set_result))
    one = Bed(await asyncio.wait_for(ready, 10), tmp_path, [], [])
    yield one
    for peer in one.peers:
        peer.writer.close()
        with contextlib.suppress(OSError):
            await peer.writer.wait_closed()
    for task in (*one.members, head):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ClusterError):
            await task


async def test_a_server_leads_the_nodes_that_joined(bed: Bed) -> None:
    bed.join()
    bed.join()
    await bed.until_count(3)
    leader = await bed.connect()
    leader.send(Lead())
    assert await leader.receive() == Nodes(3, "127.0.0.1")
    leader.send(Start(["--model-path=/m"], num_workers=2))
    await bed.until(lambda: bed.started() == ["--model-path=/m --node-rank=1", "--model-path=/m --node-rank=2"])
    second = await bed.connect()
    second.send(Lead())
    assert await second.receive() == Ended("another server leads these nodes")


async def test_the_leader_hears_of_a_node_that_ends(bed: Bed) -> None:
    bed.join()
    await bed.until_count(2)
    leader = await bed.connect()
    leader.send(Lead())
    await leader.receive()
    leader.send(Start(["--a=b"]))
    await bed.until(lambda: bed.started())
    next(bed.nodes.iterdir()).unlink()
    heard = await leader.receive()
    assert isinstance(heard, Ended)
    assert heard.reason.endswith("ended: status 3")
    assert await bed.count() == 2, "the worker itself is still there, for the next server"


async def test_the_leader_hears_of_a_worker_that_is_gone(bed: Bed) -> None:
    bed.join()
    await bed.until_count(2)
    leader = await bed.connect()
    leader.send(Lead())
    await leader.receive()
    leader.send(Start(["--a=b"]))
    await bed.until(lambda: bed.started())
    bed.members[0].cancel()
    heard = await leader.receive()
    assert isinstance(heard, Ended)
    assert heard.reason.endswith("is gone")
    await bed.until_count(1)


async def test_nodes_end_with_their_leader_and_serve_the_next(bed: Bed) -> None:
    bed.join()
    await bed.until_count(2)
    for number in (1, 2):
        leader = await bed.connect()
        leader.send(Lead())
        assert await leader.receive() == Nodes(2, "127.0.0.1")
        leader.send(Start([f"--number={number}"]))
        await bed.until(lambda: bed.started() == [f"--number={number} --node-rank=1"])  # noqa: B023
        [node] = bed.nodes.iterdir()
        leader.writer.close()
        await bed.until(lambda: not Path(f"/proc/{node.name}").exists())  # noqa: B023
        node.unlink()


async def test_too_few_nodes_are_said(bed: Bed) -> None:
    leader = await bed.connect()
    leader.send(Lead())
    assert await leader.receive() == Nodes(1)
    leader.send(Start([], num_workers=1))
    assert await leader.receive() == Ended("1 nodes are left")


async def test_nonsense_is_no_node(bed: Bed) -> None:
    stranger = await bed.connect()
    stranger.writer.write(b"GET / HTTP/1.1\r\n\r\n")
    assert await asyncio.wait_for(stranger.reader.read(), 10) == b""
    assert await bed.count() == 1


async def test_a_member_without_a_head_says_where_it_looked(unused_tcp_port: int) -> None:
    with pytest.raises(ClusterError, match=f"the head at 127.0.0.1:{unused_tcp_port} cannot be reached"):
        await Member("127.0.0.1", unused_tcp_port).run()


def test_a_head_is_found_again_by_its_own_user_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert known_head() is None
    remember_head(1234)
    assert known_head() == 1234
    [directory] = tmp_path.iterdir()
    assert directory.stat().st_mode & 0o077 == 0
    stranger = directory.stat().st_uid + 1
    directory.rename(tmp_path / f"baton-nodes-{stranger}")
    monkeypatch.setattr("os.getuid", lambda: stranger)
    assert known_head() is None


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "unknown subcommand: "),
        ("chief", "unknown subcommand: chief"),
        ("leader", "Error: Missing argument --ray_cluster_size"),
        ("leader --ray_cluster_size=", "Error: Missing argument --ray_cluster_size"),
        ("leader --ray_cluster_size=two", "Error: --ray_cluster_size must be a whole number, got 'two'"),
        ("worker --ray_cluster_size=2", "Error: Missing argument --ray_address"),
        ("worker --ray_address=h --ray_port=x", "Error: --ray_port must be a whole number, got 'x'"),
        ("worker --ray_address=h --ray_port=99999", "Error: --ray_port must be at most 65535, got '99999'"),
    ],
)
def test_the_scripts_errors(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert multi_node.main(command.split()) == 1
    assert capsys.readouterr().out == message + "\n"


def test_the_scripts_options() -> None:
    options = multi_node.parse(
        "worker", ["--ray_address=[::1]", "--ray_port=7", "--ray_init_timeout=9", "--num-cpus=1"]
    )
    assert (options.address, options.port, options.init_timeout_s, options.others) == ("::1", 7, 9.0, ("--num-cpus=1",))
    options = multi_node.parse("leader", ["--ray_cluster_size=2"])
    assert (options.cluster_size, options.port, options.init_timeout_s) == (2, 6379, 300.0)


def test_a_worker_without_a_leader_gives_up(unused_tcp_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        multi_node.main(["worker", "--ray_address=127.0.0.1", f"--ray_port={unused_tcp_port}", "--ray_init_timeout=0"])
        == 1
    )
    assert capsys.readouterr().out == f"Ray worker starts timeout, head address: 127.0.0.1:{unused_tcp_port}\n"
