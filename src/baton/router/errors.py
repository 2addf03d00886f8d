"""Errors the router itself makes, and how it reads those of workers. Bodies of workers are never rewritten."""

from typing import Any

import msgspec

from baton.protocol.errors import ErrorInfo, RequestError, Stage

_encode = msgspec.json.Encoder().encode
TYPE_BY_STATUS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "PayloadTooLargeError",
    429: "TooManyRequestsError",
    431: "HeadersTooLargeError",
    499: "ClientClosedRequest",
    500: "InternalServerError",
    501: "NotImplementedError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


def router_error(
    status: int,
    message: str,
    *,
    kind: str | None = None,
    stage: Stage = "router",
    retryable: bool = False,
    param: str | None = None,
) -> RequestError:
    """An error of ours, to be raised. `kind` is the short machine name; default: by status."""
    error_type = kind or TYPE_BY_STATUS.get(status, "InternalServerError")
    return RequestError(ErrorInfo(error_type, status, message, stage, None, retryable, param))


def error_body(info: ErrorInfo, request_id: str) -> bytes:
    """`{"error": {type, code, message, stage, request_id, retryable, param}}`, every key always there."""
    return _encode(
        {
            "error": {
                "type": info.type,
                "code": info.code,
                "message": info.message,
                "stage": info.stage,
                "request_id": request_id,
                "retryable": info.retryable,
                "param": info.param,
            }
        }
    )


def error_of(body: bytes) -> dict[str, Any] | None:
    """The error object of a worker's answer: ours, SGLang's generic one, or the OpenAI routes' flat one."""
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if not isinstance(decoded, dict):
        return None
    error = decoded.get("error")
    if isinstance(error, dict):
        return error
    return decoded if decoded.get("object") == "error" else None
