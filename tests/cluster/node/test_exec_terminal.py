"""A terminal session on the event loop that the daemon runs on."""

from __future__ import annotations

import asyncio
import os

import uvloop

from baton.cluster.node.exec_session import ProcessSession
from baton.cluster.node.supervised import Launch


def test_terminal_session_controls_its_terminal() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(_size_and_interrupt(), timeout=20))


async def _size_and_interrupt() -> None:
    launch = Launch(("sh", "-c", "read size; stty size; tty; sleep 600"), dict(os.environ), "/")
    session = await ProcessSession.start(launch, stdin=True, tty=True)
    try:
        await session.resize(101, 33)
        await session.write_stdin(b"go\n")
        seen = b""
        async for _, chunk in session.output():
            seen += chunk
            if b"/dev/pts/" in seen:
                await session.write_stdin(b"\x03")  # Ctrl-C: only a controlling terminal turns it into a signal
        assert b"33 101" in seen
        assert await session.wait() in (2, 130)
    finally:
        await session.close()
