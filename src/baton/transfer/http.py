"""The few HTTP calls of a transfer (bootstrap look-up and registration), on its event loop, bounded in size.

One request per connection, no redirects, no TLS: this is the transfer's client for bootstrap servers and nothing else.
"""

import asyncio
import contextlib

import httptools

from baton.transfer.errors import TransferError

_MAX_RESPONSE_BYTES = 64 << 10


class _Response:
    """Callbacks of httptools."""

    def __init__(self) -> None:
        self.body = b""
        self.complete = False

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


async def http_call(method: str, host: str, port: int, target: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body. Raises OSError (unreachable), `TransferError` (not HTTP, too large); the caller limits the time."""
    reader, writer = await asyncio.open_connection(host.strip("[]"), port)
    try:
        head = [f"{method} {target} HTTP/1.1", f"Host: {host}:{port}", "Connection: close"]
        if body:
            head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        writer.write("\r\n".join([*head, "", ""]).encode() + body)
        response = _Response()
        parser = httptools.HttpResponseParser(response)
        num_bytes = 0
        while not response.complete and (data := await reader.read(_MAX_RESPONSE_BYTES)):
            num_bytes += len(data)
            if num_bytes > _MAX_RESPONSE_BYTES:
                raise TransferError(f"answer of {host}:{port} is larger than {_MAX_RESPONSE_BYTES} bytes")
            parser.feed_data(data)
        if not response.complete:
            raise TransferError(f"{host}:{port} closed the connection in the middle of its answer")
        return int(parser.get_status_code()), response.body
    except httptools.HttpParserError as error:
        raise TransferError(f"{host}:{port} does not answer in HTTP: {error}") from None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
