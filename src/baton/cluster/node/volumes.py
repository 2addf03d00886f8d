"""Volumes: what each `spec.volumes[]` entry is on this machine, as a host path that a container mounts.

Owns the directories under the slot's `volumes/` and the files of configMap, secret, downwardAPI and projected volumes.
A volume that cannot be had yet raises `VolumeError`, and the pod waits in ContainerCreating. Mounting is `runtime`'s.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from baton.cluster.node import environment, payload
from baton.cluster.node.environment import ContainerConfigError, Lookup, Object
from baton.cluster.node.slots import Slot

DEFAULT_MODE = 0o644


class VolumeError(Exception):
    """A volume is not there (yet); the message names it as the FailedMount event shows it."""


@dataclass(frozen=True, slots=True)
class Volume:
    """One volume of a pod on this machine. `payload_dir` marks those whose files follow the API objects."""

    name: str
    path: Path
    read_only: bool = False
    is_live: bool = False


@dataclass(frozen=True, slots=True)
class Claims:
    """How a claim becomes a directory: the user's `--volume NAME=DIR`, else the volume bound to it, else the default."""

    directories: Mapping[str, Path]
    """Claim name, `namespace/name` or volume name -> directory."""
    default: Callable[[], Path] | None
    """The demo model's directory, made at the first use; None: a claim without a directory waits."""
    claim: Callable[[str, str], Object | None]
    volume: Callable[[str], Object | None]


def prepare(pod: Object, slot: Slot, lookup: Lookup, claims: Claims) -> dict[str, Volume]:
    """Make every volume of the pod ready; by name. Raises `VolumeError` for the first one that is not to be had.

    Called again while the pod runs: directories are kept, files of configMaps and secrets follow their objects.
    """
    result = {}
    for raw in pod["spec"].get("volumes") or []:
        name = str(raw["name"])
        try:
            result[name] = _volume(pod, raw, name, slot, lookup, claims)
        except (ContainerConfigError, ValueError, OSError) as error:
            raise VolumeError(f'MountVolume.SetUp failed for volume "{name}" : {error}') from error
    return result


def mount_source(volume: Volume, sub_path: str) -> Path:
    """The host path behind a mount with subPath. Raises `VolumeError` when it would leave the volume."""
    path = PurePosixPath(sub_path)
    if path.is_absolute() or ".." in path.parts:
        raise VolumeError(f'volume "{volume.name}": subPath {sub_path!r} must be relative and must not contain ".."')
    target = volume.path / sub_path
    if volume.is_live:
        if not target.exists():
            raise VolumeError(f'volume "{volume.name}": subPath {sub_path!r} is not a key of it')
        return _copy(target, volume.path.parent / f".subpath-{volume.name}" / sub_path)
    if not target.resolve().is_relative_to(volume.path.resolve()):
        raise VolumeError(f'volume "{volume.name}": subPath {sub_path!r} leads out of the volume')
    if not target.exists():
        if volume.read_only:
            raise VolumeError(f'volume "{volume.name}": subPath {sub_path!r} does not exist in {volume.path}')
        target.mkdir(parents=True)
    return target


