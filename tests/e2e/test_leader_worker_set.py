"""LeaderWorkerSet as its users see it: a real kubectl, cheap containers that find each other by the set's own variables."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.e2e.cluster_bed import Cluster, cluster, kill, until

LEADER = """
import os, socket
server = socket.create_server((os.environ["POD_IP"], 8000))
joined = set()
while True:
    peer, _ = server.accept()
    word = peer.recv(100).decode()
    if word.startswith("join"):
        joined.add(word)
        print("joined", word, flush=True)
    peer.sendall(f"{os.environ['VERSION']} {len(joined)} of {os.environ['LWS_GROUP_SIZE']}".encode())
    peer.close()
"""
WORKER = """
import os, socket, time
print("looking for", os.environ["LWS_LEADER_ADDRESS"], flush=True)
while True:
    try:
        with socket.create_connection((os.environ["LWS_LEADER_ADDRESS"], 8000), timeout=5) as leader:
            leader.sendall(("join " + os.environ["LWS_WORKER_INDEX"]).encode())
            print("leader says", leader.recv(100).decode(), flush=True)
            break
    except OSError:
        time.sleep(0.1)
time.sleep(10000)
"""


def container(name: str, program: str) -> dict[str, Any]:
    env = [
        {"name": "VERSION", "value": "one"},
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]
    return {"name": name, "image": "python:3.12", "command": ["python3", "-c", program], "env": env}


def template(main: dict[str, Any], **labels: str) -> dict[str, Any]:
    return {"metadata": {"labels": labels}, "spec": {"terminationGracePeriodSeconds": 1, "containers": [main]}}


def manifest() -> str:
    probed = {**container("leader", LEADER), "readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1}}
    found = {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": "pair"},
        "spec": {
            "replicas": 2,
            "leaderWorkerTemplate": {
                "size": 2,
                "leaderTemplate": template(probed, role="leader", serves="pair"),
                "workerTemplate": template(container("worker", WORKER)),
            },
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "front"},
        "spec": {"selector": {"role": "leader", "serves": "pair"}, "ports": [{"port": 8000}]},
    }
    return yaml.safe_dump_all([found, service])


def uids(one: Cluster) -> dict[str, str]:
    return {item["metadata"]["name"]: item["metadata"]["uid"] for item in one.get("pods")["items"]}


def ask(one: Cluster) -> str:
    """What a leader behind the Service answers; empty when none does."""
    address = one.get("service", "front")["spec"]["clusterIP"]
    try:
        with socket.create_connection((address, 8000), timeout=2) as leader:
            leader.sendall(b"ask")
            return leader.recv(100).decode()
    except OSError:
        return ""


def is_settled(one: Cluster, groups: int) -> bool:
    found = one.get("lws", "pair")
    status = found.get("status") or {}
    conditions = {entry["type"]: entry["status"] for entry in status.get("conditions", [])}
    counts = (status.get("replicas"), status.get("readyReplicas"), status.get("updatedReplicas"))
    seen = status.get("observedGeneration") == found["metadata"]["generation"]
    return bool(seen and conditions.get("Available") == "True" and counts == (groups,) * 3)


@pytest.mark.timeout(120)
def test_the_whole_story_of_a_set_with_kubectl(tmp_path: Path) -> None:
    with cluster(tmp_path / "home") as one:
        one.baton("up")
        one.use_env()
        create_and_look(one)
        scale(one)
        update_and_undo(one)
        kill_a_worker(one)
        refuse_what_is_wrong(one)
        delete(one)


def create_and_look(one: Cluster) -> None:
    assert "leaderworkerset.leaderworkerset.x-k8s.io/pair created" in one.kubectl("create", "-f", "-", stdin=manifest())
    one.kubectl("wait", "--for=condition=Available", "lws/pair", "--timeout=60s")
    assert list(uids(one)) == ["pair-0", "pair-0-1", "pair-1", "pair-1-1"]
    head, row = one.kubectl("get", "lws").splitlines()
    assert head.split() == ["NAME", "READY", "DESIRED", "UP-TO-DATE", "AGE"]
    assert row.split()[:4] == ["pair", "2", "2", "2"]
    until(lambda: ask(one) == "one 1 of 2", "the worker has joined its leader")
    assert "looking for pair-1.pair.default" in one.kubectl("logs", "pair-1-1")
    conditions = {entry["type"]: entry for entry in one.get("pod", "pair-0")["status"]["conditions"]}
    assert "reason" not in conditions["Ready"], "why it was not ready for a while is over"
    assert one.get("service", "pair")["spec"]["clusterIP"] == "None"
    assert "All replicas are ready, with 2 groups ready of total 2 groups" in one.kubectl("describe", "lws", "pair")


def scale(one: Cluster) -> None:
    before = uids(one)
    assert "scaled" in one.kubectl("scale", "lws", "pair", "--replicas=3")
    until(lambda: is_settled(one, 3), "three groups")
    assert {name: uid for name, uid in uids(one).items() if name in before} == before, "nobody else was touched"
    path = "/apis/leaderworkerset.x-k8s.io/v1/namespaces/default/leaderworkersets/pair/scale"
    found = json.loads(one.kubectl("get", "--raw", path))
    selector = found["status"]["selector"]
    assert (found["spec"]["replicas"], found["status"]["replicas"]) == (3, 3)
    leaders = one.get("pods", "-l", selector)["items"]
    assert [item["metadata"]["name"] for item in leaders] == ["pair-0", "pair-1", "pair-2"]
    one.kubectl("scale", "lws", "pair", "--replicas=2")
    until(lambda: "pair-2" not in uids(one) and "pair-2-1" not in uids(one), "the third group is gone")


def update_and_undo(one: Cluster) -> None:
    before = uids(one)
    path = "/spec/leaderWorkerTemplate/leaderTemplate/spec/containers/0/env/0/value"
    change = json.dumps([{"op": "replace", "path": path, "value": "two"}])
    one.kubectl("patch", "lws", "pair", "--type=json", "-p", change)
    until(lambda: is_settled(one, 2), "the update is through")
    assert not set(uids(one).values()) & set(before.values()), "every group was made again"
    until(lambda: ask(one) == "two 1 of 2", "the new leaders answer")
    first = min(one.get("controllerrevisions")["items"], key=lambda item: int(item["revision"]))
    old = first["data"]["spec"]["leaderWorkerTemplate"]
    undo = json.dumps([{"op": "replace", "path": "/spec/leaderWorkerTemplate", "value": old}])
    one.kubectl("patch", "lws", "pair", "--type=json", "-p", undo)
    until(lambda: is_settled(one, 2) and ask(one) == "one 1 of 2", "the old leaders answer again")


def kill_a_worker(one: Cluster) -> None:
    before = uids(one)
    for pid in one.processes("pair-1-1"):
        kill(pid)
    until(lambda: not {before["pair-1"], before["pair-1-1"]} & set(uids(one).values()), "the group is taken down")
    until(lambda: is_settled(one, 2), "the group is back")
    now = uids(one)
    assert {name for name in before if now[name] == before[name]} == {"pair-0", "pair-0-1"}
    events = one.kubectl("get", "events", "--field-selector=reason=RecreateGroup", "-o", "jsonpath={.items[*].message}")
    assert "Pod pair-1-1 restarted: container worker ended with exit code 137" in events
    assert "leader says" in one.kubectl("logs", "pair-1-1", "--previous"), "what the dead process wrote can be read"
    until(lambda: "joined join 1" in one.kubectl("logs", "pair-1"), "the new worker found the new leader")


def refuse_what_is_wrong(one: Cluster) -> None:
    patch = ("patch", "lws", "pair", "--type=merge", "-p")
    done = one.run("kubectl", *patch, '{"spec":{"leaderWorkerTemplate":{"size":0}}}', check=False)
    text = "spec.leaderWorkerTemplate.size: Invalid value: 0: size must be equal or greater than 1"
    assert done.returncode == 1 and text in done.stderr
    done = one.run(
        "kubectl", *patch, '{"spec":{"leaderWorkerTemplate":{"subGroupPolicy":{"subGroupSize":1}}}}', check=False
    )
    assert "cannot enable subGroupSize after the lws is already created" in done.stderr


def delete(one: Cluster) -> None:
    one.kubectl("delete", "lws", "pair", "--timeout=30s")
    until(lambda: not uids(one), "the pods are gone")
    assert [item["metadata"]["name"] for item in one.get("services")["items"]] == ["front"]
    assert one.get("controllerrevisions")["items"] == []
