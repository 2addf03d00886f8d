"""Ports for servers that a test starts a moment later."""

import random
import socket

BELOW_OUTGOING = range(16_000, 29_000)
"""The kernel gives outgoing connections ports from 32768 on; any of those may be taken before its server is up."""
_random = random.SystemRandom()
"""Several test processes ask at once, and some tests seed the module's generator."""


def free_port() -> int:
    while True:
        port = _random.choice(BELOW_OUTGOING)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
