"""The program: starts, says what has no effect, refuses a used port, stops on SIGTERM."""

import asyncio
import os
import signal
import sys

from tests.fakes.fake_worker import FakeWorker
from tests.fakes.router_bed import WAIT_S, connect, eventually, http_request


async def start(*argv: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "baton.router.launch", *argv, stderr=asyncio.subprocess.PIPE, env=dict(os.environ)
    )


async def line_with(process: asyncio.subprocess.Process, word: str) -> str:
    assert process.stderr is not None
    async with asyncio.timeout(WAIT_S):
        while line := (await process.stderr.readline()).decode():
            if word in line:
                return line
    raise AssertionError(f"the router ended without saying {word!r}")


async def test_it_serves_notes_and_stops_on_sigterm():
    worker = await FakeWorker("regular").start()
    process = await start("--worker-urls", worker.url, "--port", "0", "--log-interval", "3", "--access-log")
    try:
        await line_with(process, "--log-interval has no effect")
        listening = await line_with(process, "router listens")
        port = int(listening.partition("port=")[2].split()[0])
        await line_with(process, "worker is healthy")
        client = await connect(port)
        worker.faults.hang = False
        worker.gate = asyncio.Event()
        client.send(http_request("/v1/completions", {"model": "m", "prompt": "p", "max_tokens": 3, "stream": True}))
        await eventually(lambda: worker.at_gate == 1)
        process.send_signal(signal.SIGTERM)
        await line_with(process, "router stops")
        worker.gate.set()
        assert (await client.reply()).events[-1] == "[DONE]"
        assert "status=200" in await line_with(process, "request method=POST path=/v1/completions")
        assert await asyncio.wait_for(process.wait(), WAIT_S) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await worker.stop()


async def test_a_used_port_is_a_clear_error():
    worker = await FakeWorker("regular").start()
    process = await start("--port", str(worker.port), "--worker-urls", "http://127.0.0.1:1")
    _, errors = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{worker.port}" in errors.decode()
    await worker.stop()