def _copy(source: Path, copy: Path) -> Path:
    """A copy of this moment, which later updates do not reach (as in a kubelet). A copy already mounted stays as it is."""
    part = copy.with_name(f".{copy.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    copy.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, part)
        shutil.rmtree(copy, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)
        shutil.copy(source, part)
    part.replace(copy)
    return copy


def notes(pod: Object) -> list[str]:
    """What of the volumes has no effect on this machine."""
    found = []
    for raw in pod["spec"].get("volumes") or []:
        limit = (raw.get("emptyDir") or {}).get("sizeLimit")
        if limit:
            found.append(f"volume {raw['name']}: sizeLimit {limit} is not enforced")
    return found


def _volume(pod: Object, raw: Object, name: str, slot: Slot, lookup: Lookup, claims: Claims) -> Volume:
    own = slot.volumes / name
    if raw.get("configMap") is not None:
        return _live(own, name, _config_map(raw["configMap"], lookup))
    if raw.get("secret") is not None:
        return _live(own, name, _secret(raw["secret"], lookup))
    if raw.get("downwardAPI") is not None:
        return _live(own, name, _downward(pod, raw["downwardAPI"], slot, lookup))
    if raw.get("projected") is not None:
        return _live(own, name, _projected(pod, raw["projected"], slot, lookup))
    if raw.get("hostPath") is not None:
        return Volume(name, _host_path(raw["hostPath"]))
    if raw.get("persistentVolumeClaim") is not None:
        source = raw["persistentVolumeClaim"]
        path, read_only = _claim(str(source["claimName"]), pod["metadata"]["namespace"], claims)
        return Volume(name, path, read_only or bool(source.get("readOnly")))
    sources = [key for key, value in raw.items() if key != "name" and value is not None]
    if sources and sources != ["emptyDir"]:
        raise ValueError(f"volumes of kind {sources[0]} are not supported by this node")
    path = slot.shm / f"volume-{name}" if (raw.get("emptyDir") or {}).get("medium") == "Memory" else own
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o777)
    return Volume(name, path)


def _live(path: Path, name: str, content: payload.Payload) -> Volume:
    payload.write(path, content)
    return Volume(name, path, read_only=True, is_live=True)


def _pick(kind: str, source: Object, data: dict[str, bytes], mode: int) -> dict[str, tuple[bytes, int]]:
    """All keys, or the chosen ones at their paths."""
    items = source.get("items")
    if not items:
        return {key: (value, mode) for key, value in data.items()}
    result = {}
    for item in items:
        if item["key"] in data:
            result[str(item["path"])] = (data[item["key"]], int(item.get("mode") or mode))
        elif not source.get("optional"):
            raise ContainerConfigError(f"{kind} references non-existent config key: {item['key']}")
    return result


def _config_map(source: Object, lookup: Lookup, mode: int | None = None) -> dict[str, tuple[bytes, int]]:
    found = lookup.config_map(str(source.get("name") or ""))
    mode = int(source.get("defaultMode") or mode or DEFAULT_MODE)
    if found is None:
        if source.get("optional"):
            return {}
        raise ContainerConfigError(f'configmap "{source.get("name")}" not found')
    return _pick("configmap", source, environment.config_data(found), mode)


def _secret(source: Object, lookup: Lookup, mode: int | None = None) -> dict[str, tuple[bytes, int]]:
    name = str(source.get("secretName") or source.get("name") or "")
    found = lookup.secret(name)
    mode = int(source.get("defaultMode") or mode or DEFAULT_MODE)
    if found is None:
        if source.get("optional"):
            return {}
        raise ContainerConfigError(f'secret "{name}" not found')
    return _pick("secret", source, environment.decoded(found), mode)


def _downward(pod: Object, source: Object, slot: Slot, lookup: Lookup) -> dict[str, tuple[bytes, int]]:
    result = {}
    containers = {one["name"]: one for one in pod["spec"]["containers"]}
    for item in source.get("items") or []:
        mode = int(item.get("mode") or source.get("defaultMode") or DEFAULT_MODE)
        if item.get("fieldRef"):
            text = environment.field_value(pod, item["fieldRef"]["fieldPath"], slot.address)
        elif item.get("resourceFieldRef"):
            reference = item["resourceFieldRef"]
            container = containers.get(reference.get("containerName"))
            if container is None:
                raise ContainerConfigError(
                    f"downwardAPI {item['path']}: no container {reference.get('containerName')!r}"
                )
            text = environment.resource_value(container, reference, lookup.allocatable)
        else:
            raise ContainerConfigError(f"downwardAPI {item['path']}: neither fieldRef nor resourceFieldRef")
        result[str(item["path"])] = (text.encode(), mode)
    return result


