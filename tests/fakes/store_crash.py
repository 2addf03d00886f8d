"""Processes that use one file store and are killed at arbitrary moments; run as a program, since it forks.

    python -m tests.fakes.store_crash DIRECTORY KILLS SEED

Prints one JSON object: how many were killed, how many objects the survivors read and verified, how many of all that were read back
were damaged (allowed: a miss) or wrong (never). The bytes of an object follow from its name, so everyone knows what is right.
"""

import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np

from baton.kvcache.stores.base import Object, StoreConfig
from baton.kvcache.stores.file import FileStore
from baton.kvcache.stores.seal import SEAL_BYTES, check, seal

PAYLOAD_BYTES = 20_000
NUM_NAMES, NUM_SLOTS, BATCH = 60, 40, 4
NUM_ALIVE = 3


def key_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def payload_of(name: str) -> Object:
    return np.frombuffer(key_of(name) * (PAYLOAD_BYTES // 32), dtype=np.uint8)


def open_store(directory: Path) -> FileStore:
    size = PAYLOAD_BYTES + SEAL_BYTES
    return FileStore(StoreConfig(object_bytes=size, extra={"path": str(directory), "capacity": str(NUM_SLOTS * 20480)}))


class User:
    def __init__(self, directory: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self.store = open_store(directory)
        self._memory = np.zeros((BATCH, PAYLOAD_BYTES + SEAL_BYTES), dtype=np.uint8)
        self.verified = self.damaged = self.wrong = 0

    def turn(self) -> None:
        names = [str(i) for i in self._random.sample(range(NUM_NAMES), BATCH)]
        if self._random.random() < 0.5:
            for region, name in zip(self._memory, names, strict=True):
                region[:-SEAL_BYTES] = payload_of(name)
                seal(region, key_of(name))
            self.store.batch_put(names, list(self._memory))
            return
        got = self.store.batch_get(names, list(self._memory))
        for name, ok, region in zip(names, got, self._memory, strict=True):
            if not ok:
                continue
            if not check(region, key_of(name)):
                self.damaged += 1
                self.store.discard([name])
            elif np.array_equal(region[:-SEAL_BYTES], payload_of(name)):
                self.verified += 1
            else:
                self.wrong += 1


def child(directory: Path, seed: int, progress: int) -> None:
    """One byte after each turn: b"." when all was well so far, b"!" when something was wrong."""
    user = User(directory, seed)
    while True:
        user.turn()
        os.write(progress, b"!" if user.wrong else b".")


def start(directory: Path, seed: int) -> tuple[int, int]:
    """(process id, descriptor of its progress)"""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(directory, seed, writing)
        finally:
            os._exit(1)
    os.close(writing)
    return pid, reading


def main() -> None:
    directory, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    wrong = failed = 0
    alive = [start(directory, seed + i) for i in range(NUM_ALIVE)]
    for i in range(kills):
        pid, progress = alive.pop(0)
        seen = b""
        for _ in range(chance.randrange(1, 25)):
            seen += (data := os.read(progress, 1))
            failed += not data
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(progress)
        wrong += seen.count(b"!")
        alive.append(start(directory, seed + NUM_ALIVE + i))
    for pid, _ in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    survivor = User(directory, seed - 1)
    for _ in range(200):
        survivor.turn()
    survivor.store._index.check_integrity()
    used = survivor.store.stats()["used_bytes"]
    print(
        json.dumps(
            {
                "failed": failed,
                "wrong": wrong + survivor.wrong,
                "verified": survivor.verified,
                "damaged": survivor.damaged,
                "used_bytes": used,
                "capacity_bytes": survivor.store.capacity,
                "blocks_bytes": sum(f.stat().st_blocks * 512 for f in survivor.store.directory.glob("objects-*")),
            }
        )
    )


if __name__ == "__main__":
    main()
