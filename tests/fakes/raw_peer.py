"""A peer of a transfer that says exactly what a test wants it to, right or wrong."""

import json
import socket
from types import TracebackType
from urllib.request import Request, urlopen

from tests.fakes.transfer_pair import DEADLINE_S, PAGE_BYTES, page_layout

from baton.transfer.frames import PROTOCOL_VERSION, Frame, Hello, Mode, Page, Ping, Pong, Welcome, decode, encode


class RawPeer:
    """One end of a session. Ends of the connection read as `ConnectionError`."""

    def __init__(self, sock: socket.socket, page_bytes: int = PAGE_BYTES) -> None:
        sock.settimeout(DEADLINE_S)
        self.sock = sock
        self.page_bytes = page_bytes

    @classmethod
    def as_decode(cls, address: tuple[str, int], page_bytes: int = PAGE_BYTES) -> "RawPeer":
        """Dial a prefill rank and say hello; pages will travel over this connection."""
        peer = cls(socket.create_connection(address), page_bytes)
        peer.send(Hello(PROTOCOL_VERSION, "raw", page_layout(page_bytes)))
        assert isinstance(peer.read(), Welcome)
        peer.send(Mode("tcp"))
        return peer

    def send(self, *frames: Frame) -> None:
        self.sock.sendall(b"".join(map(encode, frames)))

    def read(self) -> Frame:
        """The next frame; pings are answered, the body of a page is read over."""
        while True:
            frame = decode(self.read_bytes(int.from_bytes(self.read_bytes(4), "little")))
            if isinstance(frame, Page):
                self.read_bytes(self.page_bytes)
            if isinstance(frame, Ping):
                self.send(Pong())
                continue
            return frame

    def read_bytes(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.sock.recv(count - len(data))
            if not part:
                raise ConnectionError("closed")
            data += part
        return data

    def closed_by_peer(self) -> bool:
        """Waits until the other side ends the connection."""
        try:
            while True:
                self.read()
        except ConnectionError:
            return True

    def __enter__(self) -> "RawPeer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()


class RawPrefill:
    """A prefill rank that is registered and listens, and for the rest does what the test says."""

    def __init__(self, bootstrap_port: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(DEADLINE_S)
        entry = dict.fromkeys(("attn_tp_size", "attn_dp_size", "pp_size", "system_dp_size"), 1)
        entry |= dict.fromkeys(("attn_tp_rank", "attn_dp_rank", "pp_rank", "system_dp_rank"), 0)
        address = {"role": "Prefill", "rank_ip": "127.0.0.1", "rank_port": self.listener.getsockname()[1]}
        body = json.dumps(entry | address).encode()
        url = f"http://127.0.0.1:{bootstrap_port}/route"
        with urlopen(Request(url, body, {"Content-Type": "application/json"}, method="PUT"), timeout=DEADLINE_S):
            pass

    def accept(self) -> RawPeer:
        """The next session, hello done: pages travel over the connection."""
        peer = RawPeer(self.listener.accept()[0])
        assert isinstance(peer.read(), Hello)
        peer.send(Welcome(None))
        assert peer.read() == Mode("tcp")
        return peer

    def __enter__(self) -> "RawPrefill":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.listener.close()
