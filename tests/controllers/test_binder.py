"""Claims and volumes find each other."""

from __future__ import annotations

from typing import Any

import pytest
from tests.fakes.kube_world import KubeWorld

from baton.api.resources import PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES
from baton.controllers.volumes import binder

Object = dict[str, Any]


def volume(name: str, size: str = "10Gi", labels: dict[str, str] | None = None, **spec: Any) -> Object:
    found = {"capacity": {"storage": size}, "accessModes": ["ReadOnlyMany"], "hostPath": {"path": "/x"}, **spec}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name, "labels": labels or {}},
        "spec": found,
    }


def claim(name: str = "c", size: str = "10Gi", **spec: Any) -> Object:
    found = {"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": size}}, **spec}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": found}


def settled(*objects: Object, default: Any = None) -> KubeWorld:
    world = KubeWorld([binder.controller(default)])
    for obj in objects:
        world.put(obj)
    world.settle()
    return world


def bound_to(world: KubeWorld, name: str = "c") -> str | None:
    found = world.get(PERSISTENT_VOLUME_CLAIMS, name, "default")
    assert found is not None
    name_or_none: str | None = found["spec"].get("volumeName")
    return name_or_none


def test_the_smallest_fitting_volume_is_taken_and_both_sides_know() -> None:
    world = settled(volume("big", "50Gi"), volume("small", "1Gi"), volume("right", "20Gi"), claim())
    assert bound_to(world) == "right"
    pv, pvc = world.get(PERSISTENT_VOLUMES, "right"), world.get(PERSISTENT_VOLUME_CLAIMS, "c", "default")
    assert pv is not None and pvc is not None
    assert (pv["status"]["phase"], pv["spec"]["claimRef"]["name"]) == ("Bound", "c")
    assert pvc["status"] == {"phase": "Bound", "accessModes": ["ReadOnlyMany"], "capacity": {"storage": "20Gi"}}
    assert world.get(PERSISTENT_VOLUMES, "big")["status"] == {"phase": "Available"}  # type: ignore[index]


@pytest.mark.parametrize(
    ("other", "wanted", "reason"),
    [
        (volume("v", "1Gi"), claim(), "smaller than 10Gi"),
        (volume("v", accessModes=["ReadWriteOnce"]), claim(), "lacks an access mode"),
        (volume("v", storageClassName="fast"), claim(), "another storage class"),
        (volume("v", volumeMode="Block"), claim(), "another volume mode"),
        (volume("v", labels={"a": "1"}), claim(selector={"matchLabels": {"a": "2"}}), "does not match the selector"),
        (volume("v"), claim(volumeName="w"), 'volume "w" does not exist'),
    ],
)
def test_a_claim_that_nothing_fits_waits_and_says_why_once(other: Object, wanted: Object, reason: str) -> None:
    world = settled(other, wanted)
    assert world.get(PERSISTENT_VOLUME_CLAIMS, "c", "default")["status"] == {"phase": "Pending"}  # type: ignore[index]
    assert [(note.reason, reason in note.message) for _, note in world.notes] == [("FailedBinding", True)]


def test_a_volume_goes_to_one_claim_only() -> None:
    world = settled(volume("v"), claim("c1"), claim("c2"))
    assert sorted([str(bound_to(world, "c1")), str(bound_to(world, "c2"))]) == ["None", "v"]


def test_a_volume_reserved_for_a_claim_is_kept_for_it() -> None:
    reserved = volume("v", claimRef={"namespace": "default", "name": "mine"})
    world = settled(reserved, claim("a"), claim("mine", "99Gi"))
    assert (bound_to(world, "a"), bound_to(world, "mine")) == (None, "v")


def test_a_half_done_binding_is_completed() -> None:
    world = KubeWorld([binder.controller()])
    made = world.put(claim())
    ref = {"namespace": "default", "name": "c", "uid": made["metadata"]["uid"]}
    world.put(volume("v", claimRef=ref))
    world.settle()
    assert bound_to(world) == "v"


def test_a_volume_outlives_its_claim_as_released() -> None:
    world = settled(volume("v"), claim())
    world.delete(PERSISTENT_VOLUME_CLAIMS, "default", "c")
    world.settle()
    assert world.get(PERSISTENT_VOLUMES, "v")["status"]["phase"] == "Released"  # type: ignore[index]
    world.put(claim())
    world.settle()
    assert bound_to(world) is None


def test_a_cluster_with_a_default_gives_a_claim_its_own_volume() -> None:
    world = settled(claim(), default=lambda found: {"hostPath": {"path": f"/data/{found['metadata']['name']}"}})
    made = world.get(PERSISTENT_VOLUMES, str(bound_to(world)))
    assert made is not None
    assert made["spec"]["hostPath"] == {"path": "/data/c"}
    assert (made["spec"]["capacity"], made["status"]["phase"]) == ({"storage": "10Gi"}, "Bound")
    assert world.notes == []
