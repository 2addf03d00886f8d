"""The words `baton up` waits with: what is ready, what waits for what, what is stuck."""

from datetime import UTC, datetime
from typing import Any

import pytest

from baton.cluster.progress import Row, View, addresses, explain_pod, rows_of

Object = dict[str, Any]


def pod(name: str, status: Object, *, role: str = "prefill", spec: Object | None = None) -> Object:
    labels = {"rolebasedgroup.workloads.x-k8s.io/name": "pd", "rolebasedgroup.workloads.x-k8s.io/role": role}
    return {
        "kind": "Pod",
        "metadata": {"name": name, "uid": name, "labels": labels},
        "spec": {"nodeName": "n", "containers": [{"name": "c"}], **(spec or {})},
        "status": status,
    }


READY: Object = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}


def container(state: Object, restarts: int = 0, last: Object | None = None) -> Object:
    return {"containerStatuses": [{"name": "c", "state": state, "restartCount": restarts, "lastState": last or {}}]}


def group(roles: dict[str, int], told: list[Object] | None = None) -> Object:
    return {
        "kind": "RoleBasedGroup",
        "metadata": {"name": "pd", "uid": "g"},
        "spec": {"roles": [{"name": name, "replicas": count} for name, count in roles.items()]},
        "status": {"roleStatuses": told or []},
    }


TRACEBACK = {
    "exitCode": 1,
    "message": '  File "/x/server.py", line 9, in bind\n    self.bind()\nOSError: [Errno 98] Address already in use\n',
}
PROBED = {"containers": [{"name": "c", "readinessProbe": {"tcpSocket": {"port": 8000}}}]}


