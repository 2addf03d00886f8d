"""How a transfer fails, in words and codes: one constructor per cause, so that both sides say the same thing.

Stage is always "transfer". `retryable` means: the same request may succeed on another pair, or a moment later.
"""

from baton.protocol.errors import ABORTED_CODE, BatonError, ErrorInfo, RequestError


class TransferError(BatonError):
    """A session with a peer cannot be made or kept: bad frame, refused hello, lost connection. Ends that session only."""


def broken(message: str) -> ErrorInfo:
    """A transfer or its connection broke."""
    return ErrorInfo("TransferError", 500, message, stage="transfer", retryable=True)


def timed_out(message: str) -> ErrorInfo:
    return ErrorInfo("TransferTimeout", 504, message, stage="transfer", retryable=True)


def aborted(reason: str) -> ErrorInfo:
    """Our own side gave the room up."""
    return ErrorInfo("Aborted", ABORTED_CODE, reason, stage="transfer")


def peer_aborted(side: str, reason: str) -> ErrorInfo:
    """The other side gave the room up, or refused it."""
    return ErrorInfo(
        "PeerAborted", 500, f"The {side} side ended the transfer: {reason}", stage="transfer", retryable=True
    )


def room_in_use(room: int) -> RequestError:
    """A second request with a room that has not ended yet."""
    message = f"bootstrap_room {room} is in use by another request."
    return RequestError(ErrorInfo("BadRequestError", 400, message, stage="transfer", param="bootstrap_room"))
