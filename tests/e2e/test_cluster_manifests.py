"""Manifests that exist in the world, as they stand, and manifests with mistakes; one cluster for all of it."""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.cluster_bed import Cluster, cluster, until
from tests.e2e.service import request
from tests.fakes.ports import free_port

SHARED = Path(__file__).parents[3] / "shared" / "manifests"
"""Other people's manifests, which cannot be copied here; without them there is nothing to run."""
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no manifests beside the checkout ({SHARED})")


@pytest.fixture(scope="module")
def running(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("manifests") / "home") as one:
        one.baton("up")
        one.use_env()
        yield one


@needs_shared
def test_a_group_for_gpu_clusters_runs_with_the_commands_of_its_readme(running: Cluster) -> None:
    running.kubectl("create", "-f", str(SHARED / "llm-model.yaml"))
    running.kubectl("create", "-f", str(SHARED / "sglang_pd.yaml"))
    running.kubectl("wait", "--for=condition=Ready", "rbg/sglang-pd", "--timeout=120s")
    listed = running.kubectl("get", "pods", "-l", "rolebasedgroup.workloads.x-k8s.io/name=sglang-pd", "--no-headers")
    assert [line.split()[:4] for line in listed.splitlines()] == [
        [f"sglang-pd-{name}", "1/1", "Running", "0"] for name in ("decode-0", "prefill-0", "prefill-1", "scheduler-0")
    ]
    # The manifest has no probe for it, so its pod is Ready a moment before it listens.
    until(lambda: "listens" in running.kubectl("logs", "sglang-pd-scheduler-0"), "the load balancer listens")
    local = free_port()
    body = {
        "model": "/models/Qwen3-32B",
        "messages": [{"role": "user", "content": "test"}],
        "max_tokens": 30,
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 10,
    }
    with forwarded(running, "svc/sglang-pd", f"{local}:8000"):
        answers = [
            request(f"http://127.0.0.1:{local}", "POST", "/v1/chat/completions", body, timeout_s=60) for _ in "ab"
        ]
    assert [status for status, _ in answers] == [200, 200]
    first, second = (json.loads(text) for _, text in answers)
    assert first["model"] == "/models/Qwen3-32B"
    assert first["usage"]["completion_tokens"] == 30
    assert {"reasoning_content", "tool_calls"} <= set(first["choices"][0]["message"]), "SGLang's shape"
    assert first["choices"] == second["choices"], "the seed decides"
    running.kubectl("delete", "-f", str(SHARED / "sglang_pd.yaml"), "-f", str(SHARED / "llm-model.yaml"))


