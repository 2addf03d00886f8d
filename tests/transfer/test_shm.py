"""The shared memory offer: given to our own user for the right nonce, read-only, and only when it cannot kill the reader.
In every other case the session uses TCP and works."""

import os
import socket
from collections.abc import Iterator

import numpy as np
import pytest
from tests.fakes.transfer_pair import FIRST_TOKEN, PAGE_BYTES, open_pair

from baton.kvcache.page_memory import PageMemory
from baton.transfer import shm
from baton.transfer.base import Received
from baton.transfer.errors import TransferError
from baton.transfer.frames import ShmOffer
from baton.transfer.shm import RemotePages, ShmServer
from baton.transfer.thread import TransferThread


class UnsealedMemory:
    """A pool whose owner could truncate it."""

    num_pages, page_bytes = 2, PAGE_BYTES

    def __init__(self) -> None:
        self.fd = os.memfd_create("unsealed", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.num_pages * self.page_bytes)
        self.array = np.zeros((self.num_pages, self.page_bytes), dtype=np.uint8)


class Servers:
    """Offers on a transfer's thread, closed at the end."""

    def __init__(self) -> None:
        self.thread = TransferThread("test", 1, lambda: None)
        self.started: list[ShmServer] = []

    def serve(self, pages: PageMemory | UnsealedMemory) -> ShmServer:
        server = ShmServer(pages)
        self.thread.ask(lambda: server.start(self.thread.loop))
        self.started.append(server)
        return server

    def close(self) -> None:
        self.thread.close(lambda: [server.close() for server in self.started] and None)


@pytest.fixture
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.close()


def test_the_pool_is_mapped_and_cannot_be_written(servers: Servers) -> None:
    with PageMemory.create(4, PAGE_BYTES) as memory:
        remote = RemotePages.map(servers.serve(memory).offer(), PAGE_BYTES)
        memory.array[3] = 9
        assert (remote.array[3] == 9).all()
        assert remote.num_pages == 4
        with pytest.raises(ValueError, match="read-only"):
            remote.array[0] = 1


def test_a_wrong_or_withdrawn_nonce_gets_nothing(servers: Servers) -> None:
    with PageMemory.create(4, PAGE_BYTES) as memory:
        server = servers.serve(memory)
        offer = server.offer()
        with pytest.raises((TransferError, OSError)):
            RemotePages.map(ShmOffer(offer.socket_name, bytes(16), 4), PAGE_BYTES)
        server.withdraw(offer)
        with pytest.raises((TransferError, OSError)):
            RemotePages.map(offer, PAGE_BYTES)
        assert RemotePages.map(server.offer(), PAGE_BYTES).num_pages == 4


def test_another_user_gets_nothing(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    with PageMemory.create(4, PAGE_BYTES) as memory:
        offer = servers.serve(memory).offer()
        monkeypatch.setattr(shm, "_peer_uid", lambda _: os.geteuid() + 1)
        with pytest.raises((TransferError, OSError)):
            RemotePages.map(offer, PAGE_BYTES)


def test_memory_of_another_size_or_without_seal_is_refused(servers: Servers) -> None:
    with PageMemory.create(4, PAGE_BYTES) as memory:
        offer = servers.serve(memory).offer()
        with pytest.raises(TransferError, match="instead of 5 pages"):
            RemotePages.map(ShmOffer(offer.socket_name, offer.nonce, 5), PAGE_BYTES)
    unsealed = UnsealedMemory()
    with pytest.raises(TransferError, match="not sealed"):
        RemotePages.map(servers.serve(unsealed).offer(), PAGE_BYTES)
    os.close(unsealed.fd)


def test_a_silent_stranger_does_not_keep_others_out(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "_TIMEOUT_S", 60.0)  # Longer than the test may take: dropping the stranger cannot help.
    with PageMemory.create(4, PAGE_BYTES) as memory:
        offer = servers.serve(memory).offer()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
            stranger.connect(f"\0{offer.socket_name}")
            assert RemotePages.map(offer, PAGE_BYTES).num_pages == 4


def test_without_a_common_host_the_session_uses_tcp(bootstrap_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode on another host finds no such socket."""
    monkeypatch.setattr(ShmServer, "offer", lambda _: ShmOffer("baton-kv-somewhere-else", bytes(16), 16))
    with open_pair("shm", bootstrap_port) as pair:
        pair.begin(1, [0])
        assert pair.decode.transfer.session_modes() == {(("127.0.0.1", bootstrap_port), 0): "tcp"}
        pair.prefill.transfer.send(1, 0, [3], FIRST_TOKEN)
        assert isinstance(pair.decode.wait(1), Received)
