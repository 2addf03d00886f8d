"""A server to measure, and the command line that measures it in a fraction of a second."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.fakes.fake_sglang import FakeSglang, byte_tokenizer_dir

from baton.bench.multiturn import main


class Bench:
    """`baton bench multiturn` against `server`, writing into `directory`."""

    def __init__(self, server: FakeSglang, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.log_file = directory / "log.jsonl"

    def flags(self, *more: str) -> list[str]:
        """5 clients, 3 rounds of 16 tokens, 2 at once; `more` overrides."""
        shape = ["--num-clients", "5", "--num-rounds", "3", "--request-length", "16", "--output-length", "2"]
        pace = ["--max-parallel", "2", "--request-rate", "100000", "--disable-auto-run", "--disable-random-sample"]
        where = ["--host", "127.0.0.1", "--port", str(self.server.port), "--log-file", str(self.log_file)]
        return [*shape, *pace, *where, "--enable-round-barrier", *more]

    async def run(self, *more: str) -> int:
        return await asyncio.to_thread(main, self.flags(*more))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with FakeSglang(str(byte_tokenizer_dir(tmp_path))).running() as server:
        yield Bench(server, tmp_path)
