"""The directory of one embedded cluster, and which process is its daemon.

Owns the layout of `$BATON_HOME`, the lock that makes the daemon the only one, its record (pid, addresses), the settings
that outlive it (isolation, volumes, port and token of the API server). Starts and stops nothing (`launch`).
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from baton.cluster_client import ClusterConfig
from baton.cluster_client.credentials import StaticToken

HOST = "127.0.0.1"
"""Where the API server and what is published listen."""
ISOLATIONS = ("auto", "bubblewrap", "plain")


class HomeError(Exception):
    """The directory cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ClusterHome:
    """Paths of one cluster. `root` is $BATON_HOME; what the daemon itself keeps is under `root/cluster`."""

    root: Path

    @classmethod
    def find(cls, root: Path | None = None) -> ClusterHome:
        """`root`, else $BATON_HOME, else ~/.baton; made when missing, readable by its owner only."""
        path = (root or Path(os.environ.get("BATON_HOME") or Path.home() / ".baton")).expanduser().absolute()
        home = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            home.directory.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise HomeError(f"{path}: {error.strerror}; set BATON_HOME to a directory you may write") from None
        return home

    @property
    def directory(self) -> Path:
        return self.root / "cluster"

    @property
    def volumes(self) -> Path:
        """Directories of claims that are neither given by the user nor the demo model."""
        return self.root / "volumes"

    @property
    def database(self) -> Path:
        return self.directory / "state.db"

    @property
    def log(self) -> Path:
        return self.directory / "daemon.log"

    @property
    def kubeconfig(self) -> Path:
        return self.directory / "kubeconfig"

    @property
    def bin(self) -> Path:
        return self.directory / "bin"

    @property
    def record_file(self) -> Path:
        return self.directory / "daemon.json"

    @property
    def settings_file(self) -> Path:
        return self.directory / "settings.json"

    @contextmanager
    def held(self, role: str = "daemon") -> Iterator[None]:
        """Be the one process of this role here. Raises `HomeError` when another is; the system frees it at death."""
        with (self.directory / f"{role}.lock").open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HomeError(f"{self.root}: another {role} runs here") from None
            yield

    def is_held(self, role: str = "daemon") -> bool:
        """Whether a process of this role lives, whatever files say."""
        try:
            with (self.directory / f"{role}.lock").open("r") as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Held by a command that starts or stops the daemon, so that two at once do not start two."""
        with (self.directory / "start.lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


@dataclass(frozen=True, slots=True)
class DaemonRecord:
    """What a living daemon tells about itself. Written when its API answers, valid only while the lock is held."""

    pid: int
    server: str
    isolation: str
    isolation_note: str = ""
    version: str = ""

    def client_config(self, home: ClusterHome) -> ClusterConfig:
        return Settings.read(home).client_config(self.server)

    def write(self, home: ClusterHome) -> None:
        write_private(home.record_file, json.dumps(asdict(self)))

    @classmethod
    def read(cls, home: ClusterHome) -> DaemonRecord | None:
        """The record of the daemon that lives now, None when none does or it is not ready yet."""
        content = _read_object(home.record_file)
        if not content or not home.is_held():
            return None
        try:
            return cls(**{one.name: content[one.name] for one in fields(cls)})
        except KeyError:
            return None


@dataclass(frozen=True, slots=True)
class Settings:
    """What a cluster remembers from one `baton up` to the next. `volumes`: claim name -> directory of this machine."""

    isolation: str = "auto"
    api_port: int = 0
    token: str = field(default="", repr=False)
    volumes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, home: ClusterHome) -> Settings:
        """Raises `HomeError` when the file is damaged, naming it."""
        if not home.settings_file.exists():
            return cls(token=secrets.token_urlsafe(32))
        content = _read_object(home.settings_file)
        known = {one.name: content[one.name] for one in fields(cls) if one.name in content}
        settings = cls(**known)
        if not settings.token or settings.isolation not in ISOLATIONS:
            raise HomeError(f"{home.settings_file}: damaged; remove it (`baton down --purge` forgets everything)")
        return settings

    def client_config(self, server: str) -> ClusterConfig:
        """How processes of ours reach the API server: the token in a header, where no error message shows it."""
        return ClusterConfig(server=server, credentials=StaticToken(self.token))

    def write(self, home: ClusterHome) -> None:
        write_private(home.settings_file, json.dumps(asdict(self), indent=1))


def write_private(path: Path, text: str) -> None:
    """Whole or not at all, mode 0600, on disk when this returns."""
    descriptor, part = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    Path(part).replace(path)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
