"""A `NodeConnector` without nodes: logs from memory, exec as local processes, ports on 127.0.0.1."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from baton.cluster.node_connector import LogOptions, NodeError


@dataclass
class FakeContainerLog:
    """Lines of one container; `grown` wakes followers, `ended` lets them go."""

    lines: list[bytes] = field(default_factory=list)
    previous: list[bytes] = field(default_factory=list)
    ended: bool = False
    grown: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def append(self, line: bytes) -> None:
        async with self.grown:
            self.lines.append(line)
            self.grown.notify_all()

    async def end(self) -> None:
        async with self.grown:
            self.ended = True
            self.grown.notify_all()


class ProcessSession:
    """An `ExecSession` over a local process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.sizes: list[tuple[int, int]] = []

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        queue: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()

        async def pump(channel: int, stream: asyncio.StreamReader) -> None:
            while chunk := await stream.read(65536):
                queue.put_nowait((channel, chunk))
            queue.put_nowait((channel, b""))

        assert self._process.stdout and self._process.stderr
        tasks = [
            asyncio.create_task(pump(1, self._process.stdout)),
            asyncio.create_task(pump(2, self._process.stderr)),
        ]
        open_streams = 2
        try:
            while open_streams:
                channel, chunk = await queue.get()
                if chunk:
                    yield channel, chunk
                else:
                    open_streams -= 1
        finally:
            for task in tasks:
                task.cancel()

    async def write_stdin(self, data: bytes) -> None:
        assert self._process.stdin
        self._process.stdin.write(data)
        await self._process.stdin.drain()

    async def close_stdin(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()

    async def resize(self, width: int, height: int) -> None:
        self.sizes.append((width, height))

    async def wait(self) -> int:
        code = await self._process.wait()
        return code if code >= 0 else 128 - code

    async def close(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


class FakeNodes:
    """Every pod's port N is 127.0.0.1:`ports[N]`; every exec is a process of this machine."""

    def __init__(self) -> None:
        self.containers: dict[tuple[str, str, str], FakeContainerLog] = {}
        self.ports: dict[int, int] = {}
        self.log_options: list[LogOptions] = []
        self.followers = 0

    def log_of(self, namespace: str, pod: str, container: str) -> FakeContainerLog:
        return self.containers.setdefault((namespace, pod, container), FakeContainerLog())

    async def logs(self, namespace: str, pod: str, container: str, options: LogOptions) -> AsyncIterator[bytes]:
        self.log_options.append(options)
        log = self.containers.get((namespace, pod, container))
        if log is None:
            raise NodeError(f'container "{container}" in pod "{pod}" is waiting to start: ContainerCreating')
        if options.previous and not log.previous:
            raise NodeError(f'previous terminated container "{container}" in pod "{pod}" not found')
        lines = log.previous if options.previous else log.lines
        position = max(0, len(lines) - options.tail_lines) if options.tail_lines is not None else 0
        self.followers += 1
        try:
            while True:
                for line in lines[position:]:
                    yield b"2026-01-01T00:00:00.000000000Z " + line if options.timestamps else line
                position = len(lines)
                if not options.follow or log.ended:
                    return
                async with log.grown:
                    if len(lines) == position and not log.ended:
                        await log.grown.wait()
        finally:
            self.followers -= 1

    async def exec(
        self, namespace: str, pod: str, container: str, command: list[str], *, stdin: bool, tty: bool
    ) -> ProcessSession:
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe if stdin else asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
            )
        except OSError as error:
            raise NodeError(f"exec failed: {command[0]}: {error.strerror}", code=500) from None
        return ProcessSession(process)

    async def attach(self, namespace: str, pod: str, container: str, *, stdin: bool, tty: bool) -> ProcessSession:
        return await self.exec(namespace, pod, container, ["cat"], stdin=stdin, tty=tty)

    async def connect(self, namespace: str, pod: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if port not in self.ports:
            raise NodeError(f"connection refused: nothing listens on port {port} of pod {pod}", code=500)
        return await asyncio.open_connection("127.0.0.1", self.ports[port])
