"""Listeners that a C library opens on all addresses, made deaf to everything but this machine.

For libraries that take no address to bind: the kernel drops what does not come from 127.0.0.0/8 or ::1 before the library
sees it (a classic socket filter: no privilege, inherited by accepted connections). Linux only, as these libraries are.
"""

import ctypes
import os
import socket
import struct
from pathlib import Path

_SO_ATTACH_FILTER = 26
_NET = -0x100000  # SKF_NET_OFF: loads count from the IP header
_LOAD_BYTE, _LOAD_WORD, _SHIFT_RIGHT, _JUMP_IF_EQUAL, _RETURN = 0x30, 0x20, 0x74, 0x15, 0x06
_ACCEPT, _DROP = 13, 14
_LISTEN = "0A"

# (code, constant, target if equal, target if not): the targets are instruction numbers, made relative by `_assembled`
_PROGRAM = (
    (_LOAD_BYTE, _NET, 0, 0),
    (_SHIFT_RIGHT, 4, 0, 0),
    (_JUMP_IF_EQUAL, 4, 3, 5),
    (_LOAD_BYTE, _NET + 12, 0, 0),
    (_JUMP_IF_EQUAL, 127, _ACCEPT, _DROP),
    (_LOAD_WORD, _NET + 8, 0, 0),
    (_JUMP_IF_EQUAL, 0, 7, _DROP),
    (_LOAD_WORD, _NET + 12, 0, 0),
    (_JUMP_IF_EQUAL, 0, 9, _DROP),
    (_LOAD_WORD, _NET + 16, 0, 0),
    (_JUMP_IF_EQUAL, 0, 11, _DROP),
    (_LOAD_WORD, _NET + 20, 0, 0),
    (_JUMP_IF_EQUAL, 1, _ACCEPT, _DROP),
    (_RETURN, 0xFFFFFFFF, 0, 0),
    (_RETURN, 0, 0, 0),
)


def open_listeners() -> set[int]:
    """File descriptors of this process that listen on all addresses."""
    inodes = _listening_inodes("/proc/self/net/tcp", "0" * 8) | _listening_inodes("/proc/self/net/tcp6", "0" * 32)
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue  # closed meanwhile
        if target.startswith("socket:[") and target[8:-1] in inodes:
            found.add(int(entry.name))
    return found


def loopback_only(descriptor: int) -> None:
    """Drop what reaches this listener from another machine. Raises `OSError`."""
    program = ctypes.create_string_buffer(_assembled())
    header = struct.pack("HxxxxxxP" if struct.calcsize("P") == 8 else "HxxP", len(_PROGRAM), ctypes.addressof(program))
    listener = socket.socket(fileno=os.dup(descriptor))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, header)
    finally:
        listener.close()


def _assembled() -> bytes:
    def one(number: int, code: int, constant: int, yes: int, no: int) -> bytes:
        if code == _JUMP_IF_EQUAL:
            yes, no = yes - number - 1, no - number - 1
        return struct.pack("=HBBI", code, yes, no, constant & 0xFFFFFFFF)

    return b"".join(one(number, *line) for number, line in enumerate(_PROGRAM))


def _listening_inodes(table: str, wildcard: str) -> set[str]:
    try:
        lines = Path(table).read_text().splitlines()[1:]
    except OSError:
        return set()
    rows = (line.split() for line in lines)
    return {row[9] for row in rows if row[3] == _LISTEN and row[1].partition(":")[0] == wildcard}
