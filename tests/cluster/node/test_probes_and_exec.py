"""Probes, hooks, exec, attach and ports of running containers, in plain isolation (both share this code)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.fakes.node_bed import NODE, NodeBed, eventually, node_bed, pod

from baton.cluster.node import shim
from baton.cluster.node_connector import LogOptions, NodeError
from baton.cluster_client.resources import NODES, PODS

FILES = {
    "volumeMounts": [{"name": "work", "mountPath": "/scratch"}],
    "volumes": [{"name": "work", "emptyDir": {}}],
}


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[NodeBed]:
    async for one in node_bed(tmp_path / "home", "plain"):
        yield one


def execute(*command: str, **timing: int) -> dict[str, object]:
    return {"exec": {"command": list(command)}, "periodSeconds": 1, **timing}


async def run_in(bed: NodeBed, name: str, *command: str) -> tuple[str, str, int]:
    """stdout, stderr, exit code."""
    assert bed.agent is not None
    session = await bed.agent.connector.exec("default", name, "main", list(command), stdin=False, tty=False)
    out = {1: b"", 2: b""}
    try:
        async for channel, data in session.output():
            out[channel] += data
        return out[1].decode(), out[2].decode(), await session.wait()
    finally:
        await session.close()


async def test_readiness_follows_its_probe_both_ways(bed: NodeBed) -> None:
    probe = execute("test", "-e", "/scratch/ready", failureThreshold=1)
    await bed.create(pod("turns", "sleep", "60", readinessProbe=probe, **FILES))
    await bed.until_phase("turns", "Running")
    await bed.api.until(lambda: any(reason == "Unhealthy" for reason, _ in bed.api.events()))
    assert not bed.container("turns")["ready"]
    await run_in(bed, "turns", "touch", "/scratch/ready")
    await bed.until_ready("turns")
    await run_in(bed, "turns", "rm", "/scratch/ready")
    await bed.api.until(lambda: not bed.container("turns")["ready"])
    assert bed.container("turns")["restartCount"] == 0


async def test_a_failed_liveness_probe_restarts_the_container(bed: NodeBed) -> None:
    probe = execute("test", "!", "-e", "/scratch/sick", failureThreshold=2)
    script = "rm -f /scratch/sick; touch /scratch/up; exec sleep 60"
    await bed.create(pod("sick", "sh", "-c", script, livenessProbe=probe, terminationGracePeriodSeconds=1, **FILES))
    await bed.until_ready("sick")

    async def is_up() -> bool:
        return (await run_in(bed, "sick", "test", "-e", "/scratch/up"))[2] == 0

    await eventually(is_up)
    await run_in(bed, "sick", "touch", "/scratch/sick")
    await bed.api.until(lambda: bed.container("sick").get("restartCount") == 1)
    assert "Container main failed liveness probe, will be restarted" in [message for _, message in bed.api.events()]


async def test_nothing_is_ready_before_the_startup_probe_passed(bed: NodeBed) -> None:
    probe = execute("test", "-e", "/scratch/up", failureThreshold=1000)
    await bed.create(pod("slow", "sleep", "60", startupProbe=probe, **FILES))
    await bed.until_phase("slow", "Running")
    await bed.api.until(lambda: any("Startup probe failed" in message for _, message in bed.api.events()))
    assert (bed.container("slow")["ready"], bed.container("slow")["started"]) == (False, False)
    await run_in(bed, "slow", "touch", "/scratch/up")
    await bed.until_ready("slow")
    assert bed.container("slow")["started"]


async def test_http_probes_ask_the_pods_address(bed: NodeBed) -> None:
    script = "mkdir -p d/health; cd d; exec python3 -m http.server 8000"
    ports = [{"name": "http", "containerPort": 8000}]
    good = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 1}
    bad = {"httpGet": {"path": "/none", "port": 8000}, "periodSeconds": 1, "failureThreshold": 1000}
    await bed.create(pod("good", "sh", "-c", script, image="python:3", ports=ports, readinessProbe=good))
    await bed.create(pod("bad", "sh", "-c", script, image="python:3", ports=ports, readinessProbe=bad))
    await bed.until_ready("good")
    failed = "Readiness probe failed: HTTP probe failed with statuscode: 404"
    await bed.api.until(lambda: ("Unhealthy", failed) in bed.api.events())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "readinessProbe",
            {"grpc": {"port": 1}},
            "spec.containers.main.readinessProbe.grpc: not supported by this node",
        ),
        ("livenessProbe", {"tcpSocket": {"port": "web"}}, "container has no port named 'web'"),
        ("lifecycle", {"preStop": {"tcpSocket": {"port": 1}}}, "spec.containers.main.lifecycle.preStop: wants one of"),
        ("volumeMounts", [{"name": "none", "mountPath": "/x"}], 'mounts volume "none", which the pod does not have'),
        ("envFrom", [{"secretRef": {"name": "none"}}], 'secret "none" not found'),
    ],
)
async def test_what_this_node_cannot_do_is_refused_by_name(
    bed: NodeBed, field: str, value: object, message: str
) -> None:  # fmt: skip
    await bed.create(pod("refused", "sleep", "60", **{field: value}))
    await bed.api.until(lambda: bed.container("refused").get("state", {}).get("waiting", {}).get("message"))
    waiting = bed.container("refused")["state"]["waiting"]
    assert waiting["reason"] == "CreateContainerConfigError"
    assert message in waiting["message"]


async def test_hooks_run_after_the_start_and_before_the_end(bed: NodeBed, tmp_path: Path) -> None:
    lifecycle = {
        "postStart": {"exec": {"command": ["sh", "-c", "echo start >> /out/hooks"]}},
        "preStop": {"exec": {"command": ["sh", "-c", "echo stop >> /out/hooks"]}},
    }
    await bed.create(
        pod(
            "hooks", "sleep", "60", lifecycle=lifecycle, volumeMounts=[{"name": "out", "mountPath": "/out"}],
            volumes=[{"name": "out", "hostPath": {"path": str(tmp_path)}}],
        )
    )  # fmt: skip
    await bed.until_ready("hooks")
    await bed.api.delete(PODS, "hooks", "default")
    await bed.api.until(lambda: bed.api.pod("hooks") is None)
    assert (tmp_path / "hooks").read_text() == "start\nstop\n"


async def test_exec_has_the_containers_view_and_its_own_code(bed: NodeBed) -> None:
    await bed.create(pod("box", "sleep", "60", env=[{"name": "WHO", "value": "me"}], **FILES))
    await bed.until_ready("box")
    assert await run_in(bed, "box", "sh", "-c", "echo $WHO; echo no >&2; exit 3") == ("me\n", "no\n", 3)
    assert await run_in(bed, "box", "sh", "-c", "kill -9 $$") == ("", "", 137)
    with pytest.raises(NodeError, match="no-such-program"):
        await run_in(bed, "box", "no-such-program")
    with pytest.raises(NodeError) as caught:
        await bed.agent.connector.exec("default", "box", "other", ["true"], stdin=False, tty=False)  # type: ignore[union-attr]
    assert caught.value.code == 404


async def test_exec_with_input_and_with_a_terminal(bed: NodeBed) -> None:
    await bed.create(pod("box", "sleep", "60"))
    await bed.until_ready("box")
    assert bed.agent is not None
    session = await bed.agent.connector.exec("default", "box", "main", ["cat"], stdin=True, tty=False)
    await session.write_stdin(b"through")
    await session.close_stdin()
    assert [data async for _, data in session.output()] == [b"through"]
    assert await session.wait() == 0
    await session.close()
    terminal = await bed.agent.connector.exec(
        "default", "box", "main", ["sh", "-c", "read x; stty size"], stdin=True, tty=True
    )
    await terminal.resize(101, 37)
    await terminal.write_stdin(b"\n")
    said = b"".join([data async for _, data in terminal.output()])
    assert b"37 101" in said
    assert await terminal.wait() == 0
    await terminal.close()
    await terminal.close()


async def test_attach_and_follow_end_with_the_container(bed: NodeBed) -> None:
    await bed.create(pod("talks", "sh", "-c", "echo one; until [ -e /scratch/go ]; do sleep 0.02; done; echo two",
                         restartPolicy="Never", **FILES))  # fmt: skip
    await bed.until_ready("talks")
    assert bed.agent is not None
    connector = bed.agent.connector
    session = await connector.attach("default", "talks", "main", stdin=False, tty=False)
    following = asyncio.create_task(bed.log("talks", follow=True))
    await run_in(bed, "talks", "touch", "/scratch/go")
    assert await asyncio.wait_for(following, 20) == "one\ntwo\n"
    assert await asyncio.wait_for(_collect(session), 20) == b"two\n", "what it said before anyone listened too"
    with pytest.raises(NodeError, match='previous terminated container "main"'):
        [part async for part in connector.logs("default", "talks", "main", LogOptions(previous=True))]


async def _collect(session: object) -> bytes:
    return b"".join([data async for _, data in session.output()])  # type: ignore[attr-defined]


async def test_a_connection_to_a_port_of_the_pod(bed: NodeBed) -> None:
    probe = {"tcpSocket": {"port": 8000}, "periodSeconds": 1}
    await bed.create(pod("web", "python3", "-m", "http.server", "8000", image="python:3", readinessProbe=probe))
    await bed.until_ready("web")
    assert bed.agent is not None
    reader, writer = await bed.agent.connector.connect("default", "web", 8000)
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.0 200 OK")
    writer.close()
    await writer.wait_closed()
    with pytest.raises(NodeError, match="nothing listens on port 8001"):
        await bed.agent.connector.connect("default", "web", 8001)


async def test_a_killed_supervisor_leaves_nothing_behind(bed: NodeBed, tmp_path: Path) -> None:
    script = "setsid sleep 88 & echo $! > /out/child; exec sleep 60"
    await bed.create(
        pod(
            "lost", "sh", "-c", script, volumeMounts=[{"name": "out", "mountPath": "/out"}],
            volumes=[{"name": "out", "hostPath": {"path": str(tmp_path)}}],
        )
    )  # fmt: skip
    await bed.until_ready("lost")
    await eventually(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text() != "")
    child = int((tmp_path / "child").read_text())
    state = next((bed.config.home / "node" / "slots").glob("*/containers/main/1/state.json"))
    os.kill(json.loads(state.read_text())["shim_pid"], signal.SIGKILL)
    await bed.api.until(lambda: bed.container("lost").get("restartCount") == 1)
    assert bed.container("lost")["lastState"]["terminated"]["reason"] == "ContainerStatusUnknown"
    await eventually(lambda: shim.start_time(child) is None)


async def test_nodes_offer_what_pods_ask_for(bed: NodeBed) -> None:
    node = bed.api.objects[NODES.full_name, None, NODE]
    assert node["status"]["capacity"]["nvidia.com/gpu"] == "8"
    ready = next(one for one in node["status"]["conditions"] if one["type"] == "Ready")
    assert ready["status"] == "True"
    waiting = pod("pending", "true", resources={"limits": {"example.com/npu": 2}})
    del waiting["spec"]["nodeName"]
    await bed.create(waiting)

    def capacity() -> bool:
        return "example.com/npu" in bed.api.objects[NODES.full_name, None, NODE]["status"]["capacity"]

    await bed.api.until(capacity)


async def test_what_a_manifest_asks_in_vain_is_told_once(bed: NodeBed) -> None:
    spec = {"volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "15Gi"}}], "hostNetwork": True}
    await bed.create(pod("vain", "sleep", "60", resources={"limits": {"cpu": "4"}}, **spec))
    await bed.until_ready("vain")
    await bed.api.until(lambda: any(reason == "NotEnforced" for reason, _ in bed.api.events()))
    message = next(message for reason, message in bed.api.events() if reason == "NotEnforced")
    for part in ("volume shm: sizeLimit 15Gi", "spec.hostNetwork", "container main: resources.limits"):
        assert part in message
