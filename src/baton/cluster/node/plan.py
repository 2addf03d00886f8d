"""From a pod's container to a `ContainerPlan`: command and args, environment, working directory, mounts.

Pure but for looking at which directories exist. Raises `ContainerConfigError` with Kubernetes' words for what is wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import baton
from baton.cluster.node import environment, podhook, volumes
from baton.cluster.node.environment import ContainerConfigError, Lookup, Object
from baton.cluster.node.images import ImageMapping, machine_variables
from baton.cluster.node.runtime import POD_IP_VARIABLE, PYHOOK, ContainerPlan, Mount
from baton.cluster.node.slots import Slot

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_INHERITED = ("TZ", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
"""Of the daemon's own environment: what describes the machine rather than the user."""


@dataclass(frozen=True, slots=True)
class PodContext:
    """What all containers of one pod share."""

    pod: Object
    slot: Slot
    lookup: Lookup
    volumes: Mapping[str, volumes.Volume]
    services: Mapping[str, str]


def hostname(pod: Object) -> str:
    return str(pod["spec"].get("hostname") or pod["metadata"]["name"])[:63]


def build(context: PodContext, container: Object, image: ImageMapping) -> ContainerPlan:
    """The plan of one container; `image` is resolved for this pod."""
    own = environment.build(context.pod, container, context.slot.address, context.lookup, context.services)
    env = _machine_env(context, image) | dict(image.env) | own
    env["PATH"] = _joined(image.path, own.get("PATH") or DEFAULT_PATH)
    env["PYTHONPATH"] = _joined((str(PYHOOK), *image.pythonpath), own.get("PYTHONPATH"))
    hook = podhook.library(Path(machine_variables()["CACHE"]) / "baton" / "node")
    if hook is not None:
        env["LD_PRELOAD"] = _joined((str(hook),), own.get("LD_PRELOAD"))
    directory = context.slot.container_dir(container["name"])
    mounts = _mounts(context, container, own)
    return ContainerPlan(
        argv=_argv(container, own, image),
        env=env,
        cwd=str(container.get("workingDir") or "/"),
        mounts=(*mounts, *_image_mounts(image, mounts)),
        share=image.share,
        keep=(*_kept(image), *([str(hook)] if hook else [])),
        hostname=hostname(context.pod),
        hosts=context.slot.hosts,
        shm=context.slot.shm / "shm",
        scratch=directory / "tmp",
    )


def _argv(container: Object, env: Mapping[str, str], image: ImageMapping) -> tuple[str, ...]:
    command = [environment.expand(str(word), env) for word in container.get("command") or []]
    args = [environment.expand(str(word), env) for word in container.get("args") or []]
    if command:
        return (*image.rewrite(command), *args)
    if not image.entrypoint and not args:
        raise ContainerConfigError(
            f'no command specified, and image "{container.get("image") or ""}" stands for no program here'
        )
    return image.rewrite((*image.entrypoint, *args))


def _machine_env(context: PodContext, image: ImageMapping) -> dict[str, str]:
    env = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    env.setdefault("LANG", "C.UTF-8")
    return env | {
        "HOME": "/tmp",
        "HOSTNAME": hostname(context.pod),
        "PYTHONUNBUFFERED": "1",
        POD_IP_VARIABLE: context.slot.address,
    }


def _joined(first: tuple[str, ...], rest: str | None) -> str:
    return ":".join((*first, *([rest] if rest else ())))


def _kept(image: ImageMapping) -> tuple[str, ...]:
    """Our code and the image's programs, even when a private /tmp would hide them."""
    places = [sys.prefix, sys.base_prefix, str(Path(baton.__file__).parent.parent), *image.path, *image.pythonpath]
    return tuple(dict.fromkeys(place for place in places if Path(place).exists()))


def _mounts(context: PodContext, container: Object, env: Mapping[str, str]) -> list[Mount]:
    result = []
    for raw in container.get("volumeMounts") or []:
        volume = context.volumes.get(raw["name"])
        if volume is None:
            raise ContainerConfigError(
                f'container "{container["name"]}" mounts volume "{raw["name"]}", which the pod does not have'
            )
        sub_path = str(raw.get("subPath") or environment.expand(str(raw.get("subPathExpr") or ""), env))
        try:
            source = volumes.mount_source(volume, sub_path) if sub_path else volume.path
        except volumes.VolumeError as problem:
            raise ContainerConfigError(str(problem)) from problem
        result.append(Mount(source, str(raw["mountPath"]), volume.read_only or bool(raw.get("readOnly"))))
    return result


def _image_mounts(image: ImageMapping, given: list[Mount]) -> list[Mount]:
    """What the image has at fixed paths, where no volume of the manifest lies above or below."""

    def is_apart(target: str) -> bool:
        own = f"{target.rstrip('/')}/"
        taken = [f"{mount.target.rstrip('/')}/" for mount in given]
        return not any(own.startswith(path) or path.startswith(own) for path in taken)

    return [Mount(Path(source), target, True) for target, source in image.mounts.items() if is_apart(target)]