class forwarded:  # noqa: N801  (a context manager)
    """`kubectl port-forward`, ready when it says so."""

    def __init__(self, one: Cluster, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [f"{one.home}/cluster/bin/kubectl", "port-forward", *arguments],
            env={**os.environ, **one.environment},
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> None:
        assert self._process.stdout is not None
        assert "Forwarding from 127.0.0.1" in self._process.stdout.readline()

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


@needs_shared
@pytest.mark.skipif(not (shutil.which("etcd") and shutil.which("nats-server")), reason="etcd or nats-server is missing")
def test_etcd_and_nats_run_from_their_manifests(running: Cluster) -> None:
    done = running.baton("up", str(SHARED / "etcd.yaml"), str(SHARED / "nats.yaml"), "--timeout", "60")
    nats = next(line.split()[-1] for line in done.stdout.splitlines() if line.endswith(":4222"))
    host, port = nats.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        assert connection.recv(4096).startswith(b"INFO {"), "NATS greets through the Service"
    etcd = running.get("pod", "etcd-0")["status"]["podIP"]
    until(lambda: _is_healthy(f"http://{etcd}:2379"), "etcd says that it is healthy", 20)
    running.kubectl("delete", "-f", str(SHARED / "etcd.yaml"), "-f", str(SHARED / "nats.yaml"))


def _is_healthy(url: str) -> bool:
    status, text = request(url, "GET", "/health")
    return status == 200 and bool(json.loads(text)["health"] == "true")


MISTAKES = """\
apiVersion: workloads.x-k8s.io/v1alpha1
kind: RoleBasedGroup
metadata: {name: cycle}
spec:
  roles:
    - {name: a, dependencies: [b], template: {spec: {containers: [{name: c, image: busybox}]}}}
    - {name: b, dependencies: [a], template: {spec: {containers: [{name: c, image: busybox}]}}}
---
apiVersion: workloads.x-k8s.io/v1alpha1
kind: RoleBasedGroup
metadata: {name: twice}
spec:
  roles:
    - {name: a, template: {spec: {containers: [{name: c, image: busybox}]}}}
    - {name: a, template: {spec: {containers: [{name: c, image: busybox}]}}}
---
apiVersion: v1
kind: Pod
metadata:
\tname: tabbed
---
apiVersion: v1
kind: Pod
metadata: {name: wrong-type}
spec:
  containers:
    - name: c
      image: busybox
      ports: http
---
apiVersion: example.com/v1
kind: Gizmo
metadata: {name: unknown}
---
apiVersion: v1
kind: Deployment
metadata: {name: wrong-version}
---
apiVersion: v1
kind: Pod
metadata: {name: no-claim}
spec:
  volumes: [{name: m, persistentVolumeClaim: {claimName: nowhere}}]
  containers: [{name: c, image: busybox, command: [sleep, "600"], volumeMounts: [{name: m, mountPath: /m}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: exits}
spec:
  containers: [{name: c, image: busybox, command: [sh, -c, "echo no such model >&2; exit 3"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: good}
spec:
  containers: [{name: c, image: busybox, command: [sleep, "600"]}]
---
apiVersion: v1
kind: Service
metadata: {name: taken}
spec: {type: LoadBalancer, selector: {a: b}, ports: [{port: PORT}]}
"""


def test_each_mistake_is_one_line_with_its_place_and_the_rest_goes_on(running: Cluster, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        file = tmp_path / "mistakes.yaml"
        file.write_text(MISTAKES.replace("PORT", str(port)))
        done = running.baton("up", str(file), str(tmp_path / "absent.yaml"), "--timeout", "12", check=False)
    assert done.returncode == 1
    said = done.stderr.replace(f"{file}:", "").splitlines()
    expected = [
        ("20: a tab is used to indent",),
        (f"{tmp_path}/absent.yaml: cannot be read: No such file",),
        ("6: rolebasedgroup/cycle: spec.roles[0].dependencies:", "a -> b -> a"),
        ("15: rolebasedgroup/twice: spec.roles[1].name:", "must differ"),
        ("29: pod/wrong-type:", "ports"),
        ("32: gizmo/unknown: no kind Gizmo in apiVersion example.com/v1",),
        ("36: deployment/wrong-version: no kind Deployment in apiVersion v1; write apiVersion: apps/v1",),
        ("not ready:",),
        ("39: pod/no-claim:", "apply a PersistentVolumeClaim nowhere"),
        ("46: pod/exits: c exits with code 3 (no such model)", "kubectl logs exits --previous"),
        ("58: service/taken:", f"port {port} on 127.0.0.1 is in use", "--publish taken=PORT"),
    ]
    for line, words in zip(said, expected, strict=False):
        assert all(word in line for word in words), (line, words)
    assert len(said) - len(expected) in (0, 1), said  # perhaps a last line that says time was over
    assert "pod/good: ready" in done.stdout
    assert running.get("pod", "good")["status"]["phase"] == "Running"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--volume", "llm-model=/no/such/dir"), "--volume llm-model=/no/such/dir: no such directory"),
        (("--volume", "llm-model"), "--volume llm-model: write CLAIM=DIR"),
        (("--isolation", "chroot"), "--isolation chroot: choose one of auto, bubblewrap, plain"),
        (("--publish", "pd=http"), "--publish pd=http: the port must be a number"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_by_name(
    running: Cluster, arguments: tuple[str, ...], words: str
) -> None:
    done = running.baton("up", *arguments, check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
