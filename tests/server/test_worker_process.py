"""The HTTP process as a process: start order, signals, and a rank that dies, fails to start, or never comes up."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from tests.server.conftest import sse_events

pytestmark = pytest.mark.e2e

FIRED_UP = "The server is fired up and ready to roll!"


@dataclass
class Running:
    process: asyncio.subprocess.Process
    http: httpx2.AsyncClient
    bootstrap_port: int
    rank_pid: int
    log: Path

    async def until_logged(self, text: str) -> None:
        async with asyncio.timeout(20):
            while text not in self.log.read_text():  # noqa: ASYNC110  (another process writes the file)
                await asyncio.sleep(0.01)


@asynccontextmanager
async def worker(demo_dir: Path, tmp_path: Path, behaviour: str, *flags: str) -> AsyncIterator[Running]:
    ready_file, log = tmp_path / "ready", tmp_path / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.fakes.fake_rank_worker", str(demo_dir), str(ready_file), behaviour, *flags,
            stdout=output, stderr=output,
        )  # fmt: skip
    try:
        async with asyncio.timeout(20):
            while not (ready_file.exists() and ready_file.read_text()):  # noqa: ASYNC110  (another process writes it)
                await asyncio.sleep(0.01)
        http_port, bootstrap_port, rank_pid = map(int, ready_file.read_text().split())
        url = f"http://127.0.0.1:{http_port}"
        async with httpx2.AsyncClient(base_url=url, timeout=20, verify=False) as http:
            yield Running(process, http, bootstrap_port, rank_pid, log)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_worker_serves_and_stops_at_sigterm(demo_dir: Path, tmp_path: Path) -> None:
    async with worker(demo_dir, tmp_path, "run", "--tp", "2", "--trust-remote-code") as running:
        await running.until_logged(FIRED_UP)
        assert (await running.http.get("/health")).status_code == 200
        assert (await running.http.post("/generate", json={"text": "Hi"})).json()["text"] == "Hello there, world!"
        running.process.terminate()
        assert await asyncio.wait_for(running.process.wait(), 10) == 0
        log = running.log.read_text()
        assert log.count("--trust-remote-code has no effect") == 1
        assert "Traceback" not in log


async def test_sigterm_waits_for_running_requests_and_a_second_one_does_not(demo_dir: Path, tmp_path: Path) -> None:
    async with worker(demo_dir, tmp_path, "pause") as running:
        await running.until_logged(FIRED_UP)
        body = {"text": "Hi", "stream": True}
        async with running.http.stream("POST", "/generate", json=body, headers={"connection": "close"}) as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            running.process.terminate()
            await running.until_logged("Shutting down")
            assert running.process.returncode is None
            running.process.terminate()  # a second one does not wait
            assert await asyncio.wait_for(running.process.wait(), 10) == 0


async def test_a_rank_that_dies_ends_requests_and_the_worker(demo_dir: Path, tmp_path: Path) -> None:
    async with worker(demo_dir, tmp_path, "pause") as running:
        await running.until_logged(FIRED_UP)
        async with running.http.stream("POST", "/generate", json={"text": "Hi", "stream": True}) as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            os.kill(running.rank_pid, signal.SIGKILL)
            events = sse_events("\n".join([line async for line in lines]))
        assert events[-1] == "[DONE]"
        assert '"retryable":true' in events[-2]
        assert await asyncio.wait_for(running.process.wait(), 10) == 1
        assert f"its process {running.rank_pid} ended" in running.log.read_text()


@pytest.mark.parametrize(("behaviour", "words"), [("fatal", "no such tensor: model.norm.weight"), ("crash", "ended")])
async def test_a_rank_that_cannot_start_ends_the_worker_with_its_words(
    demo_dir: Path, tmp_path: Path, behaviour: str, words: str
) -> None:
    async with worker(demo_dir, tmp_path, behaviour) as running:
        assert await asyncio.wait_for(running.process.wait(), 20) == 1
        log = running.log.read_text()
        assert words in log
        assert "Traceback" not in log


async def test_before_ready_the_bootstrap_port_answers_and_the_http_port_is_closed(
    demo_dir: Path, tmp_path: Path
) -> None:
    async with worker(demo_dir, tmp_path, "slow", "--disaggregation-mode", "prefill") as running:
        url = f"http://127.0.0.1:{running.bootstrap_port}/health"
        answer = await running.http.get(url)
        assert (answer.status_code, answer.text) == (200, "OK")
        with pytest.raises(httpx2.ConnectError):
            await running.http.get("/health")
        running.process.terminate()
        assert await asyncio.wait_for(running.process.wait(), 10) == 0
