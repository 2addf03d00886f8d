"""One rank's membership in its group, from the first greeting to the last step: `LeaderGroup` on rank 0, `FollowerGroup` elsewhere.

Both go through the same start: agree on pages, connect the collective, load, be ready together. From then on the heartbeat
watches; whoever is lost takes the whole group down, loudly, since a collective without one rank never ends. Not here: the
wire (`control`), the loop of a follower (`follower`).
"""

import threading
from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from baton.engine.batch import ForwardBatch
from baton.engine.distributed.connect import Connected, Pool, connect
from baton.engine.distributed.control import Connection, GroupError, Leader, finish_phase, join
from baton.engine.distributed.heartbeat import Heartbeat
from baton.engine.distributed.messages import FromFollower, FromLeader, Hello, Welcome, encode_step
from baton.engine.distributed.topology import Topology

OnLost = Callable[[str], None]
LOAD_TIMEOUT_S = 1800.0
"""Between the first and the last rank whose weights are there."""
LAST_WORDS_S = 1.0
STOPPED = "rank 0 was told to stop"


class Group(Protocol):
    """What loading a model needs of the group."""

    topology: Topology

    def agree(self, facts: dict[str, str], num_pages: int) -> int:
        """Meet the others. Returns the KV pages of every rank. Raises `GroupError`."""

    def connect(self, device: torch.device, pool: Pool, *, in_c: bool) -> Connected:
        """Settle how tensors meet."""

    def finish_loading(self) -> None:
        """Wait until every rank has its weights."""


class LeaderGroup:
    """Rank 0. `on_lost(reason)` runs in the heartbeat's thread when another rank is gone."""

    def __init__(self, topology: Topology, address: tuple[str, int], timeout_s: float, on_lost: OnLost) -> None:
        self.topology = topology
        self._leader = Leader(topology, address, timeout_s)
        self._on_lost = on_lost
        self._heartbeat: Heartbeat | None = None
        self._parts: Connected | None = None
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def address(self) -> tuple[str, int]:
        """Where the others dial."""
        return self._leader.address

    def agree(self, facts: dict[str, str], num_pages: int) -> int:
        agreed = self._leader.gather_ranks(Hello(0, facts, num_pages))
        peers = {self.topology.name_of(rank): sock for rank, sock in self._leader.watches.items()}
        self._heartbeat = Heartbeat(peers, self._on_lost)
        self._heartbeat.start()
        self._leader.tell_all(Welcome(agreed))
        return agreed

    def connect(self, device: torch.device, pool: Pool, *, in_c: bool) -> Connected:
        self._parts = connect(self, device, pool, in_c=in_c)
        return self._parts

    @property
    def rank(self) -> int:
        return 0

    @property
    def size(self) -> int:
        return self.topology.num_ranks

    @property
    def leader_host(self) -> str:
        # The address by which the others came in is one that all of them reach.
        host: str = next(iter(self._leader.controls.values())).socket.getsockname()[0]
        return host

    @property
    def own_host(self) -> str:
        return self.leader_host

    def phase(self, name: str, value: str = "") -> list[str]:
        return self._leader.phase(name, value, LOAD_TIMEOUT_S)

    def finish_loading(self) -> None:
        self.phase("weights")

    def send_step(self, batch: ForwardBatch, logit_rows: list[NDArray[np.int64]]) -> None:
        """Tell the others what this rank computes next. Raises `GroupError` when one is gone."""
        self.send(encode_step(batch, logit_rows))

    def send(self, message: FromLeader, ranks: range | None = None) -> None:
        """Tell the others (None: all); they act in the order of messages. Raises `GroupError` when one is gone."""
        data = self._encoder.encode(message)
        for rank in self._leader.controls if ranks is None else ranks:
            self._leader.controls[rank].send_encoded(data)

    @property
    def followers(self) -> dict[int, Connection]:
        """By rank, complete after `agree`."""
        return self._leader.controls

    def say_stopped(self) -> None:
        """Tell the others that this end is no failure. The process ends next."""
        if self._heartbeat is not None:
            self._heartbeat.close(STOPPED, on_purpose=True)
        else:
            self._leader.refuse_all(STOPPED)

    def close(self, last_words: str = "") -> None:
        """The others end when they hear of it."""
        if self._heartbeat is not None:
            self._heartbeat.close(last_words)
        else:
            self._leader.refuse_all(last_words)
        if self._parts is not None:
            self._parts.close()
        self._leader.close()


class FollowerGroup:
    """Any other rank. In the heartbeat's thread run `on_lost(reason)` when the leader is gone, and `on_stop(words)` when it ends on
    purpose."""

    def __init__(
        self, topology: Topology, address: tuple[str, int], timeout_s: float, on_lost: OnLost, on_stop: OnLost
    ) -> None:
        self.topology = topology
        self._address, self._timeout_s, self._on_lost, self._on_stop = address, timeout_s, on_lost, on_stop
        self._control: Connection | None = None
        self._heartbeat: Heartbeat | None = None
        self._parts: Connected | None = None
        self._sending = threading.Lock()

    def agree(self, facts: dict[str, str], num_pages: int) -> int:
        hello = Hello(self.topology.rank, facts, num_pages)
        self._control, watch, welcome = join(self.topology, self._address, hello, self._timeout_s)
        self._heartbeat = Heartbeat({f"rank 0 at {self._address[0]}": watch}, self._on_lost, self._on_stop)
        self._heartbeat.start()
        return welcome.num_pages

    def connect(self, device: torch.device, pool: Pool, *, in_c: bool) -> Connected:
        self._parts = connect(self, device, pool, in_c=in_c)
        return self._parts

    @property
    def rank(self) -> int:
        return self.topology.rank

    @property
    def size(self) -> int:
        return self.topology.num_ranks

    @property
    def leader_host(self) -> str:
        host: str = self._connected().socket.getpeername()[0]
        return host

    @property
    def own_host(self) -> str:
        host: str = self._connected().socket.getsockname()[0]
        return host

    def phase(self, name: str, value: str = "") -> list[str]:
        return finish_phase(self._connected(), name, value, LOAD_TIMEOUT_S)

    def finish_loading(self) -> None:
        self.phase("weights")

    def receive(self) -> FromLeader:
        """Wait for what comes next. Raises `GroupError` when the leader is gone."""
        message = self._connected().receive(None)
        if not isinstance(message, FromLeader):
            raise GroupError(f"rank 0 sent {type(message).__name__} where a step belongs")
        return message

    def await_last_words(self) -> None:
        """After a connection broke: what the leader has to say may come a moment later, and ends this process."""
        if self._heartbeat is not None:
            self._heartbeat.join(LAST_WORDS_S)

    def send(self, message: FromFollower) -> None:
        """From any thread. Raises `GroupError` when the leader is gone."""
        with self._sending:
            self._connected().send(message)

    def close(self, last_words: str = "") -> None:
        if self._heartbeat is not None:
            self._heartbeat.close(last_words)
        if self._parts is not None:
            self._parts.close()
        if self._control is not None:
            self._control.close()

    def _connected(self) -> Connection:
        assert self._control is not None, "agree() comes first"
        return self._control
