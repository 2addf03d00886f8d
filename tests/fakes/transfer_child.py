"""One side of a transfer in a process of its own, to be killed: `python -m tests.fakes.transfer_child prefill shm PORT`.

Reads calls as JSON lines ([method, arguments...]) and writes events as JSON lines ([kind, room]); "open" comes first.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fakes.transfer_pair import DEADLINE_S, FIRST_TOKEN, Pair

NUM_PAGES, PAGE_BYTES = 64, 1 << 20


class OneSide(Pair):
    """A pair of which only `side` is opened."""

    def __init__(self, side: str, backend: str, port: int) -> None:
        self.side = side
        super().__init__(backend, port, num_pages=NUM_PAGES, page_bytes=PAGE_BYTES)

    def open_prefill(self) -> Any:
        return super().open_prefill() if self.side == "prefill" else None

    def open_decode(self) -> Any:
        return super().open_decode() if self.side == "decode" else None

    @property
    def me(self) -> Any:
        return self.prefill or self.decode

    def close(self) -> None:
        self.me.transfer.close()


class Child:
    """Handle of the process in the test."""

    def __init__(self, side: str, backend: str, port: int) -> None:
        root = Path(__file__).parents[2]
        command = [sys.executable, "-m", "tests.fakes.transfer_child", side, backend, str(port)]
        self.process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def call(self, *call: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(call) + "\n")

    def read(self) -> list[Any]:
        assert self.process.stdout is not None
        event: list[Any] = json.loads(self.process.stdout.readline())
        return event

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(DEADLINE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def children(side: str, backend: str, port: int, count: int) -> Iterator[list[Child]]:
    """Processes that start at the same time; those still alive at the end are killed."""
    started = [Child(side, backend, port) for _ in range(count)]
    try:
        yield started
    finally:
        for child in started:
            if child.process.returncode is None:
                child.kill()


def main(side: str, backend: str, port: str) -> None:
    json.loads(sys.stdin.readline())  # "start": a prefill registers only when it is its turn.
    pair = OneSide(side, backend, int(port))
    threading.Thread(target=report, args=(pair,), daemon=True).start()
    print(json.dumps(["open"]), flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        if method == "send":
            room, page_ids, last = arguments
            pair.me.transfer.send(room, 0, page_ids, FIRST_TOKEN if last else None)
        elif method == "receive":
            pair.receive(*arguments)
        else:
            pair.me.transfer.expect(*arguments, 60.0)
    os._exit(0)


def report(pair: OneSide) -> None:
    while True:
        for event in pair.me.transfer.poll():
            print(json.dumps([type(event).__name__, event.room]), flush=True)
        pair.me._wake.wait()
        pair.me._wake.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
