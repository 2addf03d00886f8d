"""The embedded cluster as its users see it: `baton up`, a real kubectl, and a client that streams through everything."""

import contextlib
import json
import threading
import urllib.parse
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import pytest
import yaml
from tests.e2e.cluster_bed import Cluster, Traffic, cluster, kill, pids_with, until
from tests.fakes.ports import free_port

EXAMPLE = Path(__file__).parents[2] / "examples" / "pd.yaml"
ISOLATIONS = ("bubblewrap", "plain")
PREFILL = "/spec/roles/1"
"""JSON path of the prefill role in the example."""


def patch(one: Cluster, *operations: str) -> None:
    # v1alpha1 as the example is written; the short name would mean v1alpha2, where templates sit elsewhere
    one.kubectl(
        "patch", "rolebasedgroups.v1alpha1.workloads.x-k8s.io", "pd", "--type=json", "-p", f"[{','.join(operations)}]"
    )


def container_of(one: Cluster, pod: str) -> dict[str, object]:
    return dict(one.get("pod", pod)["status"]["containerStatuses"][0])


def is_settled(one: Cluster, pods: int) -> bool:
    """The group is Ready in its newest generation with so many prefill pods, all of the newest template."""
    group = one.get("rbg", "pd")
    conditions = {entry["type"]: entry for entry in group["status"].get("conditions", [])}
    role = next(entry for entry in group["status"]["roleStatuses"] if entry["name"] == "prefill")
    ready = conditions.get("Ready", {})
    return (
        group["status"].get("observedGeneration") == group["metadata"]["generation"]
        and ready.get("status") == "True"
        and (role["readyReplicas"], role["updatedReplicas"]) == (pods, pods)
    )


@pytest.fixture(params=ISOLATIONS)
def isolation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(request.param)


def test_the_whole_story_with_kubectl_while_a_client_streams(demo_model: Path, tmp_path: Path, isolation: str) -> None:
    port = free_port()
    with cluster(tmp_path / "home") as one:
        started = one.baton("up", "--isolation", isolation, check=False)
        if "bwrap" in started.stderr:
            pytest.skip(started.stderr.strip())
        assert f"isolation {isolation}" in started.stdout
        one.use_env()
        create_and_look(one, port)
        with Traffic(f"http://127.0.0.1:{port}") as traffic:
            count = traffic.check()
            if isolation == "bubblewrap":
                scale_prefill(one)
                count = traffic.check(count)
                change_image_in_place(one)
                count = traffic.check(count)
            kill_a_worker(one)
            count = traffic.check(count)
            kill_the_daemon(one)
            count = traffic.check(count)
            stop_clients_at = len(traffic.texts)
        assert traffic.check(0) >= stop_clients_at
        delete_everything(one)


def test_no_acknowledged_write_is_lost_when_the_daemon_is_killed(tmp_path: Path) -> None:
    with cluster(tmp_path / "home") as one:
        kept: set[str] = set()
        for life in range(3):
            one.baton("up", "--no-wait")
            one.use_env()
            killer = threading.Timer(0.5 + 0.2 * life, kill, [one.daemon_pid])
            killer.start()
            with contextlib.suppress(OSError, HTTPException):
                for number in range(100_000):
                    name = f"life-{life}-{number}"
                    create_config_map(one, name)
                    kept.add(name)
            killer.join()
        one.baton("up", "--no-wait")
        found = {item["metadata"]["name"] for item in one.get("configmaps")["items"]}
        assert len(kept) > 50, "the test has written something"
        assert kept <= found, sorted(kept - found)[:5]


def create_config_map(one: Cluster, name: str) -> None:
    """Returns when the API server has acknowledged it; raises when no answer comes."""
    config = yaml.safe_load(Path(one.environment["KUBECONFIG"]).read_text())
    url = urllib.parse.urlsplit(config["clusters"][0]["cluster"]["server"])
    connection = HTTPConnection(str(url.hostname), url.port, timeout=5)
    try:
        body = json.dumps({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}})
        path = f"{url.path}/api/v1/namespaces/default/configmaps"
        connection.request("POST", path, body, {"content-type": "application/json"})
        assert connection.getresponse().status == 201
    finally:
        connection.close()


