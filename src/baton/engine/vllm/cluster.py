"""The nodes that one model is served from, where vLLM has a Ray cluster: what they say to one another, and where the head is.

`multi-node-serving.sh leader` leaves a `head` in its pod; each worker dials it and waits (`member`); a server that starts in the
head's pod takes the members (`lead`) and each of them then runs one node of our worker. Messages are lines of JSON. Nothing here
computes or loads a model: that is `engine.distributed`, which the nodes meet in afterwards.
"""

import os
import socket
import tempfile
from pathlib import Path

import msgspec

from baton.protocol.errors import BatonError
from baton.protocol.pod import listen_host

DEFAULT_PORT = 6379
"""Ray's."""
MAX_LINE_BYTES = 2**20
PING_S = 5.0
SILENCE_S = 20.0
"""A peer that has said nothing for so long is gone: four pings."""
CONNECT_TIMEOUT_S = 5.0


class ClusterError(BatonError):
    """A node cannot be reached, is gone, or says what no node would say."""


class Join(msgspec.Struct, tag="join", frozen=True):
    """Worker to head, first."""

    name: str


class Count(msgspec.Struct, tag="count", frozen=True):
    """To the head: how many nodes are there? Answered by `Nodes`."""


class Lead(msgspec.Struct, tag="lead", frozen=True):
    """Server to head, first. Answered by `Nodes`; ends with the connection."""


class Nodes(msgspec.Struct, tag="nodes", frozen=True):
    """`num_nodes`: the head's own included. `host`: the head's address as its workers see it ("": there are none)."""

    num_nodes: int
    host: str = ""


class Start(msgspec.Struct, tag="start", frozen=True):
    """Run a node with these flags of `baton engine`: server to head (of the first `num_workers`), head to worker."""

    flags: list[str]
    num_workers: int = 1


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """Head to worker: end your node and wait for the next `Start`."""


class Ended(msgspec.Struct, tag="ended", frozen=True):
    """A node has ended, or its worker has gone: worker to head, head to server."""

    reason: str


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """I am alive. Both ways between head and worker."""


Message = Join | Count | Lead | Nodes | Start | Stop | Ended | Ping

_decoder: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def encode(message: Message) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def decode(line: bytes, peer: str) -> Message:
    """Raises `ClusterError`: b"" (the end of a stream) too."""
    if not line.endswith(b"\n"):
        raise ClusterError(f"{peer} is gone")
    try:
        return _decoder.decode(line)
    except msgspec.MsgspecError as error:
        raise ClusterError(f"{peer} says what no node would say: {error}") from None


class Line:
    """A blocking connection to a head."""

    def __init__(self, host: str, port: int, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Raises `ClusterError`."""
        self.peer = f"the head at {host}:{port}"
        try:
            self._socket = socket.create_connection((host, port), timeout=timeout_s)
        except OSError as error:
            raise ClusterError(f"{self.peer} cannot be reached: {error}") from None
        self._file = self._socket.makefile("rb")

    def send(self, message: Message) -> None:
        try:
            self._socket.sendall(encode(message))
        except OSError as error:
            raise ClusterError(f"{self.peer} is gone: {error}") from None

    def receive(self, timeout_s: float | None = CONNECT_TIMEOUT_S) -> Message:
        """Raises `ClusterError` at the end of the connection or after `timeout_s` (None: wait without end)."""
        self._socket.settimeout(timeout_s)
        try:
            return decode(self._file.readline(MAX_LINE_BYTES), self.peer)
        except TimeoutError:
            raise ClusterError(f"{self.peer} said nothing for {timeout_s:g} s") from None
        except OSError as error:
            raise ClusterError(f"{self.peer} is gone: {error}") from None

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def own_host() -> str:
    """Where a program of this node reaches the head, which listens on all of the pod's addresses."""
    host = listen_host("0.0.0.0")
    return "127.0.0.1" if host == "0.0.0.0" else host


def head_file() -> Path:
    """Where a head leaves its port, for servers of the same container and user. Other users cannot write it."""
    return Path(tempfile.gettempdir()) / f"baton-nodes-{os.getuid()}" / "head.json"


def remember_head(port: int) -> None:
    """Raises OSError when the directory belongs to somebody else."""
    path = head_file()
    path.parent.mkdir(mode=0o700, exist_ok=True)
    _need_own(path.parent)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(msgspec.json.encode({"port": port}).decode())
    part.rename(path)


def known_head() -> int | None:
    """The port of the head that was started last, if any; it may be gone."""
    path = head_file()
    try:
        _need_own(path.parent)
        return msgspec.json.decode(path.read_bytes(), type=dict[str, int]).get("port")
    except (OSError, msgspec.MsgspecError):
        return None


def _need_own(directory: Path) -> None:
    if directory.stat().st_uid != os.getuid() or directory.is_symlink():
        raise OSError(f"{directory} belongs to another user")
