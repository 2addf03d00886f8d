"""A process that somebody started inside a container (`kubectl exec`), with pipes or a terminal; and an attachment.

The process group is killed when the session closes. Output is pulled by the reader, so a slow reader slows the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import signal
import struct
import termios
from collections.abc import AsyncIterator
from functools import partial

from baton.cluster.node.supervised import Launch

STDOUT, STDERR = 1, 2
READ_BYTES = 32768


class ProcessSession:
    """An `ExecSession` around one process."""

    def __init__(self, process: asyncio.subprocess.Process, terminal: int | None) -> None:
        self._process = process
        self._terminal = terminal
        self._terminal_reader: asyncio.StreamReader | None = None
        self._terminal_transport: asyncio.ReadTransport | None = None

    @classmethod
    async def start(cls, launch: Launch, *, stdin: bool, tty: bool) -> ProcessSession:
        """Raises OSError when the program cannot be started."""
        if not tty:
            process = await asyncio.create_subprocess_exec(
                *launch.argv, env=dict(launch.env), cwd=launch.cwd, start_new_session=True,
                stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            return cls(process, None)
        ours, theirs = pty.openpty()
        try:
            process = await asyncio.create_subprocess_exec(
                *launch.argv, env={"TERM": "xterm", **launch.env}, cwd=launch.cwd,
                stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=partial(_take_terminal, theirs),
            )  # fmt: skip
        except OSError:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        session = cls(process, ours)
        await session._open_terminal(ours)
        return session

    async def _open_terminal(self, terminal: int) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(terminal), "rb", buffering=0)
        )
        self._terminal_reader, self._terminal_transport = reader, transport

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        if self._terminal_reader is not None:
            # Linux answers EIO when the last process has closed the terminal: that is its end of file.
            with contextlib.suppress(OSError):
                while chunk := await self._terminal_reader.read(READ_BYTES):
                    yield STDOUT, chunk
            return
        queue: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue(maxsize=4)

        async def pump(channel: int, stream: asyncio.StreamReader | None) -> None:
            while stream is not None and (chunk := await stream.read(READ_BYTES)):
                await queue.put((channel, chunk))
            await queue.put((channel, b""))

        streams = ((STDOUT, self._process.stdout), (STDERR, self._process.stderr))
        tasks = [asyncio.create_task(pump(*one), name=f"exec output {one[0]}") for one in streams]
        try:
            left = len(tasks)
            while left:
                channel, chunk = await queue.get()
                if chunk:
                    yield channel, chunk
                else:
                    left -= 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def write_stdin(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            if self._terminal is not None:
                await asyncio.to_thread(os.write, self._terminal, data)
            elif self._process.stdin is not None:
                self._process.stdin.write(data)
                await self._process.stdin.drain()

    async def close_stdin(self) -> None:
        if self._terminal is not None:
            await self.write_stdin(b"\x04")
        elif self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    async def resize(self, width: int, height: int) -> None:
        if self._terminal is not None:
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    async def wait(self) -> int:
        code = await self._process.wait()
        return 128 - code if code < 0 else code

    async def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        if self._terminal_transport is not None:
            self._terminal_transport.close()
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None


class AttachSession:
    """What a running container says from now on. Its standard input is not connected: containers have none here."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._ended = asyncio.Event()

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        try:
            async for chunk in self._chunks:
                yield STDOUT, chunk
        finally:
            self._ended.set()

    async def write_stdin(self, data: bytes) -> None:
        pass

    async def close_stdin(self) -> None:
        pass

    async def resize(self, width: int, height: int) -> None:
        pass

    async def wait(self) -> int:
        await self._ended.wait()
        return 0

    async def close(self) -> None:
        self._ended.set()


def _take_terminal(terminal: int) -> None:
    """In the child: a session of its own whose controlling terminal is `terminal`, so that Ctrl-C reaches it.

    By number and not as standard input, and with the session made here: uvloop calls this before it does either.
    """
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
