"""How the ranks of a group meet and what connects them afterwards: one control and one heartbeat connection to the leader each.

The leader listens on --dist-init-addr; everyone else dials it and keeps trying, since pods of a group start in any order. All
ranks must agree on what decides their results (`Hello.facts`); what differs is named on both sides. From then on the control
connection carries `Step`s and what tiers have to say. Not here: what ranks compute, heartbeats (`heartbeat`).
"""

import contextlib
import errno
import logging
import secrets
import select
import socket
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from baton.engine.distributed.messages import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    MAX_GREETING_BYTES,
    Done,
    Go,
    Hello,
    Message,
    Refused,
    Watch,
    Welcome,
)
from baton.engine.distributed.topology import Topology
from baton.protocol.errors import BatonError

logger = logging.getLogger(__name__)

GREETING_TIMEOUT_S = 5.0
RETRY_S = 0.5
NAME_TIMEOUT_S = 60.0
"""How long the leader looks for its own name: in a cluster it is known a while after the leader's pod has started."""
NAME_RETRY_S = 2.0
PROGRESS_S = 10.0
"""Between two log lines of a rank that waits for others."""


class GroupError(BatonError):
    """The ranks did not meet, do not fit together, or lost one another."""


class Phases(Protocol):
    """The group during start-up."""

    @property
    def topology(self) -> Topology: ...

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def leader_host(self) -> str:
        """The address by which the others reach the leader."""

    @property
    def own_host(self) -> str:
        """The address by which this rank reaches the leader."""

    def phase(self, name: str, value: str = "") -> list[str]:
        """Wait until every rank is at phase `name`; the values that they bring, in order of ranks."""


