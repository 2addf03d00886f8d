"""Memory that the ranks of one host share: how they get it, and its layout. Meeting in it is C (kernels/csrc/exchange.h).

Two kinds of files: one for the tensors of a step, for the ranks of each pipeline stage, and one for the KV pool of all ranks. Its pages
are whole, each rank reads and writes its own layers and heads, so for hand-over and tiers the leader's pool is that of a single
rank. The leader's files go to the others over an abstract Unix socket, which needs no file system, so it works between pods with
separate mounts and /dev/shm, and exists per network namespace, so a rank on another host finds nobody there. Only
processes of our own user get it. Nobody else can corrupt a result: whoever maps the memory is a rank of the group.
"""

import contextlib
import mmap
import os
import secrets
import socket
import struct

import numpy as np
import torch

from baton.engine.distributed.control import GroupError
from baton.engine.kernels.native import ExchangeStruct
from baton.kvcache.page_memory import PageMemory

SIZE_BYTES = 1 << 33
"""Of address space: memory is taken where it is written, a few kB for each token of the largest step."""
HEADER_BYTES = 4096
SEAT_BYTES = 64
MAX_RANKS = HEADER_BYTES // SEAT_BYTES
TIMEOUT_S = 10.0
_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class SharedExchange:
    """One rank's view of the memory. Implements `models.shard.Exchange`."""

    def __init__(self, descriptor: int, rank: int, size: int) -> None:
        """Maps the file and closes `descriptor`. Raises OSError."""
        try:
            self._mapping = mmap.mmap(descriptor, SIZE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(descriptor)
        whole = torch.from_numpy(np.frombuffer(self._mapping, np.uint8))
        self.memory = whole[HEADER_BYTES:]
        self.struct = ExchangeStruct(seats=whole.data_ptr(), rank=rank, size=size, turn=0)


class MemoryOffer:
    """The leader's side: the memory files, and the socket at which they are fetched."""

    def __init__(self, num_pages: int, page_bytes: int, num_exchanges: int = 1) -> None:
        """`num_exchanges`: one for each stage, or 0 where a stage is one rank. Raises OSError where there are no memory files or no
        abstract sockets."""
        self.pool = PageMemory.create(num_pages, page_bytes)
        self.name = f"baton-ranks-{secrets.token_hex(16)}"
        self._exchanges: list[int] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            for _ in range(num_exchanges):
                self._exchanges.append(os.memfd_create("baton-ranks", os.MFD_CLOEXEC))
                os.ftruncate(self._exchanges[-1], SIZE_BYTES)
            self._listener.bind(f"\0{self.name}")
            self._listener.listen(MAX_RANKS)
            self._listener.settimeout(TIMEOUT_S)
        except OSError:
            self.close()
            raise

    def give(self, count: int) -> None:
        """Hand the memory to the `count` ranks that have connected. Raises `GroupError`."""
        while count:
            try:
                peer, _ = self._listener.accept()
            except OSError as error:
                raise GroupError(f"a rank did not fetch the shared memory: {error}") from None
            with peer:
                credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
                if _PEER_CREDENTIALS.unpack(credentials)[1] != os.getuid():
                    continue
                peer.settimeout(TIMEOUT_S)
                try:
                    stage = peer.recv(1)[0]
                    socket.send_fds(peer, [b"."], [self.pool.fd, *self._exchanges[stage : stage + 1]])
                except (OSError, IndexError) as error:
                    raise GroupError(f"a rank did not fetch the shared memory: {error}") from None
                count -= 1

    def take(self, size: int) -> SharedExchange | None:
        """The leader's own view."""
        return SharedExchange(os.dup(self._exchanges[0]), 0, size) if self._exchanges else None

    def close(self, *, keeps_pool: bool = False) -> None:
        self._listener.close()
        if not keeps_pool:
            self.pool.close()
        for descriptor in self._exchanges:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def reach(name: str) -> socket.socket | None:
    """A connection to the leader's offer; None: not on this host."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(TIMEOUT_S)
    try:
        connection.connect(f"\0{name}")
    except OSError:
        connection.close()
        return None
    return connection


def fetch(
    connection: socket.socket, rank: int, size: int, num_pages: int, page_bytes: int, stage: int = 0
) -> tuple[SharedExchange | None, PageMemory]:
    """The memory that the leader gives to rank `rank` of the `size` ranks of a stage. Raises `GroupError`."""
    try:
        with connection:
            connection.sendall(bytes([stage]))
            _, descriptors, _, _ = socket.recv_fds(connection, 1, 2)
        pool = PageMemory.attach(descriptors[0], num_pages, page_bytes)
        return (SharedExchange(descriptors[1], rank, size) if descriptors[1:] else None), pool
    except (OSError, ValueError, IndexError) as error:
        raise GroupError(f"rank 0 did not hand over the shared memory: {error}") from None
