"""The image catalogue: what an image name means on this machine.

Owns the YAML files (the shipped `images.yaml` and `$BATON_HOME/images.yaml`, which is asked first and read again when it
changes) and the matching. No image is ever pulled. How the mapping becomes a process is `plan`'s and `runtime`'s affair.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

import baton

_SHIPPED = Path(__file__).with_name("images.yaml")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_LISTS = ("match", "entrypoint", "path", "pythonpath", "share")
_MAPS = ("env", "mounts")
_FIELDS = {"name", "note", "hint", "commands", *_LISTS, *_MAPS}


class CatalogueError(Exception):
    """A catalogue file cannot be used; the message names the file and the field."""


@dataclass(frozen=True, slots=True)
class ImageMapping:
    """One entry, with its variables still in it (`resolve` fills them for a pod)."""

    name: str
    note: str = ""
    match: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    commands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    pythonpath: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    mounts: Mapping[str, str] = field(default_factory=dict)
    """Path in the container -> path on this machine, read-only."""
    share: tuple[str, ...] = ()
    hint: str = ""
    source: str = ""

    @property
    def is_unknown(self) -> bool:
        return self.name == UNKNOWN_NAME

    @property
    def image_id(self) -> str:
        """What `kubectl describe` shows as the image id."""
        return f"baton://{self.name} ({self.note})" if self.note else f"baton://{self.name}"

    def matches(self, image: str) -> bool:
        bare = image.partition("@")[0]
        last = bare.rpartition("/")[2]
        return any(fnmatchcase(one, pattern) for pattern in self.match for one in (bare, last, last.partition(":")[0]))

    def resolve(self, pod_ip: str) -> ImageMapping:
        """The entry with `${...}` filled for one pod. Unknown variables were refused when the file was read."""
        values = {**machine_variables(), "POD_IP": pod_ip}

        def fill(text: str) -> str:
            return _VARIABLE.sub(lambda match: values[match[1]], text)

        def fill_all(texts: Sequence[str]) -> tuple[str, ...]:
            return tuple(fill(text) for text in texts)

        return ImageMapping(
            name=self.name, note=self.note, match=self.match, entrypoint=fill_all(self.entrypoint),
            commands={key: fill_all(value) for key, value in self.commands.items()}, path=fill_all(self.path),
            pythonpath=fill_all(self.pythonpath), env={key: fill(value) for key, value in self.env.items()},
            mounts={key: fill(value) for key, value in self.mounts.items()}, share=fill_all(self.share),
            hint=self.hint, source=self.source,
        )  # fmt: skip

    def rewrite(self, command: Sequence[str]) -> tuple[str, ...]:
        """The command with its first word replaced where the entry says so (by full path, then by bare name)."""
        replacement = self.commands.get(command[0]) if command else None
        return (*replacement, *command[1:]) if replacement else tuple(command)


UNKNOWN_NAME = "host"
UNKNOWN = ImageMapping(UNKNOWN_NAME, note="not in the catalogue: runs with this machine's programs")


class Catalogue:
    """The user's entries, then the shipped ones."""

    def __init__(self, home: Path) -> None:
        self._user_file = home / "images.yaml"
        self._shipped = load(_SHIPPED)
        self._user: tuple[ImageMapping, ...] = ()
        self._seen: float | None = None
        self.reload()

    def find(self, image: str) -> ImageMapping:
        """The first entry that matches, else `UNKNOWN`. Raises `CatalogueError` when the user's file became unusable."""
        self.reload()
        for entry in (*self._user, *self._shipped):
            if entry.matches(image):
                return entry
        return UNKNOWN

    def reload(self) -> None:
        try:
            changed = self._user_file.stat().st_mtime
        except FileNotFoundError:
            self._user, self._seen = (), None
            return
        if changed != self._seen:
            self._user = load(self._user_file)
            self._seen = changed


def machine_variables() -> dict[str, str]:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return {
        "BIN": str(Path(sys.executable).parent),
        "PYTHON": sys.executable,
        "STANDINS": str(Path(baton.__file__).parent / "standins"),
        "CACHE": cache,
    }


def load(path: Path) -> tuple[ImageMapping, ...]:
    """Read one catalogue file. Raises `CatalogueError` naming file and field."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogueError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise CatalogueError(f"{path}: {' '.join(str(error).split())}") from error
    if content is None:
        return ()
    if not isinstance(content, dict) or not isinstance(content.get("images"), list) or len(content) != 1:
        raise CatalogueError(f"{path}: wants one key, 'images', with a list")
    return tuple(_entry(path, f"images[{index}]", raw) for index, raw in enumerate(content["images"]))


def _entry(path: Path, where: str, raw: Any) -> ImageMapping:
    def refuse(field_name: str, problem: str) -> CatalogueError:
        return CatalogueError(f"{path}: {where}{'.' if field_name else ''}{field_name}: {problem}")

    if not isinstance(raw, dict):
        raise refuse("", "wants a mapping")
    for key in raw:
        if key not in _FIELDS:
            raise refuse(str(key), f"unknown field; known are {', '.join(sorted(_FIELDS))}")
    for key in ("name", "note", "hint"):
        if not isinstance(raw.get(key, ""), str):
            raise refuse(key, "wants a text")
    if not raw.get("name"):
        raise refuse("name", "is required")
    if not raw.get("match"):
        raise refuse("match", "is required: a list of patterns")
    lists = {key: _texts(raw.get(key, []), lambda problem, key=key: refuse(key, problem)) for key in _LISTS}
    maps = {key: raw.get(key) or {} for key in _MAPS}
    for key, value in maps.items():
        if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
            raise refuse(key, "wants a mapping of texts")
    commands = raw.get("commands") or {}
    if not isinstance(commands, dict):
        raise refuse("commands", "wants a mapping of lists")
    rewrites = {str(k): _texts(v, lambda problem, k=k: refuse(f"commands.{k}", problem)) for k, v in commands.items()}
    known = {*machine_variables(), "POD_IP"}
    texts = [
        one
        for many in (*lists.values(), *rewrites.values(), *(each.values() for each in maps.values()))
        for one in many
    ]
    for text in texts:
        for name in _VARIABLE.findall(text):
            if name not in known:
                raise refuse("", f"unknown variable ${{{name}}}; known are {', '.join(sorted(known))}")
    return ImageMapping(
        name=raw["name"], note=raw.get("note", ""), hint=raw.get("hint", ""), commands=rewrites, source=str(path),
        env=maps["env"], mounts=maps["mounts"], **lists
    )  # fmt: skip


def _texts(value: Any, refuse: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise refuse("wants a list of texts")
    return tuple(value)
