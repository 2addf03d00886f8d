"""Who of the group is still there: a thread in each rank that hears and is heard over a connection of its own.

A rank that ends is noticed when its connection closes; one that stands still, or whose host is gone, when it has not been heard
of for LIMIT_S. That is counted in own beats: after a time in which the whole machine stood still nobody is late. Collectives have no
way out of their own, so whoever notices ends the whole process (`on_lost`).
"""

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
LIMIT_S = 10.0
MAX_WORDS_BYTES = 2000
BEAT = b"."
"""Anything else is a peer's last words, up to the end of the connection."""
ON_PURPOSE = b"!"
"""Before last words: the end is no failure."""


class Heartbeat:
    """`peers`: name -> connected socket, owned from now on. `on_lost(reason)` is called at most once, in the thread; instead of it
    `on_stop(words)`, where given, when a peer ends on purpose."""

    def __init__(
        self,
        peers: dict[str, socket.socket],
        on_lost: Callable[[str], None],
        on_stop: Callable[[str], None] | None = None,
        *,
        interval_s: float = INTERVAL_S,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._peers = peers
        self._on_lost, self._on_stop = on_lost, on_stop or on_lost
        self._is_stop = False
        self._interval_s, self._limit_s = interval_s, limit_s
        self._stop_read, self._stop_write = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the end that a peer may be about to tell."""
        self._thread.join(timeout_s)

    def close(self, last_words: str = "", *, on_purpose: bool = False) -> None:
        """Stop; peers that are told nothing see an end without a reason."""
        with contextlib.suppress(OSError):
            self._stop_write.send(b".")
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(self._limit_s)
        self._say(last_words.encode(), ON_PURPOSE if on_purpose else b"")
        for one in (*self._peers.values(), self._stop_read, self._stop_write):
            one.close()

    def _run(self) -> None:
        reason = self._watch()
        if reason is not None and self._is_stop:
            self._on_stop(reason)
        elif reason is not None:
            self._say(reason.encode())
            self._on_lost(reason)

    def _say(self, words: bytes, mark: bytes = b"") -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.settimeout(0.5)
                peer.sendall(mark + words[:MAX_WORDS_BYTES])

    def _watch(self) -> str | None:
        """Why the group is broken; None when `close` was called."""
        beats_unheard = dict.fromkeys(self._peers, 0)
        next_beat = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._stop_read, selectors.EVENT_READ, None)
            for name, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, name)
            while True:
                now = time.monotonic()
                if now >= next_beat:
                    next_beat = now + self._interval_s
                    for name, peer in self._peers.items():
                        if beats_unheard[name] * self._interval_s > self._limit_s:
                            return f"{name} has not been heard of for {self._limit_s:g} s"
                        beats_unheard[name] += 1
                        with contextlib.suppress(OSError):  # reading tells why
                            peer.send(BEAT, socket.MSG_DONTWAIT)
                for key, _ in selector.select(max(0.0, next_beat - time.monotonic())):
                    if key.data is None:
                        return None
                    reason = self._hear(key.data)
                    if reason is not None:
                        return reason
                    beats_unheard[key.data] = 0

    def _hear(self, name: str) -> str | None:
        """What `name` said that ends the group."""
        try:
            data = self._peers[name].recv(4096)
        except OSError as error:
            return f"{name} is gone: {error.strerror}"
        words = data.lstrip(BEAT)
        if words:
            self._is_stop = words.startswith(ON_PURPOSE)
            return words.removeprefix(ON_PURPOSE).decode(errors="replace")
        return None if data else f"{name} is gone: its connection was closed"