class Connection:
    """A socket that carries frames: a length and a msgpack message."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # An idle group says nothing here for hours; whatever is between two hosts must not forget the connection.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.settimeout(None)
        self.socket, self.peer = sock, peer
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)

    def send(self, message: Message) -> None:
        """Raises `GroupError` when the peer is gone."""
        self.send_encoded(self._encoder.encode(message))

    def send_encoded(self, data: bytes) -> None:
        try:
            self.socket.sendall(FRAME_HEADER.pack(len(data)) + data)
        except OSError as error:
            raise GroupError(f"{self.peer} is gone: {error.strerror or error}") from None

    def receive(self, timeout_s: float | None, limit_bytes: int = MAX_FRAME_BYTES) -> Message:
        """The next message. Raises `GroupError` for an end, nonsense, or silence of `timeout_s` (None: wait without end)."""
        self.socket.settimeout(timeout_s)
        try:
            (size,) = FRAME_HEADER.unpack(self._exactly(FRAME_HEADER.size))
            if size > limit_bytes:
                raise GroupError(f"{self.peer} sent a message of {size} bytes; that is no rank of ours")
            return self._decoder.decode(self._exactly(size))
        except TimeoutError:
            raise GroupError(f"{self.peer} said nothing for {timeout_s:g} s") from None
        except OSError as error:
            raise GroupError(f"{self.peer} is gone: {error.strerror or error}") from None
        except msgspec.MsgspecError as error:
            raise GroupError(f"{self.peer} sent what no rank would send: {error}") from None

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self.socket.recv_into(view)
            if not count:
                raise GroupError(f"{self.peer} is gone: its connection was closed")
            view = view[count:]
        return data

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a thread that waits for a message hears of it
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class Leader:
    """Rank 0's side of meeting. `close` after use, also when meeting failed."""

    def __init__(self, topology: Topology, address: tuple[str, int], timeout_s: float) -> None:
        """Listens at once, so that others find the address. Raises `GroupError` naming it."""
        self._topology = topology
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._listener = _listen(*address, time.monotonic() + min(timeout_s, NAME_TIMEOUT_S))
        self._greeted: list[tuple[Connection, Hello | Watch]] = []
        self.controls: dict[int, Connection] = {}
        """By rank, complete after `gather_ranks`."""
        self.watches: dict[int, socket.socket] = {}
        self._nonces: dict[int, str] = {}

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()[:2]
        return host, port

    def gather_ranks(self, own: Hello) -> int:
        """Wait until every rank is connected and agrees with `own`. Returns the KV pages all have room for.

        Raises `GroupError` naming the ranks that did not come, or what differs.
        """
        hellos = {0: own}
        next_note = time.monotonic() + PROGRESS_S
        while missing := self._missing():
            now = time.monotonic()
            if now >= self._deadline:
                names = ", ".join(self._topology.name_of(rank) for rank in missing)
                raise GroupError(f"{names} did not come within {self._timeout_s:g} s (--dist-timeout)")
            if now >= next_note:
                next_note = now + PROGRESS_S
                names = ", ".join(self._topology.name_of(rank) for rank in missing)
                logger.info("waiting for %s at %s:%d", names, *self.address)
            ready, _, _ = select.select([self._listener], [], [], min(next_note, self._deadline) - now)
            if ready:
                self._greet(hellos)
        self._listener.close()
        return min(hello.num_pages for hello in hellos.values())

    def tell_all(self, message: Message) -> None:
        for connection in self.controls.values():
            connection.send(message)

    def phase(self, name: str, own_value: str = "", timeout_s: float | None = None) -> list[str]:
        """Wait for `Done(name)` of every rank, then let all go on. Values in order of ranks."""
        values = [own_value]
        for rank in sorted(self.controls):
            message = self.controls[rank].receive(timeout_s)
            if not isinstance(message, Done) or message.phase != name:
                raise GroupError(f"{self._topology.name_of(rank)} is not at {name}: {message}")
            values.append(message.value)
        self.tell_all(Go(name, values))
        return values

    def close(self) -> None:
        for connection in self.controls.values():
            connection.close()
        for sock in (self._listener, *self.watches.values()):
            sock.close()

    def _missing(self) -> list[int]:
        others = range(1, self._topology.num_ranks)
        return [rank for rank in others if rank not in self.controls or rank not in self.watches]

    def _greet(self, hellos: dict[int, Hello]) -> None:
        """Take one connection. Whoever is no rank of ours is sent away; a rank that differs ends the group."""
        try:
            sock, (host, port, *_) = self._listener.accept()
        except OSError:
            return  # it left before we looked
        connection = Connection(sock, f"{host}:{port}")
        try:
            greeting = connection.receive(GREETING_TIMEOUT_S, MAX_GREETING_BYTES)
        except GroupError as error:
            logger.warning("a connection to --dist-init-addr is not a rank's: %s", error)
            connection.close()
            return
        if not isinstance(greeting, Hello | Watch) or not 0 < greeting.rank < self._topology.num_ranks:
            self._refuse_stranger(connection, hellos[0].facts, greeting)
            return
        rank = greeting.rank
        connection.peer = f"{self._topology.name_of(rank)} at {host}"
        is_second = rank in self.controls if isinstance(greeting, Hello) else greeting.nonce != self._nonces.get(rank)
        if is_second:
            self._refuse(connection, f"{self._topology.name_of(rank)} is there already; is --node-rank given twice?")
        elif isinstance(greeting, Watch):
            self.watches[rank] = connection.socket
        else:
            problem = _difference(hellos[0].facts, greeting.facts, self._topology.name_of(rank))
            if problem is not None:
                self._refuse(connection, problem)
                raise GroupError(problem)
            self.controls[rank] = connection
            self._nonces[rank] = greeting.nonce
            hellos[rank] = greeting
            logger.info("%s joined: %d of %d ranks are there", connection.peer, len(hellos), self._topology.num_ranks)

    def refuse_all(self, reason: str) -> None:
        """Tell the ranks that came why there will be no group."""
        for connection in self.controls.values():
            with contextlib.suppress(GroupError):
                connection.send(Refused(reason))

    def _refuse_stranger(self, connection: Connection, facts: dict[str, str], greeting: Message) -> None:
        """A number that is none of ours; whoever has it may have been started for another group."""
        reason = f"this group has ranks 0 to {self._topology.num_ranks - 1}, led by rank 0"
        if isinstance(greeting, Hello):
            problem = _difference(facts, greeting.facts, f"rank {greeting.rank}")
            reason = f"{reason}, and no rank {greeting.rank}; {problem or 'is --node-rank right?'}"
        self._refuse(connection, reason)

    def _refuse(self, connection: Connection, reason: str) -> None:
        logger.warning("%s was refused: %s", connection.peer, reason)
        with contextlib.suppress(GroupError):
            connection.send(Refused(reason))
        connection.close()


