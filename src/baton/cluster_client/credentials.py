"""What we send to prove who we are. Tokens are never logged and never part of an error text."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from baton.cluster_client.errors import ConfigError

_PLUGIN_TIMEOUT_S = 60.0
# Projected service-account tokens rotate; kubelet rewrites the file well before the old one ends.
_TOKEN_FILE_REREAD_S = 60.0
_EXPIRY_MARGIN_S = 30.0


class Credentials(Protocol):
    """Gives the headers of the next request; may run a plug-in or read a file first."""

    async def headers(self) -> dict[str, str]: ...


@dataclass(frozen=True, slots=True)
class NoAuth:
    async def headers(self) -> dict[str, str]:
        return {}


@dataclass(frozen=True, slots=True)
class StaticToken:
    token: str = field(repr=False)

    async def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


@dataclass(frozen=True, slots=True)
class BasicAuth:
    username: str
    password: str = field(repr=False)

    async def headers(self) -> dict[str, str]:
        pair = base64.b64encode(f"{self.username}:{self.password}".encode()).decode()
        return {"Authorization": f"Basic {pair}"}


class TokenFile:
    """A token in a file that somebody else renews."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._token = ""
        self._read_at = float("-inf")

    async def headers(self) -> dict[str, str]:
        if time.monotonic() - self._read_at > _TOKEN_FILE_REREAD_S:
            try:
                self._token = self.path.read_text().strip()
            except OSError as error:
                raise ConfigError(f"token file {self.path}: {error}") from error
            self._read_at = time.monotonic()
        return {"Authorization": f"Bearer {self._token}"}


class ExecPlugin:
    """A credential plug-in (client.authentication.k8s.io): a program that prints an ExecCredential.

    Only tokens are taken; a plug-in that returns client certificates is refused with its name.
    """

    def __init__(self, command: str, args: list[str], env: dict[str, str], api_version: str) -> None:
        self.command, self.args, self.env, self.api_version = command, args, env, api_version
        self._token = ""
        self._expires_at = float("-inf")
        self._lock = asyncio.Lock()

    @classmethod
    def from_config(cls, section: dict[str, Any], path: Path) -> ExecPlugin:
        command = str(section.get("command") or "")
        if not command:
            raise ConfigError(f"kubeconfig {path}: users[].user.exec.command is missing")
        if "/" in command and not Path(command).is_absolute():
            command = str(path.parent / command)
        env = {str(pair["name"]): str(pair["value"]) for pair in section.get("env") or []}
        args = [str(arg) for arg in section.get("args") or []]
        return cls(command, args, env, str(section.get("apiVersion") or "client.authentication.k8s.io/v1"))

    async def headers(self) -> dict[str, str]:
        async with self._lock:
            if time.time() > self._expires_at - _EXPIRY_MARGIN_S:
                await self._renew()
        return {"Authorization": f"Bearer {self._token}"}

    async def _renew(self) -> None:
        if shutil.which(self.command) is None:
            raise ConfigError(f"credential plug-in {self.command!r} is not installed")
        info = {"apiVersion": self.api_version, "kind": "ExecCredential", "spec": {"interactive": False}}
        process = await asyncio.create_subprocess_exec(
            self.command,
            *self.args,
            env={**os.environ, **self.env, "KUBERNETES_EXEC_INFO": json.dumps(info)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), _PLUGIN_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise ConfigError(
                f"credential plug-in {self.command!r} gave no answer in {_PLUGIN_TIMEOUT_S:g} s"
            ) from None
        if process.returncode != 0:
            text = err.decode(errors="replace").strip()[-300:]
            raise ConfigError(f"credential plug-in {self.command!r} ended with {process.returncode}: {text}")
        try:
            status = json.loads(out)["status"]
            self._token = status["token"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"credential plug-in {self.command!r} printed no status.token") from error
        expiry = status.get("expirationTimestamp")
        self._expires_at = datetime.fromisoformat(expiry).timestamp() if expiry else float("inf")
