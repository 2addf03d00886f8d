"""The two ends of the wire between a worker's HTTP process and its rank: ZeroMQ over a private unix socket directory.

Owns addresses, sockets and message encoding (msgpack of `baton.protocol.rank`; nothing else ever crosses). Each direction
is a PUSH/PULL pair whose reader binds and whose writer connects, so that a write never blocks and never needs the peer to
be there yet. Not here: what messages mean (`client` on the HTTP side, the rank's loop on the other). No HTTP and no torch
is imported, so that the rank can use it.
"""

import asyncio
import contextlib
import os
import selectors
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from baton.engine.server.owned_directory import OwnedDirectory
from baton.protocol.rank import Beat, FromRank, ToRank

MAX_SOCKET_PATH_BYTES = 100
"""Linux allows 107 for a unix socket path; libzmq and our file names need a little of it."""
BEAT_S = 1.0
"""Between two beats of a rank."""
FROZEN_S = 10.0
"""A process that has not even beaten for so long is stopped or hung."""


@dataclass(frozen=True, slots=True)
class ChannelAddress:
    """A private directory that holds the sockets of one worker. Whoever called `create` calls `remove`."""

    directory: str
    _owned: OwnedDirectory | None = None

    @classmethod
    def create(cls) -> "ChannelAddress":
        owned = OwnedDirectory.create(MAX_SOCKET_PATH_BYTES - len("/from_rank"))
        return cls(owned.path, owned)

    @property
    def to_rank(self) -> str:
        return f"ipc://{self.directory}/to_rank"

    @property
    def from_rank(self) -> str:
        return f"ipc://{self.directory}/from_rank"

    def remove(self) -> None:
        if self._owned is not None:
            self._owned.remove()


def _writer(context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> "zmq.Socket[bytes]":
    socket = context.socket(zmq.PUSH)
    # No high-water mark: what may be queued is bounded by requests in flight, and a full queue must not block a loop.
    socket.set(zmq.SNDHWM, 0)
    # What was sent last (a `Fatal`, an abort) still has a moment to leave when the process ends.
    socket.set(zmq.LINGER, 500)
    # The reader binds when its process has started; look again soon, it is a matter of start-up time.
    socket.set(zmq.RECONNECT_IVL, 10)
    socket.connect(address)
    return socket


def _reader(context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> "zmq.Socket[bytes]":
    socket = context.socket(zmq.PULL)
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.LINGER, 0)
    socket.bind(address)
    return socket


def _descriptor(socket: "zmq.Socket[bytes]") -> int:
    descriptor = socket.getsockopt(zmq.FD)
    assert isinstance(descriptor, int)
    return descriptor


def _drain(socket: "zmq.Socket[bytes]") -> list[bytes]:
    frames: list[bytes] = []
    while True:
        try:
            frames.append(socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return frames


class ServerChannel:
    """The HTTP process's end. `on_message` runs in the event loop, once per message, in order."""

    def __init__(self, address: ChannelAddress) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._reader = _reader(self._context, address.from_rank)
        self._writer = _writer(self._context, address.to_rank)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_message: Callable[[FromRank], None] | None = None
        self._rank_pid: int | None = None
        self._silent_s = 0.0

    def start(self, on_message: Callable[[FromRank], None]) -> None:
        """Read messages from now on, in the running loop."""
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._loop.add_reader(_descriptor(self._reader), self._on_readable)
        # The descriptor is edge-triggered: what came before it was watched raises no event.
        self._loop.call_soon(self._on_readable)

    def send(self, message: ToRank) -> None:
        """Queue a message; never blocks."""
        self._writer.send(self._encoder.encode(message), zmq.NOBLOCK)

    async def until_silent(
        self, limit_s: float = FROZEN_S, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        """Return when the rank's process has said nothing, not even a beat, for `limit_s`; not before its first beat.

        A process that a debugger holds may be silent. Ticks are counted and no clock is read: when both processes stood still
        (a suspended machine, a stopped process group), none is late.
        """
        tick_s = min(BEAT_S, limit_s / 10)
        while self._silent_s <= limit_s:
            await sleep(tick_s)
            if self._rank_pid is not None and not _is_traced(self._rank_pid):
                self._silent_s += tick_s

    def close(self) -> None:
        if self._writer.closed:
            return
        if self._loop is not None:
            self._loop.remove_reader(_descriptor(self._reader))
        self._reader.close()
        self._writer.close()
        self._context.term()

    def _on_readable(self) -> None:
        if self._reader.closed or self._on_message is None:
            return
        for frame in _drain(self._reader):
            self._silent_s = 0.0
            message = self._decoder.decode(frame)
            if isinstance(message, Beat):
                self._rank_pid = message.pid
            else:
                self._on_message(message)


def _is_traced(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return "TracerPid:\t0\n" not in status


class RankChannel:
    """The rank's end, for a plain blocking loop. `wake` may be called from any thread; the rest from one thread only."""

    def __init__(self, address: ChannelAddress) -> None:
        self._address = address
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._reader = _reader(self._context, address.to_rank)
        self._writer = _writer(self._context, address.from_rank)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(_descriptor(self._reader), selectors.EVENT_READ)
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._ends = threading.Event()
        self._beats: threading.Thread | None = None

    def start_beats(self, interval_s: float = BEAT_S) -> None:
        """Let the other side know from now on that this process runs, until `close`."""
        self._beats = threading.Thread(target=self._beat, args=(interval_s,), name="beats", daemon=True)
        self._beats.start()

    def _beat(self, interval_s: float) -> None:
        beat = msgspec.msgpack.encode(Beat(os.getpid()))
        with _writer(self._context, self._address.from_rank) as writer:
            while True:
                writer.send(beat)
                if self._ends.wait(interval_s):
                    return

    def receive(self, timeout_s: float | None = 0.0) -> list[ToRank]:
        """Messages that are there, oldest first. With none, wait up to `timeout_s` (None: without end) for a message or a
        `wake`; may return [] in either case."""
        frames = _drain(self._reader)
        if not frames and timeout_s != 0.0:
            self._selector.select(timeout_s)
            frames = _drain(self._reader)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        return [self._decoder.decode(frame) for frame in frames]

    def wake(self) -> None:
        """End a `receive` that waits, or the next one that would."""
        os.eventfd_write(self._wake_fd, 1)

    def send(self, message: FromRank) -> None:
        self._writer.send(self._encoder.encode(message), zmq.NOBLOCK)

    @staticmethod
    def last_words(address: ChannelAddress, message: FromRank) -> None:
        """Say one thing over a connection of its own, from any thread, and wait (half a second at most) until it left."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        with _writer(context, address.from_rank) as writer:
            writer.send(msgspec.msgpack.encode(message))
        context.term()

    def close(self) -> None:
        if self._writer.closed:
            return
        self._ends.set()
        if self._beats is not None:
            self._beats.join()
        self._selector.close()
        self._reader.close()
        self._writer.close()
        self._context.term()
        os.close(self._wake_fd)
