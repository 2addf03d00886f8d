"""How hidden states travel from a pipeline stage to the next one, and from the last one back to the first: a ring.

Each rank sends to the rank that has its place in the next stage, over a TCP connection of its own. A thread of the receiver takes
what comes whenever it comes, so a sender never waits for a computation to end, and no chain of senders can close into a circle,
however large the messages are. Between GPUs the states pass through host memory. Not here: when a stage runs (`pipeline`).
"""

import contextlib
import queue
import socket
import struct
import threading

import torch

from baton.engine.distributed.control import GroupError, Phases
from baton.engine.distributed.links import data_of, open_connections

_HEADER = struct.Struct("<Q")  # bytes that follow
MAX_BYTES = 1 << 36


class Ring:
    """`following`, `preceding`: connected sockets, owned from now on, and the names of whom they lead to."""

    def __init__(self, following: tuple[str, socket.socket], preceding: tuple[str, socket.socket]) -> None:
        self._next_name, self._next = following
        self._inbox: queue.SimpleQueue[torch.Tensor | GroupError] = queue.SimpleQueue()
        self._preceding = preceding
        threading.Thread(target=self._listen, name="ring", daemon=True).start()

    def send(self, hidden: torch.Tensor) -> None:
        """To the next stage. Raises `GroupError` when it is gone."""
        data = data_of(hidden.cpu().contiguous())
        try:
            self._next.sendall(_HEADER.pack(len(data)))
            self._next.sendall(data)
        except OSError as error:
            raise GroupError(f"{self._next_name} is gone: {error.strerror or error}") from None

    def receive(self, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """[R, width]: what the stage before sent, in order. Raises `GroupError` when it is gone."""
        received = self._inbox.get()
        if isinstance(received, GroupError):
            raise received
        if len(received) % (width * dtype.itemsize):
            raise GroupError(f"{self._preceding[0]} sent {len(received)} bytes, which are no rows of {width} {dtype}")
        return received.view(dtype).view(-1, width).to(device)

    def close(self) -> None:
        for one in (self._next, self._preceding[1]):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # the thread hears of it
            one.close()

    def _listen(self) -> None:
        name = self._preceding[0]
        try:
            while True:
                header = bytearray(_HEADER.size)
                self._fill(memoryview(header))
                (size,) = _HEADER.unpack(header)
                if size > MAX_BYTES:
                    raise GroupError(f"{name} sent {size} bytes of hidden states; that is no rank of ours")
                data = torch.empty(size, dtype=torch.uint8)
                self._fill(data_of(data))
                self._inbox.put(data)
        except GroupError as error:
            self._inbox.put(error)
        except OSError as error:
            self._inbox.put(GroupError(f"{name} is gone: {error.strerror or error}"))

    def _fill(self, target: memoryview) -> None:
        name, sock = self._preceding
        while target:
            count = sock.recv_into(target)
            if not count:
                raise GroupError(f"{name} is gone: its connection was closed")
            target = target[count:]


def open_ring(group: Phases) -> Ring:
    """Connect every rank to the one at its place in the next stage. Raises `GroupError`."""
    topology = group.topology
    following, preceding = topology.rank_at(topology.stage + 1), topology.rank_at(topology.stage - 1)
    dialled, accepted = open_connections(group, "ring", [following], [preceding])
    return Ring((topology.name_of(following), dialled[following]), (topology.name_of(preceding), accepted[preceding]))
