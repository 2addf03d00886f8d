"""Typed errors that cross a process or a wire.

One shape everywhere (DESIGN "Failure"): every accepted request ends in exactly one of finished, aborted, error, and an
error says at which stage it happened and whether a retry can help. Rooms raise `BatonError` subclasses; the HTTP edges
turn them into bodies. Nothing here knows HTTP frameworks.
"""

from typing import Literal

import msgspec

WORKER_LOST = "WorkerLostError"
"""`ErrorInfo.type` of requests whose worker lost its model process: the worker ends, another may take its place."""
ABORTED_CODE = 499
"""The client left, or asked for the end (nginx's code; HTTP has none)."""
Stage = Literal["router", "server", "prefill", "transfer", "decode", "store"]


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """What went wrong with one request.

    `code` is the HTTP status a client should see; `retryable` says whether the same request may succeed elsewhere.
    """

    type: str
    code: int
    message: str
    stage: Stage = "server"
    request_id: str | None = None
    retryable: bool = False
    param: str | None = None


class BatonError(Exception):
    """Base of errors that a user or an operator may see."""


class RequestError(BatonError):
    """A request that cannot be served; carries the `ErrorInfo` sent to the client."""

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.message)
        self.info = info


def bad_request(message: str, param: str | None = None) -> RequestError:
    """A 400 that names the offending field in `param`."""
    return RequestError(ErrorInfo("BadRequestError", 400, message, param=param))
