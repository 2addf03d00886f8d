"""Pods as real processes, in both isolations: what a user of kubectl would see."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.fakes.node_bed import NodeBed, eventually, node_bed, pod

from baton.cluster.node import isolation, shim
from baton.cluster_client.resources import CONFIG_MAPS, PODS

_PROGRAM, _PROBLEM = isolation.probe()
SERVE = "python3 -m http.server 8000"


@pytest.fixture(params=["bubblewrap", "plain"])
async def bed(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[NodeBed]:
    if request.param == "bubblewrap" and _PROBLEM is not None:
        pytest.skip(_PROBLEM)
    async for one in node_bed(tmp_path / "home", request.param):
        yield one


async def test_a_command_that_ends_well_leaves_a_succeeded_pod(bed: NodeBed) -> None:
    await bed.create(pod("once", "sh", "-c", "echo hello; exit 0", restartPolicy="Never"))
    await bed.until_phase("once", "Succeeded")
    assert bed.container("once")["state"]["terminated"]["reason"] == "Completed"
    assert await bed.log("once") == "hello\n"
    assert await told(bed, "Pulled", "Created", "Started") == ["Pulled", "Created", "Started"]


async def test_a_command_that_fails_says_its_code_and_its_last_words(bed: NodeBed) -> None:
    await bed.create(pod("bad", "sh", "-c", "echo no such model >&2; exit 3", restartPolicy="Never"))
    await bed.until_phase("bad", "Failed")
    ended = bed.container("bad")["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"], ended["message"]) == (3, "Error", "no such model")


async def test_a_program_that_is_not_there_is_a_start_error(bed: NodeBed) -> None:
    await bed.create(pod("missing", "no-such-program", restartPolicy="Never"))
    await bed.until_phase("missing", "Failed")
    ended = bed.container("missing")["state"]["terminated"]
    assert ended["exitCode"] == 128
    assert ended["reason"] == "StartError"
    assert '"no-such-program": executable file not found in $PATH' in ended["message"]


async def test_a_failing_container_backs_off_and_keeps_its_previous_log(bed: NodeBed) -> None:
    await bed.create(pod("crash", "sh", "-c", "echo run; exit 1"))

    def looping() -> bool:
        state = bed.container("crash").get("state", {})
        return state.get("waiting", {}).get("reason") == "CrashLoopBackOff"

    await bed.api.until(looping)
    container = bed.container("crash")
    assert container["restartCount"] >= 1
    assert container["lastState"]["terminated"]["exitCode"] == 1
    assert "restarting failed container=main pod=crash_default(" in container["state"]["waiting"]["message"]
    assert await bed.log("crash", previous=True) == "run\n"
    assert await told(bed, "BackOff") == ["BackOff"]


async def test_pods_have_their_own_address_and_share_a_port_number(bed: NodeBed) -> None:
    for name in ("a", "b"):
        await bed.create(
            pod(name, "sh", "-c", f"echo {name} > index.html; exec {SERVE}", image="python:3", readinessProbe=tcp())
        )
    addresses = {(await bed.until_ready(name))["podIP"] for name in ("a", "b")}
    assert len(addresses) == 2
    for name in ("a", "b"):
        assert await fetch(bed.status(name)["podIP"]) == f"{name}\n"


async def test_a_pod_finds_another_by_name_once_that_is_ready(bed: NodeBed) -> None:
    await headless_service(bed, "web")
    server = pod(
        "web-0", "sh", "-c", f"echo found > index.html; exec {SERVE}", image="python:3", readinessProbe=tcp(),
        labels={"app": "web"}, hostname="web-0", subdomain="web",
    )  # fmt: skip
    code = (
        "import time, urllib.request\n"
        "while True:\n"
        "    try: print(urllib.request.urlopen('http://web-0.web:8000/').read().decode().strip()); break\n"
        "    except OSError: time.sleep(0.05)\n"
    )
    await bed.create(pod("client", "python3", "-c", code, image="python:3", restartPolicy="Never"))
    await bed.create(server)
    await bed.until_phase("client", "Succeeded")
    assert await bed.log("client") == "found\n"


async def test_variables_are_expanded_and_referenced(bed: NodeBed) -> None:
    await bed.config_map("settings", {"COLOUR": "red", "MODE": "fast"})
    await bed.create(
        pod(
            "env", "sh", "-c", "echo $(POD_IP) $(NAME) $(COLOUR) $$(NAME) $(UNKNOWN) $MODE $LIMIT $ROLE",
            restartPolicy="Never", labels={"role": "prefill"},
            resources={"limits": {"memory": "2Gi"}},
            envFrom=[{"configMapRef": {"name": "settings"}}],
            env=[
                {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "NAME", "value": "me"},
                {"name": "LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
                {"name": "ROLE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['role']"}}},
            ],
        )
    )  # fmt: skip
    status = await bed.until_phase("env", "Succeeded")
    # The shell sees $(NAME) as a command substitution: what is left unexpanded is an empty word and a complaint.
    assert f"{status['podIP']} me red fast 2048 prefill" in (await bed.log("env")).splitlines()


async def test_volumes_are_where_the_manifest_says(bed: NodeBed, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("w\n")
    await bed.config_map("config", {"config.yaml": "a: 1\n", "other": "x"})
    mounts = [
        {"name": "model", "mountPath": "/models/Qwen3-32B/"},
        {"name": "config", "mountPath": "/workspace/llm/config.yaml", "subPath": "config.yaml"},
        {"name": "config", "mountPath": "/etc/rbg"},
        {"name": "scratch", "mountPath": "/var/lib/etcd"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    volumes = [
        {"name": "model", "hostPath": {"path": str(tmp_path / "model")}},
        {"name": "config", "configMap": {"name": "config"}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "15Gi"}},
    ]
    script = (
        "cat /models/Qwen3-32B/weights /workspace/llm/config.yaml /etc/rbg/other; "
        "echo; echo kept > /var/lib/etcd/file; echo shared > /dev/shm/file; cat /var/lib/etcd/file /dev/shm/file"
    )
    await bed.create(pod("files", "sh", "-c", script, restartPolicy="Never", volumeMounts=mounts, volumes=volumes))
    await bed.until_phase("files", "Succeeded")
    assert await bed.log("files") == "w\na: 1\nx\nkept\nshared\n"
    assert not Path("/dev/shm/file").exists()


async def test_a_missing_volume_keeps_the_pod_waiting_until_it_comes(bed: NodeBed) -> None:
    wanted = pod(
        "wait", "cat", "/config/key", restartPolicy="Never",
        volumeMounts=[{"name": "config", "mountPath": "/config"}],
        volumes=[{"name": "config", "configMap": {"name": "late"}}],
    )  # fmt: skip
    await bed.create(wanted)
    await bed.api.until(lambda: any(reason == "FailedMount" for reason, _ in bed.api.events()))
    assert bed.container("wait")["state"] == {"waiting": {"reason": "ContainerCreating"}}
    message = next(message for reason, message in bed.api.events() if reason == "FailedMount")
    assert message == 'MountVolume.SetUp failed for volume "config" : configmap "late" not found'
    await bed.config_map("late", {"key": "here"})
    await bed.until_phase("wait", "Succeeded")
    assert await bed.log("wait") == "here"


async def test_a_changed_config_map_reaches_the_running_container(bed: NodeBed) -> None:
    await bed.config_map("live", {"key": "old"})
    script = "until grep -q new /config/key; do sleep 0.02; done; echo seen"
    await bed.create(
        pod(
            "live", "sh", "-c", script, restartPolicy="Never",
            volumeMounts=[{"name": "config", "mountPath": "/config"}],
            volumes=[{"name": "config", "configMap": {"name": "live"}}],
        )
    )  # fmt: skip
    await bed.until_phase("live", "Running")
    await bed.api.patch(CONFIG_MAPS, "live", "default", {"data": {"key": "new"}})
    await bed.until_phase("live", "Succeeded")


async def test_init_containers_run_one_after_the_other_before_the_rest(bed: NodeBed) -> None:
    share = [{"name": "work", "mountPath": "/scratch"}]
    init = [
        {
            "name": name,
            "image": "busybox",
            "command": ["sh", "-c", f"echo {name} >> /scratch/order"],
            "volumeMounts": share,
        }
        for name in ("one", "two")
    ]
    await bed.create(
        pod(
            "init", "cat", "/scratch/order", restartPolicy="Never", initContainers=init, volumeMounts=share,
            volumes=[{"name": "work", "emptyDir": {}}],
        )
    )  # fmt: skip
    status = await bed.until_phase("init", "Succeeded")
    assert await bed.log("init") == "one\ntwo\n"
    assert {one["type"]: one["status"] for one in status["conditions"]}["Initialized"] == "True"


async def test_a_new_image_restarts_the_container_in_the_same_slot(bed: NodeBed) -> None:
    script = "echo x >> /data/starts; exec sleep 60"
    await bed.create(
        pod(
            "inplace", "sh", "-c", script, image="busybox:1", terminationGracePeriodSeconds=2,
            volumeMounts=[{"name": "data", "mountPath": "/data"}], volumes=[{"name": "data", "emptyDir": {}}],
        )
    )  # fmt: skip
    before = await bed.until_ready("inplace")
    await starts_are(bed, "x\n")
    current = bed.api.pod("inplace")
    assert current is not None
    containers = [{**current["spec"]["containers"][0], "image": "busybox:2"}]
    await bed.api.patch(PODS, "inplace", "default", {"spec": {"containers": containers}})
    await bed.api.until(lambda: bed.container("inplace").get("restartCount") == 1 and bed.container("inplace")["ready"])
    assert bed.status("inplace")["podIP"] == before["podIP"]
    assert bed.container("inplace")["image"] == "busybox:2"
    messages = [message for _, message in bed.api.events()]
    assert "Container main definition changed, will be restarted" in messages
    assert bed.agent is not None
    await starts_are(bed, "x\nx\n")


async def test_deleting_a_pod_ends_it_gently_and_takes_the_object_away(bed: NodeBed, tmp_path: Path) -> None:
    script = "trap 'echo bye > /out/said; exit 0' TERM; echo up; while :; do sleep 0.02; done"
    await bed.create(
        pod(
            "polite", "sh", "-c", script, terminationGracePeriodSeconds=20,
            volumeMounts=[{"name": "out", "mountPath": "/out"}],
            volumes=[{"name": "out", "hostPath": {"path": str(tmp_path)}}],
        )
    )  # fmt: skip
    await bed.until_ready("polite")
    await first_words(bed, "polite", "up")
    await bed.api.delete(PODS, "polite", "default")
    await bed.api.until(lambda: bed.api.pod("polite") is None)
    assert (tmp_path / "said").read_text() == "bye\n"


async def test_a_stubborn_pod_and_its_children_are_killed_after_the_grace(bed: NodeBed, tmp_path: Path) -> None:
    script = "trap '' TERM; (trap '' TERM; exec setsid sleep 77) & echo $! > /out/child; echo up; while :; do sleep 0.05; done"
    await bed.create(
        pod(
            "stubborn", "sh", "-c", script, terminationGracePeriodSeconds=1,
            volumeMounts=[{"name": "out", "mountPath": "/out"}],
            volumes=[{"name": "out", "hostPath": {"path": str(tmp_path)}}],
        )
    )  # fmt: skip
    await bed.until_ready("stubborn")
    await first_words(bed, "stubborn", "up")
    child = int((tmp_path / "child").read_text())
    await bed.api.delete(PODS, "stubborn", "default")
    await bed.api.until(lambda: bed.api.pod("stubborn") is None)
    assert shim.start_time(child) is None


async def test_a_killed_process_is_restarted_and_its_signal_shown(bed: NodeBed) -> None:
    await bed.create(pod("victim", "sh", "-c", "echo up; exec sleep 60"))
    await bed.until_ready("victim")
    await first_words(bed, "victim", "up")
    worker = bed.agent._workers[bed.api.pod("victim")["metadata"]["uid"]]  # type: ignore[union-attr,index]
    process = worker.containers["main"].process
    assert process is not None
    process.refresh()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    await bed.api.until(lambda: bed.container("victim").get("restartCount") == 1 and bed.container("victim")["ready"])
    assert bed.container("victim")["lastState"]["terminated"]["exitCode"] == 137


async def test_the_agent_can_be_killed_and_the_next_one_adopts(bed: NodeBed) -> None:
    await bed.create(pod("stays", "sh", "-c", "exec sleep 60", image="busybox"))
    await bed.create(pod("ends", "sh", "-c", "read x < /go/fifo; exit 5", restartPolicy="Never", **_fifo(bed)))
    await bed.create(pod("orphan", "sleep", "60"))
    before = await bed.until_ready("stays")
    await bed.until_ready("ends")
    await bed.until_ready("orphan")
    await bed.kill()
    (bed.config.home / "fifo").write_text("go\n")
    await bed.api.delete(PODS, "orphan", "default", grace_period_s=0)
    await bed.start()
    await bed.until_phase("ends", "Failed")
    assert bed.container("ends")["state"]["terminated"]["exitCode"] == 5
    after = bed.status("stays")
    assert after["containerStatuses"][0]["restartCount"] == 0
    assert after["podIP"] == before["podIP"]
    assert (await run_in(bed, "stays", "echo", "alive")) == "alive\n"
    await eventually(lambda: len(list((bed.config.home / "node" / "slots").iterdir())) == 2)


def _fifo(bed: NodeBed) -> dict[str, object]:
    bed.config.home.mkdir(parents=True, exist_ok=True)
    os.mkfifo(bed.config.home / "fifo")
    return {
        "volumeMounts": [{"name": "go", "mountPath": "/go/fifo"}],
        "volumes": [{"name": "go", "hostPath": {"path": str(bed.config.home / "fifo")}}],
    }


def tcp(**timing: int) -> dict[str, object]:
    return {"tcpSocket": {"port": 8000}, "periodSeconds": 1, **timing}


async def told(bed: NodeBed, *reasons: str) -> list[str]:
    """Events are written in order but beside the status: wait for the last of them."""
    await bed.api.until(lambda: any(reason == reasons[-1] for reason, _ in bed.api.events()))
    return [reason for reason, _ in bed.api.events() if reason in reasons]


async def fetch(address: str, port: int = 8000) -> str:
    reader, writer = await asyncio.open_connection(address, port)
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    body = (await reader.read()).partition(b"\r\n\r\n")[2].decode()
    writer.close()
    await writer.wait_closed()
    return body


async def headless_service(bed: NodeBed, name: str) -> None:
    from baton.cluster_client.resources import SERVICES

    service = {
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": "None", "selector": {"app": name}},
    }
    await bed.api.create(SERVICES, service)


async def run_in(bed: NodeBed, name: str, *command: str) -> str:
    assert bed.agent is not None
    session = await bed.agent.connector.exec("default", name, "main", list(command), stdin=False, tty=False)
    try:
        return b"".join([data async for _, data in session.output()]).decode()
    finally:
        await session.close()


async def starts_are(bed: NodeBed, wanted: str) -> None:
    async def is_so() -> bool:
        return await run_in(bed, "inplace", "cat", "/data/starts") == wanted

    await eventually(is_so)


async def first_words(bed: NodeBed, name: str, words: str) -> None:
    async def are_said() -> bool:
        return words in await bed.log(name)

    await eventually(are_said)
