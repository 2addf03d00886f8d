"""SPDY/3.1 frames, as far as kubectl's port-forward uses them.

Owns `SpdyDecoder` (bytes in, frames out, split anywhere) and the encoders. Header blocks share one zlib stream per
direction with the SPDY/3 dictionary. Not here: sockets and pods (see `portforward`).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from baton.cluster.apiserver.spdy_dictionary import DICTIONARY

SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE = 1, 2, 3, 4, 6, 7, 8, 9
FIN = 1
MAX_FRAME_BYTES = 4 * 1024 * 1024
MAX_HEADER_BYTES = 64 * 1024


class SpdyError(Exception):
    """The peer does not speak SPDY/3.1, or sends frames beyond the limits."""


@dataclass(slots=True)
class Frame:
    """`kind` None is a data frame. `body` is the payload after the stream id."""

    kind: int | None
    stream: int
    fin: bool = False
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class SpdyDecoder:
    """Feed it what arrives; it yields complete frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)

    def feed(self, data: bytes) -> Iterator[Frame]:
        self._buffer += data
        while len(self._buffer) >= 8:
            first, second = struct.unpack_from(">II", self._buffer)
            size, flags = second & 0xFFFFFF, second >> 24
            if size > MAX_FRAME_BYTES:
                raise SpdyError(f"a frame of {size} bytes is over the limit")
            if len(self._buffer) < 8 + size:
                return
            body = bytes(self._buffer[8 : 8 + size])
            del self._buffer[: 8 + size]
            if first >> 31:
                yield self._control(first, flags, body)
            else:
                yield Frame(None, first, bool(flags & FIN), body)

    def _control(self, first: int, flags: int, body: bytes) -> Frame:
        version, kind = (first >> 16) & 0x7FFF, first & 0xFFFF
        if version != 3:
            raise SpdyError(f"SPDY version {version} is not 3")
        if kind not in (SYN_STREAM, SYN_REPLY, RST_STREAM, HEADERS, WINDOW_UPDATE, PING):
            return Frame(kind, 0, False, body)
        if len(body) < 4:
            raise SpdyError("a control frame is cut off")
        stream = int.from_bytes(body[:4]) & 0x7FFFFFFF
        if kind == SYN_STREAM:
            return Frame(kind, stream, bool(flags & FIN), b"", self._headers(body[10:]))
        if kind in (SYN_REPLY, HEADERS):
            return Frame(kind, stream, bool(flags & FIN), b"", self._headers(body[4:]))
        return Frame(kind, stream, bool(flags & FIN), body[4:])

    def _headers(self, raw: bytes) -> dict[str, str]:
        try:
            block = self._inflate.decompress(raw, MAX_HEADER_BYTES)
            if self._inflate.unconsumed_tail:
                raise SpdyError("a header block is over the limit")
            return _read_headers(block)
        except (zlib.error, struct.error, UnicodeDecodeError) as error:
            raise SpdyError(f"a header block cannot be read: {error}") from None


def _read_headers(block: bytes) -> dict[str, str]:
    (count,) = struct.unpack_from(">I", block)
    position, texts = 4, []
    for _ in range(min(count, 256) * 2):
        (size,) = struct.unpack_from(">I", block, position)
        if position + 4 + size > len(block):
            raise SpdyError("a header block is cut off")
        texts.append(block[position + 4 : position + 4 + size].decode())
        position += 4 + size
    return {k.lower(): v for k, v in zip(texts[::2], texts[1::2], strict=True)}


class SpdyEncoder:
    """Makes the frames of one direction of a connection."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(zdict=DICTIONARY)

    def headers(self, headers: dict[str, str]) -> bytes:
        block = struct.pack(">I", len(headers))
        for name, value in headers.items():
            for text in (name.encode(), value.encode()):
                block += struct.pack(">I", len(text)) + text
        return self._deflate.compress(block) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    def syn_stream(self, stream: int, headers: dict[str, str], *, fin: bool = False) -> bytes:
        return control(SYN_STREAM, struct.pack(">IIH", stream, 0, 0) + self.headers(headers), FIN if fin else 0)

    def syn_reply(self, stream: int, headers: dict[str, str] | None = None) -> bytes:
        return control(SYN_REPLY, struct.pack(">I", stream) + self.headers(headers or {}))


def control(kind: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack(">HHI", 0x8003, kind, flags << 24 | len(body)) + body


def data(stream: int, body: bytes, *, fin: bool = False) -> bytes:
    return struct.pack(">II", stream, (FIN if fin else 0) << 24 | len(body)) + body


def reset(stream: int, status: int = 5) -> bytes:
    return control(RST_STREAM, struct.pack(">II", stream, status))


def window_update(stream: int, size: int) -> bytes:
    return control(WINDOW_UPDATE, struct.pack(">II", stream, size))