def _projected(pod: Object, source: Object, slot: Slot, lookup: Lookup) -> dict[str, tuple[bytes, int]]:
    result: dict[str, tuple[bytes, int]] = {}
    mode = source.get("defaultMode")
    for one in source.get("sources") or []:
        if one.get("configMap"):
            result.update(_config_map(one["configMap"], lookup, mode))
        elif one.get("secret"):
            result.update(_secret(one["secret"], lookup, mode))
        elif one.get("downwardAPI"):
            result.update(_downward(pod, {"defaultMode": mode, **one["downwardAPI"]}, slot, lookup))
        else:
            raise ContainerConfigError(
                f"projected source {', '.join(one) or 'without content'} is not supported by this node"
            )
    return result


def _host_path(source: Object) -> Path:
    path, kind = Path(str(source["path"])), str(source.get("type") or "")
    if not path.is_absolute():
        raise ValueError(f"hostPath {path}: must be absolute")
    if kind == "DirectoryOrCreate":
        path.mkdir(parents=True, exist_ok=True)
    elif kind == "FileOrCreate" and not path.exists():
        path.touch()
    checks: dict[str, Callable[[], bool]] = {
        "Directory": path.is_dir, "File": path.is_file, "Socket": path.is_socket,
        "CharDevice": path.is_char_device, "BlockDevice": path.is_block_device,
    }  # fmt: skip
    if kind in checks and not checks[kind]():
        raise ValueError(f"hostPath type check failed: {path} is not a {kind}")
    if not path.exists():
        raise ValueError(f"hostPath {path} does not exist on this machine")
    return path


def _claim(name: str, namespace: str, claims: Claims) -> tuple[Path, bool]:
    """A claim's directory and whether it is read-only."""
    claim = claims.claim(namespace, name)
    if claim is None:
        raise ValueError(f'persistentvolumeclaim "{name}" not found')
    modes: list[str] = list(claim["spec"].get("accessModes") or [])
    read_only = bool(modes) and all(mode == "ReadOnlyMany" for mode in modes)
    volume_name = str(claim["spec"].get("volumeName") or "")
    for key in (f"{namespace}/{name}", name, volume_name):
        if key and key in claims.directories:
            return _existing(claims.directories[key], f"--volume {key}"), read_only
    if (claim.get("status") or {}).get("phase") != "Bound":
        raise ValueError(f'persistentvolumeclaim "{name}" is not bound to a volume')
    volume = claims.volume(volume_name) or {"spec": {}}
    for kind in ("hostPath", "local"):
        if volume["spec"].get(kind):
            return _existing(Path(volume["spec"][kind]["path"]), f"volume {volume_name}"), read_only
    if claims.default is None:
        raise ValueError(f'persistentvolumeclaim "{name}" has no directory on this machine: give --volume {name}=DIR')
    return claims.default(), True


def _existing(path: Path, where: str) -> Path:
    if not path.exists():
        raise ValueError(f"{where}: {path} does not exist on this machine")
    return path


def referenced(pod: Object) -> set[tuple[str, str]]:
    """(kind, name) of every ConfigMap, Secret and claim that the pod's volumes and environment name."""
    found: set[tuple[str, str]] = set()

    def visit(value: Any) -> None:
        if isinstance(value, list):
            for one in value:
                visit(one)
        elif isinstance(value, dict):
            for key, inner in value.items():
                if key in ("configMap", "configMapRef", "configMapKeyRef") and isinstance(inner, dict):
                    found.add(("ConfigMap", str(inner.get("name"))))
                elif key in ("secret", "secretRef", "secretKeyRef") and isinstance(inner, dict):
                    found.add(("Secret", str(inner.get("secretName") or inner.get("name"))))
                elif key == "persistentVolumeClaim" and isinstance(inner, dict):
                    found.add(("PersistentVolumeClaim", str(inner.get("claimName"))))
                visit(inner)

    spec = pod["spec"]
    visit([spec.get("volumes"), spec.get("containers"), spec.get("initContainers")])
    return found
