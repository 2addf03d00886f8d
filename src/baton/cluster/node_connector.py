"""What the API server asks of the nodes: logs, exec and attach, and a connection to a pod's port.

Owns the contract only. `baton.cluster.apiserver` calls it for the `log`, `exec`, `attach` and `portforward`
subresources; the node agent implements it; `tests/fakes/node_connector.py` is the fake. The pod was found in storage
before any call, so a connector only has to know what runs.
"""

from __future__ import annotations

from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol


class NodeError(Exception):
    """The node cannot do what was asked; `message` is shown to the user as it stands.

    `code` is the HTTP status: 400 for a request that cannot succeed now (container not running, no previous log),
    404 for an unknown container, 500 for trouble of the node itself.
    """

    def __init__(self, message: str, *, code: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


@dataclass(frozen=True, slots=True)
class LogOptions:
    """What part of a container's log is wanted."""

    follow: bool = False
    previous: bool = False
    tail_lines: int | None = None
    since_s: float | None = None
    timestamps: bool = False
    limit_bytes: int | None = None


class ExecSession(Protocol):
    """One process (or one attached container) with its streams.

    `output` yields `(channel, bytes)` with channel 1 (stdout, or everything for a tty) or 2 (stderr) and ends when
    both are closed. `close` kills what still runs and is safe to call twice.
    """

    def output(self) -> AsyncIterator[tuple[int, bytes]]: ...

    async def write_stdin(self, data: bytes) -> None: ...

    async def close_stdin(self) -> None: ...

    async def resize(self, width: int, height: int) -> None: ...

    async def wait(self) -> int:
        """The exit code; for a process killed by signal N: 128 + N. 0 for an attach that ended."""
        ...

    async def close(self) -> None: ...


class NodeConnector(Protocol):
    """The way from the API server to what runs on the nodes. Every method raises `NodeError`."""

    def logs(self, namespace: str, pod: str, container: str, options: LogOptions) -> AsyncIterator[bytes]:
        """Bytes of the container's log as they come; an error is raised before the first chunk."""
        ...

    async def exec(
        self, namespace: str, pod: str, container: str, command: list[str], *, stdin: bool, tty: bool
    ) -> ExecSession: ...

    async def attach(self, namespace: str, pod: str, container: str, *, stdin: bool, tty: bool) -> ExecSession: ...

    async def connect(self, namespace: str, pod: str, port: int) -> tuple[StreamReader, StreamWriter]:
        """A TCP connection to `port` on the pod's own address."""
        ...