def create_and_look(one: Cluster, port: int) -> None:
    manifest = EXAMPLE.read_text().replace(
        "metadata:\n  name: pd\nspec:\n  type: LoadBalancer",
        f'metadata:\n  name: pd\n  annotations: {{baton.dev/publish-port: "{port}"}}\nspec:\n  type: LoadBalancer',
    )
    created = one.kubectl("create", "-f", "-", stdin=manifest)
    assert "rolebasedgroup.workloads.x-k8s.io/pd created" in created
    one.kubectl("wait", "--for=condition=Ready", "rbg/pd", "--timeout=180s")
    rows = [line.split() for line in one.kubectl("get", "pods", "-o", "wide").splitlines()]
    assert rows[0][:7] == ["NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP", "NODE"]
    assert [row[:4] for row in rows[1:]] == [
        [f"pd-{name}", "1/1", "Running", "0"] for name in ("decode-0", "prefill-0", "prefill-1", "router-0")
    ]
    assert len({row[5] for row in rows[1:]}) == 4, "each pod has an address of its own"
    described = one.kubectl("describe", "pod", "pd-prefill-0")
    assert "baton://llm" in described, "describe says what the image was mapped to"
    assert "Started container prefill" in described
    assert "/models/llm" in one.kubectl("logs", "pd-prefill-0", "--tail=-1")
    assert "AllRolesReady" in one.kubectl("describe", "rbg", "pd")


def scale_prefill(one: Cluster) -> None:
    patch(one, f'{{"op":"replace","path":"{PREFILL}/replicas","value":3}}')
    one.kubectl("wait", "--for=create", "pod/pd-prefill-2", "--timeout=120s")
    one.kubectl("wait", "--for=condition=Ready", "pod/pd-prefill-2", "--timeout=120s")


def change_image_in_place(one: Cluster) -> None:
    pods = [f"pd-prefill-{number}" for number in range(3)]
    before = {name: one.get("pod", name) for name in pods}
    path = f"{PREFILL}/template/spec/containers/0/image"
    patch(one, f'{{"op":"replace","path":"{path}","value":"lmsysorg/sglang:v0.5.7"}}')
    until(lambda: is_settled(one, 3), "every prefill pod is updated", 180)
    for name in pods:
        now = one.get("pod", name)
        assert now["metadata"]["uid"] == before[name]["metadata"]["uid"], "same pod"
        assert now["status"]["podIP"] == before[name]["status"]["podIP"], "same address"
        assert container_of(one, name)["restartCount"] == 1
        assert "definition changed, will be restarted" in one.kubectl("describe", "pod", name)
        assert container_of(one, name)["image"] == "lmsysorg/sglang:v0.5.7"


def kill_a_worker(one: Cluster) -> None:
    before = int(str(container_of(one, "pd-prefill-0")["restartCount"]))
    for pid in one.processes("pd-prefill-0"):
        kill(pid)
    until(lambda: int(str(container_of(one, "pd-prefill-0")["restartCount"])) > before, "the container is restarted")
    one.kubectl("wait", "--for=condition=Ready", "pod/pd-prefill-0", "--timeout=120s")
    assert one.kubectl("logs", "pd-prefill-0", "--previous", "--tail=1")


def kill_the_daemon(one: Cluster) -> None:
    names = [item["metadata"]["name"] for item in one.get("pods")["items"]]
    before = {name: one.processes(name) for name in names}
    restarts = {name: container_of(one, name)["restartCount"] for name in names}
    one.kubectl("create", "configmap", "witness", "--from-literal=a=b", "--dry-run=client", "-o", "yaml")
    one.kubectl("create", "-f", "-", stdin="{apiVersion: v1, kind: ConfigMap, metadata: {name: witness}, data: {a: b}}")
    kill(one.daemon_pid)
    assert one.baton("env", check=False).returncode == 1
    assert "cluster is up" in one.baton("up").stdout
    assert one.get("configmap", "witness")["data"] == {"a": "b"}, "an acknowledged write survives"
    assert {name: one.processes(name) for name in names} == before, "the pods run on, the same processes"
    assert {name: container_of(one, name)["restartCount"] for name in names} == restarts


def delete_everything(one: Cluster) -> None:
    uids = [item["metadata"]["uid"] for item in one.get("pods")["items"]]
    one.kubectl("delete", "-f", str(EXAMPLE), "--timeout=60s")
    until(lambda: not one.get("pods")["items"], "the pods are gone")
    assert [pid for uid in uids for pid in pids_with(f"BATON_CONTAINER={uid}/")] == []
    assert one.get("endpointslices")["items"] == []
