"""create, apply, get, patch, label, scale, edit, diff, delete, explain with the real kubectl."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.cluster.apiserver.conftest import APPS, NS, Cluster, as_yaml, config_map, deployment, pod, stateful_set


def write(path: Path, *objects: dict[str, object]) -> str:
    path.write_text(as_yaml(*objects))
    return str(path)


def test_create_get_in_every_output_form(cluster: Cluster) -> None:
    assert cluster.kubectl("create", "-f", "-", stdin=as_yaml(pod("forms"))) == "pod/forms created\n"
    table = cluster.kubectl("get", "pod", "forms").splitlines()
    assert table[0].split() == ["NAME", "READY", "STATUS", "RESTARTS", "AGE"]
    assert table[1].split()[:4] == ["forms", "0/1", "Pending", "0"]
    wide = cluster.kubectl("get", "pod", "forms", "-o", "wide").splitlines()[0]
    assert wide.split("AGE")[1].split() == ["IP", "NODE", "NOMINATED", "NODE", "READINESS", "GATES"]
    assert "image: busybox:1" in cluster.kubectl("get", "pod", "forms", "-o", "yaml")
    assert cluster.get("pod", "forms")["spec"]["containers"][0]["imagePullPolicy"] == "IfNotPresent"
    assert cluster.kubectl("get", "pod", "forms", "-o", "jsonpath={.spec.restartPolicy}") == "Always"
    custom = cluster.kubectl("get", "pod", "forms", "-o", "custom-columns=N:.metadata.name,Q:.status.qosClass")
    assert custom.split() == ["N", "Q", "forms", "BestEffort"]
    assert cluster.kubectl("get", "pod", "forms", "-o", "name") == "pod/forms\n"
    assert "forms" in cluster.kubectl("get", "po", "-A", "-l", "app=forms", "--show-labels")
    assert "No resources found" in cluster.kubectl("get", "po", "--field-selector", "status.phase=Running")


def test_create_twice_and_bad_input_are_errors_people_can_read(cluster: Cluster) -> None:
    cluster.kubectl("create", "-f", "-", stdin=as_yaml(config_map("once")))
    again = cluster.kubectl("create", "-f", "-", stdin=as_yaml(config_map("once")), fails=True)
    assert 'Error from server (AlreadyExists): error when creating "STDIN": configmaps "once" already exists' in again
    bad = pod("Bad_Name")
    bad["spec"]["containers"][0].pop("image")
    text = cluster.kubectl("create", "-f", "-", stdin=as_yaml(bad), fails=True)
    assert 'The Pod "Bad_Name" is invalid:' in text
    assert "* metadata.name: Invalid value" in text
    assert "* spec.containers[0].image: Required value" in text
    typo = pod("typo")
    typo["spec"]["containers"][0]["imagee"] = "x"
    text = cluster.kubectl("create", "-f", "-", stdin=as_yaml(typo), fails=True)
    assert 'strict decoding error: unknown field "spec.containers[0].imagee"' in text
    warned = cluster.kubectl("create", "--validate=warn", "-f", "-", stdin=as_yaml(typo))
    assert 'Warning: unknown field "spec.containers[0].imagee"' in warned
    assert "imagee" not in cluster.get("pod", "typo")["spec"]["containers"][0]
    assert 'pods "nosuch" not found' in cluster.kubectl("get", "pod", "nosuch", fails=True)
    assert "no matches for kind" in cluster.kubectl(
        "create", "-f", "-", stdin="apiVersion: nosuch.io/v1\nkind: Foo\nmetadata: {name: a}", fails=True
    )


def test_generators_that_send_protobuf(cluster: Cluster) -> None:
    cluster.kubectl("create", "namespace", "proto")
    cluster.kubectl("create", "configmap", "settings", "-n", "proto", "--from-literal=a=b", "--from-literal=c=")
    assert cluster.get("cm", "settings", "-n", "proto")["data"] == {"a": "b", "c": ""}
    cluster.kubectl("create", "secret", "generic", "keys", "-n", "proto", "--from-literal=password=hunter2")
    assert cluster.get("secret", "keys", "-n", "proto")["data"] == {"password": "aHVudGVyMg=="}
    refused = cluster.kubectl("create", "deployment", "d", "--image=x", fails=True)
    assert "--dry-run=client -o yaml" in refused


def test_apply_configures_once_and_then_says_unchanged(cluster: Cluster, tmp_path: Path) -> None:
    manifest = deployment("applied")
    path = write(tmp_path / "d.yaml", manifest)
    assert cluster.kubectl("apply", "-f", path) == "deployment.apps/applied created\n"
    assert cluster.kubectl("apply", "-f", path) == "deployment.apps/applied unchanged\n"
    manifest["spec"]["template"]["spec"]["containers"][0]["image"] = "busybox:2"
    write(tmp_path / "d.yaml", manifest)
    diff = cluster.kubectl("diff", "-f", path, fails=True) or ""
    assert diff == ""  # exit code 1 means "there is a difference"; the text is on standard output
    assert cluster.kubectl("apply", "-f", path) == "deployment.apps/applied configured\n"
    found = cluster.get("deploy", "applied")
    assert found["spec"]["template"]["spec"]["containers"][0]["image"] == "busybox:2"
    assert found["metadata"]["generation"] == 2


def test_apply_removes_what_left_the_manifest(cluster: Cluster, tmp_path: Path) -> None:
    manifest = config_map("shrinks", a="1", b="2")
    path = write(tmp_path / "c.yaml", manifest)
    cluster.kubectl("apply", "-f", path)
    cluster.kubectl("patch", "cm", "shrinks", "--type=merge", "-p", '{"data":{"other":"3"}}')
    del manifest["data"]["b"]
    write(tmp_path / "c.yaml", manifest)
    cluster.kubectl("apply", "-f", path)
    assert cluster.get("cm", "shrinks")["data"] == {"a": "1", "other": "3"}


def test_server_side_apply_conflicts_name_owner_and_field(cluster: Cluster, tmp_path: Path) -> None:
    path = write(tmp_path / "d.yaml", deployment("ssa", 1))
    assert "serverside-applied" in cluster.kubectl("apply", "--server-side", "-f", path)
    cluster.kubectl("patch", "deploy", "ssa", "-p", '{"spec":{"replicas":5}}', "--field-manager=autoscaler")
    text = cluster.kubectl("apply", "--server-side", "-f", path, fails=True)
    assert 'Apply failed with 1 conflict: conflict with "autoscaler" using apps/v1: .spec.replicas' in text
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", path)
    assert cluster.get("deploy", "ssa")["spec"]["replicas"] == 1
    assert "serverside-applied" in cluster.kubectl("apply", "--server-side", "-f", path)


def test_client_side_applied_objects_move_to_server_side_apply(cluster: Cluster, tmp_path: Path) -> None:
    manifest = config_map("migrates", a="1", b="2")
    path = write(tmp_path / "c.yaml", manifest)
    cluster.kubectl("apply", "-f", path)
    del manifest["data"]["b"]
    write(tmp_path / "c.yaml", manifest)
    cluster.kubectl("apply", "--server-side", "-f", path)
    assert cluster.get("cm", "migrates")["data"] == {"a": "1"}


def test_patch_of_three_kinds(cluster: Cluster) -> None:
    cluster.create(f"{APPS}/deployments", deployment("patched"))
    strategic = {"spec": {"template": {"spec": {"containers": [{"name": "side", "image": "side:1"}]}}}}
    cluster.kubectl("patch", "deploy", "patched", "-p", json.dumps(strategic))
    cluster.kubectl("set", "image", "deploy/patched", "c=busybox:9")
    containers = cluster.get("deploy", "patched")["spec"]["template"]["spec"]["containers"]
    assert {c["name"]: c["image"] for c in containers} == {"c": "busybox:9", "side": "side:1"}
    cluster.kubectl("patch", "deploy", "patched", "--type=merge", "-p", '{"metadata":{"labels":{"x":"y"}}}')
    operations = '[{"op":"test","path":"/metadata/labels/x","value":"y"},{"op":"remove","path":"/metadata/labels/x"}]'
    cluster.kubectl("patch", "deploy", "patched", "--type=json", "-p", operations)
    assert "x" not in cluster.get("deploy", "patched")["metadata"].get("labels", {})
    failed = cluster.kubectl("patch", "deploy", "patched", "--type=json", "-p", operations, fails=True)
    assert "the server rejected our request due to an error in our request" in failed
    assert "(no change)" in cluster.kubectl("patch", "deploy", "patched", "-p", "{}")


def test_label_annotate_replace_and_edit(cluster: Cluster, tmp_path: Path) -> None:
    cluster.create(f"{NS}/configmaps", config_map("edited", a="1"))
    cluster.kubectl("label", "cm", "edited", "tier=gold")
    cluster.kubectl("annotate", "cm", "edited", "note=hi")
    assert "already has a value" in cluster.kubectl("label", "cm", "edited", "tier=tin", fails=True)
    cluster.kubectl("replace", "-f", "-", stdin=as_yaml(config_map("edited", a="2")))
    found = cluster.get("cm", "edited")
    assert found["data"] == {"a": "2"}
    assert "labels" not in found["metadata"]
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nsed -i \'s/a: "2"/a: "3"/\' "$1"\n')
    editor.chmod(0o755)
    assert "configmap/edited edited" in cluster.kubectl("edit", "cm", "edited", KUBE_EDITOR=str(editor))
    assert cluster.get("cm", "edited")["data"] == {"a": "3"}


def test_scale_and_its_precondition(cluster: Cluster) -> None:
    cluster.create(f"{APPS}/statefulsets", stateful_set("scaled", 2))
    cluster.kubectl("scale", "sts", "scaled", "--replicas=3")
    cluster.kubectl("scale", "sts", "scaled", "--current-replicas=3", "--replicas=4")
    assert cluster.get("sts", "scaled")["spec"]["replicas"] == 4
    assert "Expected replicas to be 3" in cluster.kubectl(
        "scale", "sts", "scaled", "--current-replicas=3", "--replicas=1", fails=True
    )


def test_immutable_fields_stay(cluster: Cluster) -> None:
    cluster.create(f"{APPS}/statefulsets", stateful_set("fixed"))
    text = cluster.kubectl("patch", "sts", "fixed", "-p", '{"spec":{"serviceName":"other"}}', fails=True)
    assert "updates to statefulset spec for fields other than 'replicas'" in text
    cluster.create(f"{NS}/pods", pod("still"))
    text = cluster.kubectl("patch", "pod", "still", "-p", '{"spec":{"restartPolicy":"Never"}}', fails=True)
    assert "pod updates may not change fields other than" in text
    cluster.kubectl("set", "image", "pod/still", "c=busybox:2")


def test_delete_waits_for_finalizers_and_reports(cluster: Cluster) -> None:
    cluster.create(f"{NS}/configmaps", config_map("gone"))
    assert cluster.kubectl("delete", "cm", "gone") == 'configmap "gone" deleted from default namespace\n'
    assert "not found" in cluster.kubectl("delete", "cm", "gone", fails=True)
    held = config_map("held")
    held["metadata"]["finalizers"] = ["example.com/hold"]
    cluster.create(f"{NS}/configmaps", held)
    waiting = cluster.start_kubectl("delete", "cm", "held")
    cluster.eventually(lambda: cluster.get("cm", "held")["metadata"].get("deletionTimestamp"), "the mark")
    assert waiting.poll() is None
    cluster.kubectl("patch", "cm", "held", "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
    waiting.communicate(timeout=10)
    assert waiting.returncode == 0


def test_pods_leave_when_their_node_lets_them(cluster: Cluster) -> None:
    cluster.create(f"{NS}/pods", pod("graceful", nodeName="n0", terminationGracePeriodSeconds=7))
    cluster.kubectl("delete", "pod", "graceful", "--wait=false")
    assert "Terminating" in cluster.kubectl("get", "pod", "graceful")
    assert cluster.get("pod", "graceful")["metadata"]["deletionGracePeriodSeconds"] == 7
    cluster.kubectl("delete", "pod", "graceful", "--force", "--grace-period=0")
    assert "not found" in cluster.kubectl("get", "pod", "graceful", fails=True)


def test_dry_run_changes_nothing(cluster: Cluster) -> None:
    out = cluster.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=as_yaml(deployment("dry")))
    assert json.loads(out)["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == "25%"
    assert "not found" in cluster.kubectl("get", "deploy", "dry", fails=True)


def test_explain_and_discovery(cluster: Cluster) -> None:
    out = cluster.kubectl("explain", "statefulset.spec.template.spec.containers.readinessProbe")
    assert re.search(r"FIELD: readinessProbe <Probe>", out)
    assert "How to find out whether a container is alive" in out
    assert re.search(r"tcpSocket\s+<TCPSocketAction>", out)
    listed = cluster.kubectl("api-resources", "--namespaced=false").split()
    assert {"nodes", "persistentvolumes", "namespaces", "customresourcedefinitions"} <= set(listed)
    assert "apps/v1" in cluster.kubectl("api-versions")
    assert "Server Version: v1." in cluster.kubectl("version")
    assert cluster.kubectl("get", "--raw", "/readyz") == "ok"


@pytest.mark.parametrize("name", ["llm-model", "etcd", "nats", "dynamo-configs"])
def test_manifests_people_have(cluster: Cluster, name: str) -> None:
    path = Path(__file__).parents[4] / "shared" / "manifests" / f"{name}.yaml"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside this checkout")
    assert "created" in cluster.kubectl("create", "-f", str(path))
