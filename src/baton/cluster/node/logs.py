"""Reading a container's log: the current file and its rotated ones, by line, by time, and while it grows.

The format is the CRI one that `shim` writes. Following is done by looking again, a few times a second: a log has many
writers' habits and one reader, and a loopback machine has no reason for more.
"""

from __future__ import annotations

import asyncio
import calendar
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from baton.cluster.node_connector import LogOptions

FOLLOW_POLL_S = 0.2
CHUNK_BYTES = 65536
MESSAGE_LINES = 10
MESSAGE_BYTES = 2048
_MAX_OLD_FILES = 16


@dataclass(frozen=True, slots=True)
class Line:
    """One line (or part of one) of a log. `text` ends with a newline unless it is a part."""

    stamp: bytes
    text: bytes

    @property
    def epoch_s(self) -> float:
        whole, _, fraction = self.stamp.rstrip(b"Z").partition(b".")
        seconds = calendar.timegm(time.strptime(whole.decode(), "%Y-%m-%dT%H:%M:%S"))
        return seconds + float(b"0." + (fraction or b"0"))

    def shown(self, timestamps: bool) -> bytes:
        return self.stamp + b" " + self.text if timestamps else self.text


def files_of(path: Path) -> list[Path]:
    """The log's files, oldest first."""
    old = [path.with_name(f"{path.name}.{number}") for number in range(_MAX_OLD_FILES, 0, -1)]
    return [one for one in (*old, path) if one.exists()]


def parse(raw: bytes) -> Line | None:
    """A line of the file, without its newline; None for one that is not in the format."""
    fields = raw.split(b" ", 3)
    if len(fields) != 4 or fields[2] not in (b"F", b"P"):
        return None
    return Line(fields[0], fields[3] + (b"\n" if fields[2] == b"F" else b""))


def last_lines(path: Path) -> str:
    """The end of a log, short enough for a status message."""
    kept: deque[bytes] = deque(maxlen=MESSAGE_LINES)
    for line in _lines_backwards_bounded(path):
        kept.append(line.text)
    return b"".join(kept)[-MESSAGE_BYTES:].decode(errors="replace").strip()


def _lines_backwards_bounded(path: Path) -> Iterator[Line]:
    """Lines of the last chunk of the current file: enough for a message, whatever the log's size."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - CHUNK_BYTES))
            raw = file.read().split(b"\n")
    except OSError:
        return
    for one in raw:
        line = parse(one)
        if line is not None:
            yield line


class _Tail:
    """Reads whole lines as a file grows and notices its rotation (the path names another inode)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending = b""
        self._file = path.open("rb")

    def close(self) -> None:
        self._file.close()

    def read(self) -> list[Line]:
        data = self._file.read(CHUNK_BYTES)
        if not data and self._was_rotated():
            data = self._file.read(CHUNK_BYTES)  # what came between the last look and the rotation
            if not data:
                self._file.close()
                self._file = self._path.open("rb")
                self._pending = b""
                data = self._file.read(CHUNK_BYTES)
        *complete, self._pending = (self._pending + data).split(b"\n")
        return [line for line in map(parse, complete) if line is not None]

    def _was_rotated(self) -> bool:
        try:
            return self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            return False


def _rotated_lines(path: Path) -> Iterator[Line]:
    for file in files_of(path)[:-1]:
        with file.open("rb") as stream:
            for raw in stream:
                line = parse(raw.rstrip(b"\n"))
                if line is not None:
                    yield line


async def read(
    path: Path, options: LogOptions, *, is_over: Callable[[], bool], now: Callable[[], float] = time.time
) -> AsyncGenerator[bytes, None]:
    """The log as bytes. The first chunk, which may be empty, is what is there already; with `follow` it goes on until `is_over()` and
    everything written was told."""
    if not path.exists():
        return
    earliest = None if options.since_s is None else now() - options.since_s
    tail = _Tail(path)
    left = options.limit_bytes
    try:
        batch = await asyncio.to_thread(_backlog, path, tail, options, earliest)
        is_first = True
        while True:
            out = b"".join(line.shown(options.timestamps) for line in batch)
            if left is not None:
                out = out[:left]
                left -= len(out)
            if out or is_first:
                yield out
            is_first = False
            if left == 0 or not options.follow:
                return
            over = is_over()
            batch = tail.read()
            if not batch:
                if over:
                    return
                await asyncio.sleep(FOLLOW_POLL_S)
    finally:
        tail.close()


def _backlog(path: Path, tail: _Tail, options: LogOptions, earliest: float | None) -> list[Line]:
    """What is there already. Bounded by the rotation: at most a few files of a few megabytes."""
    kept: deque[Line] = deque(maxlen=options.tail_lines)
    batch: Iterable[Line] = _rotated_lines(path)
    while True:
        kept.extend(line for line in batch if earliest is None or line.epoch_s >= earliest)
        grown = tail.read()
        if not grown:
            return list(kept)
        batch = grown
