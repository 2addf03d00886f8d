"""Between the HTTP process and its rank: a process that stands still is lost, unless both did or a debugger holds it."""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from baton.engine.server.channel import ChannelAddress, RankChannel, ServerChannel
from baton.engine.server.client import EngineClient
from baton.engine.server.engines import Engines
from baton.protocol.errors import RequestError
from baton.protocol.rank import Submit
from baton.protocol.sampling import SamplingParams

WAIT_S = 20.0
RANK = """
import sys, time
from baton.engine.server.channel import ChannelAddress, RankChannel
channel = RankChannel(ChannelAddress(sys.argv[1]))
channel.start_beats(0.01)
print("beats", flush=True)
time.sleep(60)  # a step that takes long
"""
PTRACE_ATTACH = 16


@pytest.fixture
async def address() -> AsyncIterator[ChannelAddress]:
    one = ChannelAddress.create()
    yield one
    one.remove()


@pytest.fixture
async def channel(address: ChannelAddress) -> AsyncIterator[ServerChannel]:
    one = ServerChannel(address)
    yield one
    one.close()


@pytest.fixture
def rank(address: ChannelAddress, channel: ServerChannel) -> Iterator[subprocess.Popen[bytes]]:
    """A process that beats and never comes to answer."""
    process = subprocess.Popen([sys.executable, "-c", RANK, address.directory], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as words:
        assert words.readline() == b"beats\n"
        yield process
    os.kill(process.pid, signal.SIGKILL)  # Popen takes a tracee's stop for its end, and would not
    process.wait(WAIT_S)


async def test_a_stopped_rank_is_lost_and_its_requests_may_be_retried(
    channel: ServerChannel, rank: subprocess.Popen[bytes]
) -> None:
    client = EngineClient(channel, None, mode="prefill")
    engines = Engines([client])
    engines.start()
    job = engines.submit([Submit(rid="a", input_ids=[5], sampling=SamplingParams())], stream_interval=None)
    await asyncio.wait_for(channel.until_silent(0.001), WAIT_S)  # between its first two beats
    rank.send_signal(signal.SIGSTOP)
    await asyncio.wait_for(client.watch_beats(0.5), WAIT_S)
    assert job.is_done and job.error is not None
    assert job.error.retryable and "stood still for 0.5 s" in job.error.message
    with pytest.raises(RequestError, match="stood still"):
        engines.submit([], stream_interval=None)


async def test_silence_is_counted_in_own_ticks_from_the_first_beat_on(
    address: ChannelAddress, channel: ServerChannel
) -> None:
    """No clock is read: a second in which both processes stood still is no silence."""
    rank = RankChannel(address)
    channel.start(lambda message: None)
    ticks: list[float] = []

    async def sleep(seconds: float) -> None:
        ticks.append(seconds)
        if len(ticks) == 50:
            rank.start_beats(WAIT_S)  # one beat
        await asyncio.sleep(0.001)

    await asyncio.wait_for(channel.until_silent(10.0, sleep), WAIT_S)
    assert set(ticks) == {1.0} and len(ticks) >= 60
    rank.close()


async def test_a_rank_in_a_debugger_may_be_silent(channel: ServerChannel, rank: subprocess.Popen[bytes]) -> None:
    channel.start(lambda message: None)
    await asyncio.wait_for(channel.until_silent(0.001), WAIT_S)  # between its first two beats
    rank.send_signal(signal.SIGSTOP)  # of all threads; attaching takes one
    if ctypes.CDLL(None).ptrace(PTRACE_ATTACH, rank.pid, None, None):
        pytest.skip("tracing is not allowed here")
    ticks = 0

    async def sleep(seconds: float) -> None:
        nonlocal ticks
        ticks += 1
        await asyncio.sleep(0.002)
        if ticks == 100:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        await channel.until_silent(1.0, sleep)


def test_what_a_killed_worker_left_is_swept_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "from baton.engine.server.channel import ChannelAddress\n"
        "import time; print(ChannelAddress.create().directory, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with contextlib.ExitStack() as stack:
        owners = [
            stack.enter_context(
                subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
            )
            for _ in range(2)
        ]
        _, in_use = (Path(one.stdout.readline().strip()) for one in owners if one.stdout is not None)
        owners[0].kill()
        owners[0].wait(WAIT_S)
        unknown = tmp_path / "baton-of-somebody"
        unknown.mkdir(0o700)
        address = ChannelAddress.create()
        assert sorted(tmp_path.iterdir()) == sorted([in_use, unknown, Path(address.directory)])
        owners[1].kill()
        address.remove()
    assert sorted(tmp_path.iterdir()) == sorted([in_use, unknown])
