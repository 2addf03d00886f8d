"""Containers without namespaces: the same pods, with the manifest's volume paths rewritten to the slot's directory.

Costs, said by `isolation.choose`: a program that builds a volume's path by itself does not find it, /tmp and /dev/shm are
the machine's, files are not protected from the program, and names resolve only in Python programs (`pyhook`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from baton.cluster.node.runtime import HOSTS_VARIABLE, PATHS_VARIABLE, ContainerPlan, PlanError
from baton.cluster.node.supervised import Launch, not_found

_BOUNDARY_BEFORE = r"(?<![\w.~/-])"
_BOUNDARY_AFTER = r"(?![\w.-])"


class Plain:
    name = "plain"

    def launch(self, plan: ContainerPlan) -> Launch:
        root = _build_tree(plan)
        paths = {clean(mount.target): f"{root}{clean(mount.target)}" for mount in plan.mounts}
        rewrite = rewriter(paths)
        env = {key: rewrite(value) for key, value in plan.env.items()}
        env["TMPDIR"] = str(plan.scratch)
        if plan.env.get("HOME", "/tmp") == "/tmp":
            env["HOME"] = str(plan.scratch)
        env[HOSTS_VARIABLE] = str(plan.hosts)
        env[PATHS_VARIABLE] = ":".join(f"{path}={target}" for target, path in paths.items())
        cwd = str(plan.scratch) if plan.cwd == "/" else rewrite(plan.cwd)
        argv = tuple(rewrite(word) for word in plan.argv)
        found = shutil.which(argv[0] if "/" not in argv[0] else str(Path(cwd, argv[0])), path=env.get("PATH"))
        return Launch(argv, env, cwd, error=None if found else not_found(argv[0]))

    def enter(self, launched: Launch, command: Sequence[str]) -> Launch:
        pairs = (pair.partition("=") for pair in launched.env.get(PATHS_VARIABLE, "").split(":") if pair)
        rewrite = rewriter({target: path for path, _, target in pairs})
        return Launch(tuple(rewrite(word) for word in command), launched.env, launched.cwd)


def rewriter(paths: Mapping[str, str]) -> Callable[[str], str]:
    """A function that replaces each mount path (key) in a text, on path boundaries, by where it lies (value).

    Longest paths first, in one pass, so that `/models` never touches what `/models/a` became.
    """
    if not paths:
        return lambda text: text
    targets = sorted(paths, key=len, reverse=True)
    pattern = re.compile(f"{_BOUNDARY_BEFORE}({'|'.join(re.escape(one) for one in targets)}){_BOUNDARY_AFTER}")
    return lambda text: pattern.sub(lambda match: paths[match[1]], text)


def clean(target: str) -> str:
    parts = [part for part in target.split("/") if part and part != "."]
    if not target.startswith("/") or not parts or ".." in parts:
        raise PlanError(f"mountPath {target!r} must be an absolute path below /")
    return "/" + "/".join(parts)


def _root(plan: ContainerPlan) -> Path:
    return plan.scratch.parent / "root"


def _build_tree(plan: ContainerPlan) -> Path:
    """A directory in which each mount path is a link to its volume. A mount inside another volume is refused by name."""
    root = _root(plan)
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for mount in sorted(plan.mounts, key=lambda one: len(clean(one.target))):
        link = root / clean(mount.target)[1:]
        if not link.parent.resolve().is_relative_to(root.resolve()):
            raise PlanError(
                f"mountPath {mount.target!r} lies inside another volume, which plain isolation cannot do: use bubblewrap"
            )
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() or link.exists():
            raise PlanError(
                f"mountPath {mount.target!r} holds another mount, which plain isolation cannot do: use bubblewrap"
            )
        link.symlink_to(mount.source)
    return root
