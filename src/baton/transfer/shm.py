"""Sharing a pool on one host: the prefill offers its memory's descriptor, the decode maps it read-only.

The offer is an abstract Unix socket. It needs no file system, so it works between pods with separate mounts and /dev/shm;
it exists per network namespace, so a decode on another host simply finds nobody there and uses TCP. The descriptor is
given to a process of our own user only, and only for the nonce that was sent over the session's own connection.
"""

import asyncio
import contextlib
import fcntl
import logging
import mmap
import os
import secrets
import socket
import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from baton.transfer.errors import TransferError
from baton.transfer.frames import ShmOffer
from baton.transfer.listener import Listener
from baton.transfer.pages import Pages

log = logging.getLogger(__name__)

_NONCE_BYTES = 16
_TIMEOUT_S = 2.0
_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_F_SEAL_SHRINK = 0x2


class ShmServer:
    """Prefill side: the listener of the offer. Lives on the transfer's event loop."""

    def __init__(self, pages: Pages) -> None:
        """Raises OSError where abstract Unix sockets are not to be had."""
        self._pages = pages
        self._nonces: set[bytes] = set()
        self._listening: Listener | None = None
        self._name = f"baton-kv-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(f"\0{self._name}")
            self._listener.listen(64)
        except OSError:
            self._listener.close()
            raise

    def offer(self) -> ShmOffer:
        """A new offer; `withdraw` it when its session is over."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self._nonces.add(nonce)
        return ShmOffer(self._name, nonce, self._pages.num_pages)

    def withdraw(self, offer: ShmOffer) -> None:
        self._nonces.discard(offer.nonce)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answer from now on; call on the loop."""
        self._listening = Listener(
            loop, self._listener, lambda connection: _in_background(loop, lambda: self._answer(connection))
        )

    def close(self) -> None:
        """Call on the loop."""
        if self._listening is not None:
            self._listening.close()
        self._listener.close()

    def _answer(self, connection: socket.socket) -> None:
        """Blocks for at most the time limit, on a thread of its own: a silent stranger holds up nobody else."""
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_TIMEOUT_S)
            if (uid := _peer_uid(connection)) != os.geteuid():
                log.warning("shared memory refused: other user", extra={"uid": uid})
                return
            if connection.recv(_NONCE_BYTES) not in self._nonces:
                log.warning("shared memory refused: unknown nonce")
                return
            fd = _read_only(self._pages.fd)
            try:
                socket.send_fds(connection, [b"\1"], [fd])
            finally:
                os.close(fd)


def _in_background(loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
    loop.run_in_executor(None, work)


class RemotePages:
    """Decode side: the prefill's pool, mapped read-only. `array` is uint8 [num_pages, page_bytes]; the mapping lives as
    long as somebody holds it, also when the prefill is gone: copying from a dead peer's pool is harmless."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.array = array
        self.num_pages = len(array)

    @classmethod
    def map(cls, offer: ShmOffer, page_bytes: int) -> "RemotePages":
        """Blocks for at most a few seconds: call it off the event loop. Raises OSError when the offer is not on this host
        or not for us, `TransferError` when what is offered is not a pool of this size."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(f"\0{offer.socket_name}")
            if _peer_uid(connection) != os.geteuid():
                raise TransferError("the shared memory offer belongs to another user")
            connection.sendall(offer.nonce)
            _, fds, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if len(fds) != 1:
            raise TransferError("the shared memory offer was withdrawn")
        try:
            return cls(_map_read_only(fds[0], offer.num_pages, page_bytes))
        finally:
            os.close(fds[0])


def _map_read_only(fd: int, num_pages: int, page_bytes: int) -> NDArray[np.uint8]:
    size = os.fstat(fd).st_size
    if num_pages < 1 or size != num_pages * page_bytes:
        raise TransferError(f"shared memory has {size} bytes instead of {num_pages} pages of {page_bytes}")
    # Without the seal the owner could truncate the file, and reading the lost part would kill this process (SIGBUS).
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _F_SEAL_SHRINK:
        raise TransferError("shared memory is not sealed against shrinking")
    mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, dtype=np.uint8).reshape(num_pages, page_bytes)


def _peer_uid(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return int(_PEER_CREDENTIALS.unpack(raw)[1])


def _read_only(fd: int) -> int:
    """A descriptor of the same memory that cannot be mapped for writing; a plain duplicate where /proc is missing."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return os.dup(fd)