@pytest.mark.parametrize(
    ("one", "state", "text"),
    [
        (pod("p", READY), "ready", "ready"),
        (pod("p", {"phase": "Succeeded"}), "ready", "completed"),
        (pod("p", {}, spec={"nodeName": None}), "waiting", "waits for a node"),
        (
            pod("p", {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/2 nodes:\n gpu"}]}),
            "stuck",
            "does not fit on a node: 0/2 nodes: gpu",
        ),
        (
            pod("p", {"phase": "Running", **container({"running": {}})}, spec=PROBED),
            "waiting",
            "c runs, its readinessProbe waits for port 8000",
        ),
        (
            pod("p", container({"waiting": {"reason": "CrashLoopBackOff"}}, 1, {"terminated": {"exitCode": 2}})),
            "waiting",
            "c exits with code 2, 1 restart; see `kubectl logs p --previous`",
        ),
        (
            pod("p", container({"waiting": {"reason": "CrashLoopBackOff"}}, 3, {"terminated": {"exitCode": 2}})),
            "stuck",
            "c exits with code 2, 3 restarts; see `kubectl logs p --previous`",
        ),
        (
            pod("p", container({"waiting": {"reason": "CrashLoopBackOff"}}, 3, {"terminated": TRACEBACK})),
            "stuck",
            "c exits with code 1 (OSError: [Errno 98] Address already in use), 3 restarts; see `kubectl logs p --previous`",
        ),
        (
            pod("p", container({"waiting": {"reason": "CreateContainerConfigError", "message": "no secret"}})),
            "stuck",
            "c: CreateContainerConfigError: no secret",
        ),
    ],
)
def test_a_pod_says_what_it_waits_for(one: Object, state: str, text: str) -> None:
    assert explain_pod(one, View(pods=[])) == (state, text)


def test_a_pod_that_nothing_checks_is_ready_once_it_has_run_for_a_moment() -> None:
    one = pod("p", {**READY, **container({"running": {"startedAt": "2026-01-01T00:00:10Z"}})})
    at = datetime(2026, 1, 1, 0, 0, 11, tzinfo=UTC)
    assert explain_pod(one, View([], now=at)) == ("waiting", "has just started")
    assert explain_pod(one, View([], now=at.replace(second=12))) == ("ready", "ready")
    assert explain_pod({**one, "spec": PROBED}, View([], now=at)) == ("ready", "ready")


def test_a_claim_that_nobody_made_is_named_with_what_to_do() -> None:
    scheduled = {"type": "PodScheduled", "status": "False", "message": 'persistentvolumeclaim "m" not found'}
    state, text = explain_pod(pod("p", {"conditions": [scheduled]}), View([]))
    assert state == "stuck"
    assert "apply a PersistentVolumeClaim m" in text


def test_the_newest_warning_explains_a_pod_that_only_starts() -> None:
    events = [
        {"type": "Warning", "involvedObject": {"uid": "p"}, "message": text, "metadata": {"resourceVersion": version}}
        for text, version in (("newer", "10"), ("older", "9"))
    ]
    assert explain_pod(pod("p", {"phase": "Pending"}), View([], events)) == ("waiting", "newer")


def test_a_group_has_one_row_for_each_role_with_its_hold() -> None:
    waiting = pod("pd-prefill-1", {"phase": "Running", **container({"running": {}})}, spec=PROBED)
    hold = {"gate": "dependencies", "reason": "role prefill is not ready"}
    rows = rows_of(
        group({"router": 1, "prefill": 2}, [{"name": "router", "hold": hold}]),
        View([pod("pd-prefill-0", READY), waiting]),
    )
    assert rows == [
        Row("pd/router", "waiting", "0/1 ready, role prefill is not ready"),
        Row("pd/prefill", "waiting", "1/2 ready, pd-prefill-1: c runs, its readinessProbe waits for port 8000"),
    ]


def test_a_role_that_waits_for_a_stuck_one_is_stuck_too() -> None:
    dead = pod(
        "pd-prefill-0", container({"waiting": {"reason": "CrashLoopBackOff"}}, 4, {"terminated": {"exitCode": 1}})
    )
    rows = rows_of(group({"router": 1, "prefill": 1}), View([dead]))
    assert [row.state for row in rows] == ["stuck", "stuck"]


def test_a_group_with_too_many_or_leaving_pods_is_not_ready() -> None:
    extra = [pod("pd-prefill-0", READY), pod("pd-prefill-1", READY)]
    assert [row.state for row in rows_of(group({"prefill": 1}), View(extra))] == ["waiting"]
    extra[1]["metadata"]["deletionTimestamp"] = "now"
    assert "pd-prefill-1: is being stopped" in rows_of(group({"prefill": 1}), View(extra))[0].text
    assert [row.state for row in rows_of(group({"prefill": 2}), View(extra[:1]))] == ["waiting"]


def service(kind: str = "LoadBalancer", annotations: Object | None = None, address: str = "127.9.9.9") -> Object:
    return {
        "kind": "Service",
        "metadata": {"name": "pd", "uid": "s", "annotations": annotations or {}},
        "spec": {"type": kind, "clusterIP": address, "ports": [{"port": 8000}]},
    }


def test_a_published_service_waits_for_its_port_and_others_do_not() -> None:
    event = {"type": "Warning", "involvedObject": {"uid": "s"}, "message": "in use", "metadata": {}}
    there = service(annotations={"baton.dev/published": "127.0.0.1:8000"})
    assert [row.state for row in rows_of(there, View([], [event]))] == ["ready"]
    assert rows_of(service(), View([], [event])) == [Row("service/pd", "stuck", "in use")]
    assert [row.state for row in rows_of(service(), View([]))] == ["waiting"]
    assert rows_of(service("ClusterIP"), View([])) == []


def test_addresses_are_those_a_program_here_can_use() -> None:
    there = service(annotations={"baton.dev/published": "127.0.0.1:9000"})
    other = service("ClusterIP")
    other["spec"]["ports"] = [{"port": 4222, "name": "client"}]
    assert addresses([there, service("ClusterIP"), service("ClusterIP", address="None"), other]) == [
        ("pd", "http://127.0.0.1:9000"),
        ("pd", "http://127.9.9.9:8000"),
        ("pd", "127.9.9.9:4222"),
    ]


def test_a_leader_worker_set_counts_the_pods_of_all_groups_and_tells_its_hold() -> None:
    found = {
        "kind": "LeaderWorkerSet",
        "metadata": {"name": "x", "uid": "x"},
        "spec": {"replicas": 1, "leaderWorkerTemplate": {"size": 2}},
        "status": {"hold": "group 0: workers start when the leader is ready"},
    }
    pods = [pod(name, READY) for name in ("x-0", "x-0-1")]
    for one in pods:
        one["metadata"]["labels"] = {"leaderworkerset.sigs.k8s.io/name": "x"}
    (row,) = rows_of(found, View(pods[:1]))
    assert row == Row("leaderworkerset/x", "waiting", "1/2 ready, group 0: workers start when the leader is ready")
    assert rows_of(found, View(pods)) == [Row("leaderworkerset/x", "ready", "2/2 ready")]
    pods[1]["status"] = container({"waiting": {"reason": "CrashLoopBackOff"}}, 3, {"terminated": {"exitCode": 2}})
    (row,) = rows_of(found, View(pods))
    assert (row.state, row.text.startswith("1/2 ready, x-0-1: c exits with code 2")) == ("stuck", True)
