"""Volumes on this machine: which directory, which files, and the words for one that is not to be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.cluster.node import payload, volumes
from baton.cluster.node.environment import Lookup
from baton.cluster.node.slots import Slot
from baton.cluster.node.volumes import Claims, VolumeError

CONFIG = {"metadata": {"name": "cm"}, "data": {"a": "A", "b": "B"}}
LOOKUP = Lookup(lambda name: CONFIG if name == "cm" else None, lambda name: None, {"cpu": "4"})


@pytest.fixture
def slot(tmp_path: Path) -> Slot:
    (tmp_path / "shm").mkdir()
    return Slot("u", "default", "p", "node", "127.5.1.1", tmp_path / "slot", tmp_path / "shm")


def claims(directories: Any = None, *, phase: str = "Bound", volume: Any = None, default: Path | None = None) -> Claims:
    claim = {"spec": {"volumeName": "pv", "accessModes": ["ReadOnlyMany"]}, "status": {"phase": phase}}
    return Claims(
        directories or {}, None if default is None else lambda: default,
        lambda namespace, name: claim if name == "llm-model" else None, lambda name: volume,
    )  # fmt: skip


def prepare(slot: Slot, raw: Any, wanted: Claims | None = None) -> volumes.Volume:
    pod = {
        "metadata": {"name": "p", "namespace": "default", "labels": {"x": "y"}},
        "spec": {"volumes": [{"name": "v", **raw}], "containers": [{"name": "c"}]},
    }
    return volumes.prepare(pod, slot, LOOKUP, wanted or claims())["v"]


def test_chosen_items_of_a_config_map_at_their_paths(slot: Slot) -> None:
    raw = {"configMap": {"name": "cm", "items": [{"key": "a", "path": "deep/name", "mode": 0o600}]}}
    volume = prepare(slot, raw)
    file = volume.path / "deep" / "name"
    assert file.read_text() == "A"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in volume.path.iterdir() if not one.name.startswith("..")] == ["deep"]


def test_a_projected_volume_joins_its_sources(slot: Slot) -> None:
    sources = [
        {"configMap": {"name": "cm"}},
        {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
    ]
    volume = prepare(slot, {"projected": {"sources": sources}})
    assert (volume.path / "a").read_text() == "A"
    assert (volume.path / "labels").read_text() == 'x="y"'


def test_memory_is_memory_and_a_directory_is_kept(slot: Slot) -> None:
    memory = prepare(slot, {"emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}})
    assert memory.path.is_relative_to(slot.shm)
    (memory.path / "file").write_text("x")
    assert (prepare(slot, {"emptyDir": {"medium": "Memory"}}).path / "file").read_text() == "x"
    assert prepare(slot, {"emptyDir": {}}).path.is_relative_to(slot.directory)


def test_a_claim_is_the_users_directory_then_its_volumes_then_the_default(slot: Slot, tmp_path: Path) -> None:
    raw = {"persistentVolumeClaim": {"claimName": "llm-model"}}
    demo, own, bound = (tmp_path / name for name in ("demo", "own", "bound"))
    for path in (demo, own, bound):
        path.mkdir()
    host = {"spec": {"hostPath": {"path": str(bound)}}}
    assert prepare(slot, raw, claims({"llm-model": own}, volume=host, default=demo)).path == own
    assert prepare(slot, raw, claims({"default/llm-model": own})).path == own
    assert prepare(slot, raw, claims(volume=host, default=demo)).path == bound
    assert prepare(slot, raw, claims(default=demo)).path == demo
    assert prepare(slot, raw, claims(default=demo)).read_only


@pytest.mark.parametrize(
    ("raw", "wanted", "message"),
    [
        ({"persistentVolumeClaim": {"claimName": "other"}}, {}, 'persistentvolumeclaim "other" not found'),
        ({"persistentVolumeClaim": {"claimName": "llm-model"}}, {"phase": "Pending"}, "is not bound to a volume"),
        ({"persistentVolumeClaim": {"claimName": "llm-model"}}, {}, "give --volume llm-model=DIR"),
        (
            {"persistentVolumeClaim": {"claimName": "llm-model"}},
            {"directories": {"llm-model": Path("/no/such")}},
            "--volume llm-model: /no/such does not exist",
        ),
        ({"configMap": {"name": "none"}}, {}, 'configmap "none" not found'),
        (
            {"configMap": {"name": "cm", "items": [{"key": "q", "path": "q"}]}},
            {},
            "configmap references non-existent config key: q",
        ),
        ({"configMap": {"name": "cm", "items": [{"key": "a", "path": "../x"}]}}, {}, "must be relative and stay"),
        ({"secret": {"secretName": "none"}}, {}, 'secret "none" not found'),
        ({"hostPath": {"path": "/no/such"}}, {}, "hostPath /no/such does not exist"),
        ({"hostPath": {"path": "/etc", "type": "File"}}, {}, "/etc is not a File"),
        ({"nfs": {"server": "x"}}, {}, "volumes of kind nfs are not supported"),
    ],
)
def test_what_cannot_be_had_is_named(slot: Slot, raw: Any, wanted: Any, message: str) -> None:
    with pytest.raises(VolumeError, match=message) as caught:
        prepare(slot, raw, claims(**wanted))
    assert str(caught.value).startswith('MountVolume.SetUp failed for volume "v" : ')


def test_an_optional_one_that_is_missing_is_empty(slot: Slot) -> None:
    volume = prepare(slot, {"configMap": {"name": "none", "optional": True}})
    assert [one.name for one in volume.path.iterdir() if not one.name.startswith("..")] == []


def test_a_reader_sees_all_of_one_version(tmp_path: Path) -> None:
    assert payload.write(tmp_path / "v", {"a": (b"1", 0o644), "b": (b"1", 0o644)})
    held = (tmp_path / "v" / "..data").resolve()
    assert not payload.write(tmp_path / "v", {"a": (b"1", 0o644), "b": (b"1", 0o644)})
    assert (tmp_path / "v" / "..data").resolve() == held
    assert payload.write(tmp_path / "v", {"a": (b"2", 0o644), "c": (b"2", 0o644)})
    assert (tmp_path / "v" / "..data").resolve() != held
    assert sorted(one.name for one in (tmp_path / "v").iterdir() if not one.name.startswith("..")) == ["a", "c"]
    assert (tmp_path / "v" / "a").read_text() == "2"


def test_a_sub_path_of_a_config_map_stays_at_its_version(slot: Slot) -> None:
    volume = prepare(slot, {"configMap": {"name": "cm"}})
    mounted = volumes.mount_source(volume, "a")
    payload.write(volume.path, {"a": (b"new", 0o644)})
    assert mounted.read_text() == "A"
    assert volumes.mount_source(volume, "a").read_text() == "new"


@pytest.mark.parametrize("sub_path", ["../other", "/etc", "a/../../x"])
def test_a_sub_path_cannot_leave_its_volume(slot: Slot, sub_path: str) -> None:
    with pytest.raises(VolumeError, match="subPath"):
        volumes.mount_source(prepare(slot, {"emptyDir": {}}), sub_path)


def test_a_link_in_a_volume_is_no_way_out(slot: Slot) -> None:
    volume = prepare(slot, {"emptyDir": {}})
    (volume.path / "link").symlink_to("/etc")
    with pytest.raises(VolumeError, match="leads out of the volume"):
        volumes.mount_source(volume, "link")
