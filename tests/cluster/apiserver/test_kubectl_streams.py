"""logs, exec, attach and port-forward with the real kubectl against a fake node."""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from tests.cluster.apiserver.conftest import NS, Cluster, pod


@pytest.fixture(scope="module", autouse=True)
def running_pod(cluster: Cluster) -> Iterator[None]:
    cluster.create(f"{NS}/pods", pod("web", nodeName="n0"))
    cluster.kubectl(
        "patch", "pod", "web", "--subresource=status", "--type=merge", "-p", '{"status":{"phase":"Running"}}'
    )
    yield


def log_of(cluster: Cluster, *lines: bytes) -> None:
    log = cluster.nodes.log_of("default", "web", "c")
    log.lines[:] = lines
    log.previous[:] = [b"from before\n"]


def test_logs_prints_what_the_container_wrote(cluster: Cluster) -> None:
    log_of(cluster, b"one\n", b"two\n", b"three\n")
    assert cluster.kubectl("logs", "web") == "one\ntwo\nthree\n"
    assert cluster.kubectl("logs", "web", "--tail=1", "--timestamps").endswith("Z three\n")
    assert cluster.kubectl("logs", "web", "--previous", "--since=1h") == "from before\n"
    assert cluster.nodes.log_options[-1].since_s == 3600


def test_logs_follow_shows_lines_as_they_come_and_ends_with_the_container(cluster: Cluster) -> None:
    log_of(cluster, b"one\n")
    follower = cluster.start_kubectl("logs", "-f", "web")
    assert follower.stdout
    log = cluster.nodes.log_of("default", "web", "c")
    assert follower.stdout.readline() == "one\n"
    cluster.run(log.append(b"two\n"))
    assert follower.stdout.readline() == "two\n"
    cluster.run(log.end())
    assert follower.communicate(timeout=10) == ("", "")
    assert follower.returncode == 0
    log.ended = False


def test_a_follower_that_leaves_is_forgotten(cluster: Cluster) -> None:
    log_of(cluster, b"only\n")
    follower = cluster.start_kubectl("logs", "-f", "web")
    assert follower.stdout and follower.stdout.readline() == "only\n"
    assert cluster.nodes.followers == 1
    follower.kill()
    follower.communicate(timeout=10)
    cluster.eventually(lambda: cluster.nodes.followers == 0, "the node's reader ends")


def test_logs_of_what_does_not_exist(cluster: Cluster) -> None:
    assert "container nope is not valid for pod web" in cluster.kubectl("logs", "web", "-c", "nope", fails=True)
    assert 'pods "ghost" not found' in cluster.kubectl("logs", "ghost", fails=True)
    cluster.create(f"{NS}/pods", pod("pending"))
    assert "not scheduled yet" in cluster.kubectl("logs", "pending", fails=True)


def test_exec_returns_output_and_exit_code(cluster: Cluster) -> None:
    assert cluster.kubectl("exec", "web", "--", "echo", "hello there") == "hello there\n"
    failed = cluster.kubectl("exec", "web", "--", "sh", "-c", "echo oops >&2; exit 3", fails=True)
    assert "oops" in failed
    assert "exit code 3" in failed


def test_exec_passes_stdin_to_its_end(cluster: Cluster) -> None:
    text = "line\n" * 20_000
    out = cluster.kubectl("exec", "-i", "web", "--", "sha256sum", stdin=text)
    assert out.split()[0] == hashlib.sha256(text.encode()).hexdigest()


def test_attach_relays_both_ways(cluster: Cluster) -> None:
    out = cluster.kubectl("attach", "-i", "web", stdin="ping\n")
    assert "ping\n" in out


def test_exec_of_a_command_that_does_not_exist_says_so(cluster: Cluster) -> None:
    assert "no-such-program" in cluster.kubectl("exec", "web", "--", "no-such-program", fails=True)


BIG = bytes(range(256)) * 4096 * 5  # 5 MiB, so that frames, windows and buffers are all crossed


@asynccontextmanager
async def hashing_server() -> AsyncIterator[int]:
    """Reads `size\\n` and that many bytes, answers with their digest and BIG."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int(await reader.readline())
        body = await reader.readexactly(size)
        writer.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + BIG)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def exchange(port: int, body: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(str(len(body)).encode() + b"\n" + body)
        parts = []
        while chunk := connection.recv(1 << 16):
            parts.append(chunk)
    return b"".join(parts)


def test_port_forward_carries_large_bodies_both_ways(cluster: Cluster) -> None:
    context = hashing_server()
    cluster.nodes.ports[8000] = cluster.run(context.__aenter__())
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8000}]},
    }
    cluster.create(f"{NS}/services", service)
    forwarder = cluster.start_kubectl("port-forward", "svc/web", ":80")
    try:
        assert forwarder.stdout and forwarder.stderr
        found = re.search(r"127\.0\.0\.1:(\d+) -> 8000", forwarder.stdout.readline())
        assert found
        for body in (b"short", BIG):
            answer = exchange(int(found[1]), body)
            assert answer == hashlib.sha256(body).hexdigest().encode() + b"\n" + BIG
    finally:
        forwarder.terminate()
        forwarder.communicate(timeout=10)
        cluster.run(context.__aexit__(None, None, None))


def test_port_forward_reports_a_port_nobody_listens_on(cluster: Cluster) -> None:
    forwarder = cluster.start_kubectl("port-forward", "pod/web", ":81")
    try:
        assert forwarder.stdout and forwarder.stderr
        found = re.search(r"127\.0\.0\.1:(\d+) -> 81", forwarder.stdout.readline())
        assert found
        with socket.create_connection(("127.0.0.1", int(found[1])), timeout=20) as connection:
            assert connection.recv(1) == b""
        assert "nothing listens on port 81" in forwarder.stderr.readline() + forwarder.stderr.readline()
    finally:
        forwarder.terminate()
        forwarder.communicate(timeout=10)


def test_port_forward_to_a_pod_that_does_not_run(cluster: Cluster) -> None:
    cluster.create(f"{NS}/pods", pod("asleep"))
    assert "not running" in cluster.kubectl("port-forward", "pod/asleep", ":80", fails=True)