def join(
    topology: Topology,
    address: tuple[str, int],
    hello: Hello,
    timeout_s: float,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Connection, socket.socket, Welcome]:
    """A follower's side: (control connection, heartbeat socket, the leader's welcome).

    Dials until the leader listens, `timeout_s` at most. Raises `GroupError` naming the address, or the leader's reason.
    """
    deadline = time.monotonic() + timeout_s
    leader = f"the leader at {address[0]}:{address[1]}"
    control, watch = (Connection(sock, leader) for sock in _dial(address, 2, deadline, timeout_s, sleep))
    try:
        nonce = secrets.token_hex(8)
        control.send(msgspec.structs.replace(hello, nonce=nonce))
        with contextlib.suppress(GroupError):  # a leader that is gone by now has said why on the other connection
            watch.send(Watch(topology.rank, nonce))
        return control, watch.socket, _welcome(control, deadline, timeout_s)
    except BaseException:
        control.close()
        watch.close()
        raise


def _welcome(control: Connection, deadline: float, timeout_s: float) -> Welcome:
    """Wait for the leader's answer, which comes when all ranks are there."""
    while not select.select([control.socket], [], [], PROGRESS_S)[0]:
        if time.monotonic() > deadline:
            raise GroupError(f"{control.peer} waits for other ranks for more than {timeout_s:g} s (--dist-timeout)")
        logger.info("waiting for the other ranks, as %s does", control.peer)
    answer = control.receive(GREETING_TIMEOUT_S)
    if isinstance(answer, Refused):
        raise GroupError(f"{control.peer} refuses this rank: {answer.reason}")
    if not isinstance(answer, Welcome):
        raise GroupError(f"{control.peer} answered with {type(answer).__name__}")
    return answer


def finish_phase(control: Connection, name: str, value: str, timeout_s: float | None) -> list[str]:
    """A follower's side of `Leader.phase`."""
    control.send(Done(name, value))
    message = control.receive(timeout_s)
    if not isinstance(message, Go) or message.phase != name:
        raise GroupError(f"{control.peer} is not at {name}: {message}")
    return message.values


def _listen(host: str, port: int, deadline: float) -> socket.socket:
    while True:
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                raise GroupError(f"--dist-init-addr {host}:{port}: {error.strerror}") from None
            logger.warning("--dist-init-addr %s:%d: %s; looking again", host, port, error.strerror)
        time.sleep(NAME_RETRY_S)
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        try:
            listener.bind(where)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            # The name leads to a proxy or a NAT in front of this host: what it forwards arrives at any address.
            logger.info("%s is no address of this host: listening on every address, port %d", host, port)
            listener.bind(("", port))
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise GroupError(f"cannot listen on --dist-init-addr {host}:{port}: {error.strerror}") from None
    return listener


def _dial(
    address: tuple[str, int], count: int, deadline: float, timeout_s: float, sleep: Callable[[float], None]
) -> list[socket.socket]:
    """`count` connections, all or none: a leader that ends between two of them is looked for again."""
    next_note = time.monotonic() + PROGRESS_S
    while True:
        found: list[socket.socket] = []
        try:
            for _ in range(count):
                found.append(socket.create_connection(address, timeout=GREETING_TIMEOUT_S))
            return found
        except ConnectionRefusedError:
            reason = (
                "nobody listens there yet, or its group is complete without this rank (is --node-rank given twice?)"
            )
        except OSError as error:
            reason = error.strerror or str(error)
        for sock in found:
            sock.close()
        now = time.monotonic()
        if now >= deadline:
            raise GroupError(
                f"the leader at {address[0]}:{address[1]} (--dist-init-addr) was not there within {timeout_s:g} s "
                f"(--dist-timeout): {reason}"
            )
        if now >= next_note:
            next_note = now + PROGRESS_S
            logger.info("waiting for the leader at %s:%d: %s", *address, reason)
        sleep(RETRY_S)


def _difference(own: dict[str, str], other: dict[str, str], name: str) -> str | None:
    """One line on everything in which a rank differs from the leader."""
    keys = [*own, *(key for key in other if key not in own)]
    parts = [
        f"{key}: {own.get(key, 'nothing')} on rank 0 and {other.get(key, 'nothing')} on {name}"
        for key in keys
        if own.get(key) != other.get(key)
    ]
    return "the ranks were started differently: " + "; ".join(parts) if parts else None
