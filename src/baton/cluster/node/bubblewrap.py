"""Containers under bubblewrap: the host's files read-only, volumes at the manifest's own paths.

There is no network namespace (pods talk over loopback addresses) and no pid namespace (the agent sees real pids). Works
as root and, where user namespaces are permitted, as anyone. What is mounted is decided here, as a pure function of the
plan and of which host paths exist.

A mount point below a read-only host directory that does not have it (`/etc/rbg`, `/var/lib/etcd`) cannot be made by
bwrap. Such a directory is *opened*: replaced by an empty one into which each of its entries is bound again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from baton.cluster.node.runtime import ContainerPlan, Mount, PlanError
from baton.cluster.node.shim import ARGS_FD, STATUS_FD
from baton.cluster.node.supervised import Launch, not_found

_OWN_DIRECTORIES = ("/dev", "/proc", "/tmp")
_PRIVATE = ("/tmp", "/dev/shm")


class Bubblewrap:
    name = "bubblewrap"

    def __init__(self, program: str) -> None:
        self._program = program

    def launch(self, plan: ContainerPlan) -> Launch:
        argv = (
            self._program, "--args", str(ARGS_FD), "--json-status-fd", str(STATUS_FD), "--", *plan.argv
        )  # fmt: skip
        return Launch(argv, plan.env, "/", tuple(arguments(plan)), error=_not_found(plan))

    def enter(self, launched: Launch, command: Sequence[str]) -> Launch:
        # The same mounts again make the same view: every writable place is a directory of the slot.
        return Launch((self._program, *(launched.bwrap_args or ()), "--", *command), launched.env, "/")


def arguments(plan: ContainerPlan) -> list[str]:
    """bwrap's options for one container. Raises `PlanError` for a mount that cannot be made."""
    _refuse_hiding(plan)
    mounts = sorted((*plan.mounts, *_own_mounts(plan)), key=lambda mount: len(_parts(mount.target)))
    opened = _opened(mount.target for mount in mounts)
    args = ["--die-with-parent", "--unshare-uts", "--hostname", plan.hostname]
    args += _open(PurePosixPath("/"), opened)
    args += ["--dev-bind", "/dev", "/dev", "--bind", "/proc", "/proc"]
    args += ["--bind", str(plan.scratch), "/tmp", "--bind", str(plan.shm), "/dev/shm"]
    for path in plan.keep:
        if any(_is_below(path, hidden) for hidden in _PRIVATE):
            args += ["--ro-bind", path, path]
    for mount in mounts:
        args += ["--ro-bind" if mount.read_only else "--bind", str(mount.source), _clean(mount.target)]
    return [*args, "--chdir", plan.cwd]


def _refuse_hiding(plan: ContainerPlan) -> None:
    """A container that runs our programs needs them: with the machine's own instead, it would listen on all addresses."""
    places = plan.env.get("PATH", "").split(":")
    ours = [place for place in places if any(_is_below(place, kept) for kept in plan.keep)]
    for mount in plan.mounts:
        for path in ours:
            if _is_below(path, _clean(mount.target)):
                raise PlanError(
                    f"mountPath {mount.target!r} hides {path}, which Baton runs from on this machine: "
                    "choose another mountPath, move Baton, or use --isolation plain"
                )


def _not_found(plan: ContainerPlan) -> str | None:
    """What an exec in the container would say of a program that is not there. bwrap itself only exits with 1."""
    program = plan.argv[0]
    places = [program] if "/" in program else [f"{one}/{program}" for one in plan.env.get("PATH", "").split(":")]
    if any(_on_host(plan, place).is_file() for place in places):
        return None
    return not_found(program)


def _on_host(plan: ContainerPlan, path: str) -> Path:
    """Where a path of the container lies on this machine (volumes on volumes: the longest mount path counts)."""
    whole = path if path.startswith("/") else f"{plan.cwd}/{path}"
    for mount in sorted(plan.mounts, key=lambda one: -len(_parts(one.target))):
        if _is_below(whole, _clean(mount.target)):
            return mount.source / whole[len(_clean(mount.target)) :].lstrip("/")
    if any(_is_below(whole, hidden) for hidden in _PRIVATE) and not any(_is_below(whole, kept) for kept in plan.keep):
        return plan.scratch / whole.removeprefix("/tmp").lstrip("/")
    return Path(whole)


def _own_mounts(plan: ContainerPlan) -> list[Mount]:
    """The hosts file and the shared directories; a volume of the manifest at the same path wins."""
    taken = {_clean(mount.target) for mount in plan.mounts}
    own = [Mount(plan.hosts, "/etc/hosts", read_only=False)]
    own += [Mount(Path(path), path, read_only=False) for path in plan.share if Path(path).is_dir()]
    return [mount for mount in own if mount.target not in taken]


def _opened(targets: Iterable[str]) -> set[PurePosixPath]:
    """Host directories that have to be opened so that every target can be a mount point."""
    opened = {PurePosixPath("/")}
    for target in targets:
        if not target.startswith("/") or _clean(target) == "/" or ".." in _parts(target):
            raise PlanError(f"mountPath {target!r} must be an absolute path below /")
        here = PurePosixPath("/")
        for part in _parts(target):
            if str(here) in _OWN_DIRECTORIES or not Path(here).is_dir():
                break
            if not os.path.lexists(here / part):
                opened.update((here, *here.parents))
            here = here / part
    return opened


def _open(directory: PurePosixPath, opened: set[PurePosixPath]) -> list[str]:
    """Options that bind every entry of a host directory; those in `opened` entry by entry."""
    args: list[str] = []
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except PermissionError:
        return args
    for entry in entries:
        path = directory / entry.name
        if str(path) in _OWN_DIRECTORIES:
            continue
        if entry.is_symlink():
            args += ["--symlink", os.readlink(path), str(path)]  # noqa: PTH115
        elif entry.is_dir(follow_symlinks=False) and path in opened:
            args += ["--dir", str(path), *_open(path, opened)]
        else:
            args += ["--ro-bind-try", str(path), str(path)]
    return args


def _clean(target: str) -> str:
    return "/" + "/".join(_parts(target))


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part and part != "."]


def _is_below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent + "/")
