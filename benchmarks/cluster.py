"""The embedded cluster in figures: `baton up` to the first answer, and many groups through the control plane.

`python benchmarks/cluster.py [--groups 100] [--json FILE]`. Groups are router <- 2 prefill, 3 decode (6 pods) with a node
agent that does nothing (`noop_kubelet`) in this process, while the daemon (API server, controllers, scheduler) is one
process whose CPU and memory are read from /proc. Nothing else should run on the machine.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from baton.api.resources import PODS, ROLE_BASED_GROUPS, Object
from baton.cluster import launch
from baton.cluster.home import ClusterHome, DaemonRecord
from baton.cluster_client import Client, ClientError, follow
from noop_kubelet import NoopKubelet

ROOT = Path(__file__).parents[1]
BATON = Path(sys.executable).parent / "baton"
PODS_PER_GROUP = 6
GIVE_UP_S = 300.0


def group(number: int) -> Object:
    def role(name: str, replicas: int, dependencies: list[str]) -> Object:
        template = {"spec": {"containers": [{"name": "main", "image": "busybox", "command": ["sleep", "inf"]}]}}
        return {
            "name": name,
            "replicas": replicas,
            "dependencies": dependencies,
            "standalonePattern": {"template": template},
        }

    roles = [role("router", 1, ["prefill", "decode"]), role("prefill", 2, []), role("decode", 3, [])]
    return {
        "apiVersion": "workloads.x-k8s.io/v1alpha2",
        "kind": "RoleBasedGroup",
        "metadata": {"name": f"group-{number}", "namespace": "default"},
        "spec": {"roles": roles},
    }


@contextmanager
def daemon(*arguments: str) -> Iterator[tuple[ClusterHome, DaemonRecord]]:
    """A daemon of its own in a new directory, ended at the end."""
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as directory:
        home = ClusterHome.find(Path(directory))
        record, _ = launch.ensure_running(home, list(arguments))
        try:
            yield home, record
        finally:
            launch.stop(home)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int, field: str) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1]) / 1024


def first_answer(repeats: int) -> dict[str, Any]:
    """`baton up examples/pd.yaml` in a new home, then one question, each as a user's command."""
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory(prefix="baton-bench-") as directory:
            environment = {**os.environ, "BATON_HOME": directory}
            try:
                started = time.perf_counter()
                up = [BATON, "up", ROOT / "examples" / "pd.yaml", "--publish", "pd=18765"]
                subprocess.run(up, env=environment, check=True, capture_output=True)
                ready = time.perf_counter()
                ask = [BATON, "ask", "What is a relay race?", "--max-tokens", "1", "--url", "http://127.0.0.1:18765"]
                subprocess.run(ask, env=environment, check=True, capture_output=True)
                runs.append({"ready_s": ready - started, "first_answer_s": time.perf_counter() - started})
            finally:
                subprocess.run([BATON, "down", "--purge"], env=environment, check=False, capture_output=True)
    return {name: min(run[name] for run in runs) for name in runs[0]} | {"runs": runs}


class Watcher:
    """What a second client sees: when each resourceVersion of a pod arrived, and how far groups and pods are."""

    def __init__(self, client: Client, num_groups: int) -> None:
        self._client = client
        self._num_groups = num_groups
        self.seen: dict[int, float] = {}
        self.moments: dict[str, float] = {}
        self._pods: set[str] = set()
        self._ready_pods: set[str] = set()
        self._ready_groups: set[str] = set()
        self.done = asyncio.Event()

    async def pods(self) -> None:
        async for change in follow(self._client, PODS):
            if change.object is None:
                continue
            meta = change.object["metadata"]
            self.seen[int(meta["resourceVersion"])] = time.monotonic()
            self._pods.add(meta["name"])
            if is_ready(change.object):
                self._ready_pods.add(meta["name"])
            self._mark("pods_created", self._pods, self._num_groups * PODS_PER_GROUP)
            self._mark("pods_ready", self._ready_pods, self._num_groups * PODS_PER_GROUP)

    async def groups(self) -> None:
        async for change in follow(self._client, ROLE_BASED_GROUPS):
            if change.object is not None and is_ready(change.object):
                self._ready_groups.add(change.object["metadata"]["name"])
                self._mark("groups_ready", self._ready_groups, self._num_groups)
                if "groups_ready" in self.moments:
                    self.done.set()

    def _mark(self, name: str, found: set[str], wanted: int) -> None:
        if len(found) == wanted:
            self.moments.setdefault(name, time.monotonic())


