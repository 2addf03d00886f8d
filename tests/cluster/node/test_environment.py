"""Environment of a container: expansion, references, precedence, and the words for what is missing."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from baton.cluster.node import environment, quantity
from baton.cluster.node.environment import ContainerConfigError, Lookup

CONFIG = {"metadata": {"name": "cm"}, "data": {"A": "1", "B": "2"}}
SECRET = {"metadata": {"name": "sec"}, "data": {"KEY": base64.b64encode(b"hidden").decode()}}
LOOKUP = Lookup(
    lambda name: CONFIG if name == "cm" else None, lambda name: SECRET if name == "sec" else None,
    {"cpu": "8", "memory": "16Gi"},
)  # fmt: skip
POD: dict[str, Any] = {
    "metadata": {
        "name": "p-0", "namespace": "ns", "uid": "u1",
        "labels": {"apps.kubernetes.io/pod-index": "3"}, "annotations": {"a": "b"},
    },
    "spec": {"nodeName": "node-1"},
}  # fmt: skip


def built(*env: Any, env_from: Any = None, services: Any = None, resources: Any = None) -> dict[str, str]:
    container = {"name": "c", "env": list(env), "envFrom": env_from or [], "resources": resources or {}}
    return environment.build(POD, container, "127.1.2.3", LOOKUP, services or {})


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$(A)-$(B)", "1-2"), ("$$(A)", "$(A)"), ("$(UNKNOWN)", "$(UNKNOWN)"), ("$A ${A} $", "$A ${A} $"),
        ("$$$(A)", "$1"), ("$(A", "$(A"), ("100$", "100$"), ("$(A)$(A)", "11"),
    ],
)  # fmt: skip
def test_expansion_is_that_of_kubernetes(text: str, expanded: str) -> None:
    assert environment.expand(text, {"A": "1", "B": "2"}) == expanded


def test_a_variable_sees_those_before_it() -> None:
    found = built({"name": "X", "value": "1"}, {"name": "Y", "value": "$(X)2$(Z)"}, {"name": "Z", "value": "3"})
    assert found["Y"] == "12$(Z)"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata.name", "p-0"), ("metadata.namespace", "ns"), ("metadata.uid", "u1"), ("spec.nodeName", "node-1"),
        ("status.podIP", "127.1.2.3"), ("status.hostIP", "127.0.0.1"), ("spec.serviceAccountName", "default"),
        ("metadata.labels['apps.kubernetes.io/pod-index']", "3"), ("metadata.annotations['a']", "b"),
        ("metadata.labels['missing']", ""),
    ],
)  # fmt: skip
def test_fields_of_the_pod(path: str, value: str) -> None:
    assert built({"name": "X", "valueFrom": {"fieldRef": {"fieldPath": path}}}) == {"X": value}


def test_keys_of_config_maps_and_secrets_and_whole_ones() -> None:
    found = built(
        {"name": "X", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "A"}}},
        {"name": "Y", "valueFrom": {"secretKeyRef": {"name": "sec", "key": "KEY"}}},
        {"name": "Z", "valueFrom": {"configMapKeyRef": {"name": "none", "key": "A", "optional": True}}},
        {"name": "B", "value": "own"},
        env_from=[{"configMapRef": {"name": "cm"}}, {"prefix": "S_", "secretRef": {"name": "sec"}}],
        services={"WEB_SERVICE_HOST": "127.9.224.1", "A": "from a service"},
    )
    assert found == {
        "X": "1",
        "Y": "hidden",
        "A": "1",
        "B": "own",
        "S_KEY": "hidden",
        "WEB_SERVICE_HOST": "127.9.224.1",
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"configMapKeyRef": {"name": "none", "key": "A"}}, 'configmap "none" not found'),
        ({"configMapKeyRef": {"name": "cm", "key": "Q"}}, "couldn't find key Q in configmap ns/cm"),
        ({"secretKeyRef": {"name": "none", "key": "A"}}, 'secret "none" not found'),
        ({"fieldRef": {"fieldPath": "spec.nope"}}, "fieldRef 'spec.nope' is not a field"),
        ({"fileKeyRef": {}}, "env X: valueFrom names no known source"),
    ],
)
def test_what_is_missing_is_named(source: Any, message: str) -> None:
    with pytest.raises(ContainerConfigError, match=message):
        built({"name": "X", "valueFrom": source})


@pytest.mark.parametrize(
    ("resource", "divisor", "value"),
    [
        ("limits.cpu", "1m", "500"),
        ("limits.memory", "1Mi", "16384"),
        ("requests.cpu", "1", "1"),
        ("limits.x", "1", "0"),
    ],
)
def test_resources_are_divided_and_rounded_up(resource: str, divisor: str, value: str) -> None:
    reference = {"resource": resource, "divisor": divisor}
    found = built({"name": "X", "valueFrom": {"resourceFieldRef": reference}}, resources={"limits": {"cpu": "500m"}})
    assert found == {"X": value}


@pytest.mark.parametrize("text", ["", "1x", "Gi", "--1", "1.2.3"])
def test_a_bad_quantity_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="not a quantity"):
        quantity.parse(text)
