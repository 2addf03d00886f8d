"""Collectives between CPUs over TCP connections of our own, one for each pair of ranks.

A decoder sends hundreds of small messages a step, one after the other. What they cost is hand-overs between threads, not bytes: here the
thread that computes also sends and receives, which takes a tenth of gloo's time (benchmarks/ranks.py). Sums are formed in the
order of ranks, so the bits depend on neither timing nor size. Not here: who the ranks are, and noticing that one is gone while
nobody sends (`heartbeat`).
"""

import contextlib
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence

import torch

from baton.engine.distributed.control import GroupError, Phases

LINK_TIMEOUT_S = 30.0
_GREETING = struct.Struct("<16sI")  # the group's token, the dialling rank


class LinkCollective:
    """Implements `models.shard.Collective` for CPU tensors. `links`: other rank of the shard -> connected socket."""

    def __init__(self, rank: int, links: dict[int, socket.socket], first_rank: int = 0) -> None:
        """`first_rank`: number in the group of the shard's rank 0, for messages."""
        self._rank, self._first_rank = rank, first_rank
        self._links = dict(sorted(links.items()))
        self._size = len(links) + 1

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks in float32, rounded once to `partial`'s dtype."""
        own = partial.contiguous()
        blocks = {rank: torch.empty_like(own) for rank in self._links}
        self._exchange(own, blocks)
        blocks[self._rank] = own
        total = blocks[0].float().clone() if own.dtype == torch.float32 else blocks[0].float()
        for rank in range(1, self._size):
            total += blocks[rank]
        return total.to(partial.dtype)

    def gather_columns(self, rows: torch.Tensor, borders: Sequence[int]) -> None:
        own = rows[:, borders[self._rank] : borders[self._rank + 1]].contiguous()
        blocks = {rank: rows.new_empty(len(rows), borders[rank + 1] - borders[rank]) for rank in self._links}
        self._exchange(own, blocks)
        for rank, block in blocks.items():
            rows[:, borders[rank] : borders[rank + 1]] = block

    def close(self) -> None:
        for link in self._links.values():
            link.close()

    def _exchange(self, own: torch.Tensor, blocks: dict[int, torch.Tensor]) -> None:
        """Send `own` to every rank, fill each rank's block."""
        data = data_of(own)
        unsent = {rank: rest for rank in self._links if (rest := self._send(rank, data))}
        missing = {rank: data_of(block) for rank, block in blocks.items()}
        # Small messages have left by now. Of large ones each side has more than the sockets hold: both directions at once.
        while unsent:
            for rank, events in self._wait(unsent, missing):
                if missing[rank] and events & ~select.POLLOUT:
                    missing[rank] = self._receive(rank, missing[rank], socket.MSG_DONTWAIT)
                if rank in unsent and events & ~select.POLLIN:
                    unsent[rank] = self._send(rank, unsent[rank])
            unsent = {rank: rest for rank, rest in unsent.items() if rest}
        for rank, rest in missing.items():
            while rest:
                rest = self._receive(rank, rest)

    def _wait(self, unsent: dict[int, memoryview], missing: dict[int, memoryview]) -> list[tuple[int, int]]:
        """Ranks that can take or give something now, and which of it."""
        poll = select.poll()
        ranks = {link.fileno(): rank for rank, link in self._links.items()}
        for rank, link in self._links.items():
            events = (select.POLLOUT if rank in unsent else 0) | (select.POLLIN if missing[rank] else 0)
            if events:
                poll.register(link, events)
        return [(ranks[descriptor], events) for descriptor, events in poll.poll()]

    def _send(self, rank: int, data: memoryview) -> memoryview:
        """What did not fit into the socket's buffer."""
        try:
            return data[self._links[rank].send(data, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return data
        except OSError as error:
            raise GroupError(f"rank {self._first_rank + rank} is gone: {error.strerror or error}") from None

    def _receive(self, rank: int, target: memoryview, flags: int = 0) -> memoryview:
        """What is still to come."""
        try:
            count = self._links[rank].recv_into(target, 0, flags)
        except BlockingIOError:
            return target
        except OSError as error:
            raise GroupError(f"rank {self._first_rank + rank} is gone: {error.strerror or error}") from None
        if not count:
            raise GroupError(f"rank {self._first_rank + rank} is gone: its link was closed")
        return target[count:]


def open_links(group: Phases) -> LinkCollective:
    """Connect every pair of ranks of this rank's stage; the higher one dials. Raises `GroupError`."""
    members = group.topology.stage_ranks
    below, above = range(members.start, group.rank), range(group.rank + 1, members.stop)
    dialled, accepted = open_connections(group, "links", below, above)
    links = {rank - members.start: link for rank, link in (dialled | accepted).items()}
    return LinkCollective(group.rank - members.start, links, members.start)


def open_connections(
    group: Phases, name: str, dials: Sequence[int], accepts: Sequence[int]
) -> tuple[dict[int, socket.socket], dict[int, socket.socket]]:
    """Connections of this rank to others, by rank: those that it dials and those that dial it. All ranks of the group call this
    together. Raises `GroupError`."""
    dialled: dict[int, socket.socket] = {}
    accepted: dict[int, socket.socket] = {}
    try:
        with socket.create_server((group.own_host, 0), family=_family(group.own_host), backlog=group.size) as listener:
            token = secrets.token_hex(8) if group.rank == 0 else ""
            values = group.phase(name, f"{listener.getsockname()[1]} {group.own_host} {token}")
            key = values[0].split()[2].encode()
            for rank in dials:
                port, host = values[rank].split()[:2]
                dialled[rank] = socket.create_connection((host, int(port)), timeout=LINK_TIMEOUT_S)
                dialled[rank].sendall(_GREETING.pack(key, group.rank))
            _accept(listener, accepted, accepts, key)
        group.phase(f"{name} done")
    except OSError as error:
        for link in (*dialled.values(), *accepted.values()):
            link.close()
        raise GroupError(f"rank {group.rank} cannot connect to the others: {error}") from None
    for link in (*dialled.values(), *accepted.values()):
        link.settimeout(None)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return dialled, accepted


def _accept(listener: socket.socket, links: dict[int, socket.socket], ranks: Sequence[int], key: bytes) -> None:
    """Wait for `ranks`; strangers are sent away."""
    deadline = time.monotonic() + LINK_TIMEOUT_S
    while any(rank not in links for rank in ranks):
        listener.settimeout(max(0.001, deadline - time.monotonic()))
        link, _ = listener.accept()
        link.settimeout(LINK_TIMEOUT_S)
        greeting = b""
        with contextlib.suppress(OSError):
            greeting = link.recv(_GREETING.size, socket.MSG_WAITALL)
        if len(greeting) == _GREETING.size and greeting[:16] == key:
            rank = _GREETING.unpack(greeting)[1]
            if rank in ranks and rank not in links:
                links[rank] = link
                continue
        link.close()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def data_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    # Flat first: where a dimension has size 1 its stride may be anything.
    return tensor.view(-1).view(torch.uint8).numpy().data.cast("B") if tensor.numel() else memoryview(b"")
