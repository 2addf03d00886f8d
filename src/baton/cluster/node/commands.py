"""Short-lived processes inside a container: probes and lifecycle hooks of kind exec. `exec_session` is for people."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass

from baton.cluster.node.supervised import Launch

MAX_OUTPUT_BYTES = 10240


@dataclass(frozen=True, slots=True)
class Done:
    """`code` as a shell sees it; `output`: stdout and stderr together, cut."""

    code: int
    output: str


async def run(launch: Launch, timeout_s: float) -> Done:
    """Run to the end. Raises TimeoutError (the process group is killed then), OSError when it cannot be started."""
    process = await asyncio.create_subprocess_exec(
        *launch.argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env=dict(launch.env), cwd=launch.cwd, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    kept = bytearray()

    async def drain(stream: asyncio.StreamReader) -> None:
        while chunk := await stream.read(4096):
            kept.extend(chunk[: MAX_OUTPUT_BYTES - len(kept)])

    try:
        async with asyncio.timeout(timeout_s):
            await drain(process.stdout)
            code = await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    return Done(128 - code if code < 0 else code, kept.decode(errors="replace").strip())