def is_ready(obj: Object) -> bool:
    conditions = (obj.get("status") or {}).get("conditions") or []
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def many_groups(num_groups: int) -> dict[str, Any]:
    with daemon("--no-node") as (home, record):
        figures = asyncio.run(measure(home, record, num_groups))
        launch.stop(home)
        total = requests_inside(home) + figures.pop("requests_outside")
    span_s = figures["groups_ready_s"]
    return figures | {"requests": total, "requests_per_s": total / span_s, "writes_per_s": figures["writes"] / span_s}


async def measure(home: ClusterHome, record: DaemonRecord, num_groups: int) -> dict[str, Any]:
    config = record.client_config(home)
    async with Client(config) as kubelet_client, Client(config) as watch_client, Client(config) as user:
        kubelet, watcher = NoopKubelet(kubelet_client), Watcher(watch_client, num_groups)
        tasks = [asyncio.create_task(one) for one in (kubelet.run(), watcher.pods(), watcher.groups())]
        await asyncio.sleep(1.0)
        cpu_before, version_before = cpu_s(record.pid), await version(user)
        started = time.monotonic()
        for number in range(num_groups):
            await user.create(ROLE_BASED_GROUPS, group(number))
        created = time.monotonic()
        async with asyncio.timeout(GIVE_UP_S):
            await watcher.done.wait()
        figures = {
            "groups": num_groups,
            "create_calls_s": created - started,
            **{f"{name}_s": moment - started for name, moment in watcher.moments.items()},
            "daemon_cpu_s": cpu_s(record.pid) - cpu_before,
            "daemon_rss_mb": memory_mb(record.pid, "VmRSS"),
            "daemon_rss_peak_mb": memory_mb(record.pid, "VmHWM"),
            "writes": await version(user) - version_before,
            "requests_outside": kubelet_client.num_requests + user.num_requests,
            **watch_latency(kubelet, watcher),
        }
        await asyncio.sleep(1.0)
        cpu_idle = cpu_s(record.pid)
        await asyncio.sleep(5.0)
        figures["daemon_idle_cpu_percent"] = 100 * (cpu_s(record.pid) - cpu_idle) / 5.0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return figures


async def version(client: Client) -> int:
    try:
        return int((await client.list(PODS, "kube-system")).resource_version)
    except ClientError as error:
        raise SystemExit(f"the API server does not answer: {error}") from None


def watch_latency(kubelet: NoopKubelet, watcher: Watcher) -> dict[str, float]:
    """From a write's answer (its commit) and from its sending, until another client's watch shows it."""
    both = [
        (sent, answered, watcher.seen[rv]) for rv, (sent, answered) in kubelet.answers.items() if rv in watcher.seen
    ]
    after = sorted(max(0.0, seen - answered) for _, answered, seen in both)
    whole = sorted(seen - sent for sent, _, seen in both)
    return {
        "watch_after_answer_p50_ms": 1000 * after[len(after) // 2],
        "watch_after_answer_p99_ms": 1000 * after[int(len(after) * 0.99)],
        "watch_after_send_p50_ms": 1000 * whole[len(whole) // 2],
        "watch_after_send_p99_ms": 1000 * whole[int(len(whole) * 0.99)],
    }


def requests_inside(home: ClusterHome) -> int:
    """Requests of the daemon's own client (controllers, scheduler), which it logs when it stops."""
    for line in reversed(home.log.read_text().splitlines()):
        if "requests=" in line:
            return int(line.rpartition("requests=")[2].split()[0])
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="*", default=[10, 100])
    parser.add_argument("--repeats", type=int, default=3, help="of the first answer; the best counts")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "many_groups": []}
    if arguments.repeats:
        results["first_answer"] = first_answer(arguments.repeats)
        show("first answer", results["first_answer"])
    for number in arguments.groups:
        figures = many_groups(number)
        results["many_groups"].append(figures)
        show(f"{number} groups", figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"cpu": model, "cores": os.cpu_count(), "commit": commit.stdout.strip(), "load": os.getloadavg()[0]}


def show(title: str, figures: dict[str, Any]) -> None:
    print(title)
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"  {name:28s} {value:10.2f}")
        elif isinstance(value, int):
            print(f"  {name:28s} {value:10d}")


if __name__ == "__main__":
    main()
