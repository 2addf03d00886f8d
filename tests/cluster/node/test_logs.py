"""Container logs: what the supervisor writes and what a reader gets back, over rotations and while it grows."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.fakes.node_bed import eventually

from baton.cluster.node import logs
from baton.cluster.node.shim import Log
from baton.cluster.node_connector import LogOptions


async def text(path: Path, now: float | None = None, **options: object) -> str:
    parts = [
        part
        async for part in logs.read(
            path, LogOptions(**options), is_over=lambda: True, now=(lambda: now) if now is not None else _now  # type: ignore[arg-type]
        )
    ]  # fmt: skip
    return b"".join(parts).decode()


def _now() -> float:
    import time

    return time.time()


async def test_bytes_come_back_as_they_were_written(tmp_path: Path) -> None:
    log = Log(str(tmp_path / "log"), 1 << 20, 2)
    for chunk in (b"one\ntw", b"o\n", b"\n", b"x" * 40000, b"\nno newline"):
        log.write("stdout", chunk)
    log.write("stderr", b"trouble\n")
    log.flush()
    expected = "one\ntwo\n\n" + "x" * 40000 + "\n"
    found = await text(tmp_path / "log")
    assert found == expected + "trouble\n" + "no newline"


async def test_rotation_keeps_the_last_files_and_readers_see_them_in_order(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = Log(str(path), 1000, 2)
    lines = [f"line {number}\n" for number in range(100)]
    for line in lines:
        log.write("stdout", line.encode())
    assert len(logs.files_of(path)) == 3
    assert all(file.stat().st_size <= 1100 for file in logs.files_of(path))
    found = (await text(path)).splitlines(keepends=True)
    assert found == lines[-len(found) :]
    assert 30 < len(found) < 100
    assert await text(path, tail_lines=30) == "".join(lines[-30:])


async def test_tail_limit_since_and_timestamps(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(
        "2026-01-01T00:00:10.500000000Z stdout F early\n"
        "2026-01-01T00:00:20.000000000Z stderr F late\n"
        "2026-01-01T00:00:21.000000000Z stdout P part\n"
    )
    at_30 = 1767225630.0
    assert await text(path, now=at_30) == "early\nlate\npart"
    assert await text(path, now=at_30, since_s=15) == "late\npart"
    assert await text(path, now=at_30, tail_lines=1) == "part"
    assert await text(path, now=at_30, tail_lines=0) == ""
    assert await text(path, now=at_30, limit_bytes=7) == "early\nl"
    assert (await text(path, now=at_30, timestamps=True)).startswith("2026-01-01T00:00:10.500000000Z early\n")


async def test_following_survives_rotation_and_ends_with_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "FOLLOW_POLL_S", 0.001)
    path = tmp_path / "log"
    log = Log(str(path), 500, 2)
    log.write("stdout", b"before\n")
    over = False
    got: list[bytes] = []

    async def follow() -> None:
        async for part in logs.read(path, LogOptions(follow=True), is_over=lambda: over):
            got.append(part)

    task = asyncio.create_task(follow())
    written = b"before\n"
    for number in range(60):
        line = f"line {number}\n".encode()
        log.write("stdout", line)
        written += line
        await eventually(lambda so_far=written: b"".join(got) == so_far)  # type: ignore[misc]
    over = True
    await asyncio.wait_for(task, 5)
    assert b"".join(got) == written


def test_last_words_are_short(tmp_path: Path) -> None:
    log = Log(str(tmp_path / "log"), 1 << 20, 2)
    log.write("stdout", b"".join(f"line {number}\n".encode() for number in range(1000)))
    assert logs.last_lines(tmp_path / "log").splitlines() == [f"line {number}" for number in range(990, 1000)]
    assert logs.last_lines(tmp_path / "none") == ""
