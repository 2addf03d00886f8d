"""What can go wrong between us and an API server, as types.

An answer of the server that is not 2xx becomes :class:`ApiError` (or one of its named kinds), built from the
`Status` object that Kubernetes sends. No answer at all becomes :class:`Unreachable`. Whether to try again is a
property of the error, not of the caller: see :attr:`ClientError.retryable`.
"""

from __future__ import annotations

from typing import Any


class ClientError(Exception):
    """Base of everything this package raises."""

    retryable: bool = False


class ConfigError(ClientError):
    """A kubeconfig, token file or credential plug-in cannot be used; the message names the file and the field."""


class Unreachable(ClientError):
    """No answer: refused, reset, timed out, or a broken answer. The write may or may not have happened."""

    retryable = True


class ApiError(ClientError):
    """The server answered with a failure.

    ``code`` is the HTTP status, ``reason`` Kubernetes' machine-readable word (``NotFound``, ``Conflict`` ...),
    ``causes`` the list of ``{field, reason, message}`` of a validation failure, ``retry_after_s`` what the server asked for.
    """

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        details: dict[str, Any] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{code} {reason}: {message}" if reason else f"{code}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details or {}
        self.retry_after_s = retry_after_s

    @property
    def causes(self) -> list[dict[str, Any]]:
        causes = self.details.get("causes")
        return list(causes) if isinstance(causes, list) else []

    @property
    def retryable(self) -> bool:  # type: ignore[override]
        """True when the same request may succeed later: overload, time-out, server fault or a lost race."""
        return self.code in (409, 410, 429) or self.code >= 500


class NotFound(ApiError):
    """404: the object, or its whole kind, does not exist."""


class AlreadyExists(ApiError):
    """409 on create: the name is taken."""


class Conflict(ApiError):
    """409 on write: the object changed since it was read, or a precondition failed."""


class Gone(ApiError):
    """410: the resourceVersion or continue token is too old; list again."""


class Invalid(ApiError):
    """422 (or 400): the server refuses the object; trying again without a change cannot help."""


def from_status(code: int, body: object, *, retry_after_s: float | None = None) -> ApiError:
    """The error for an answer with HTTP status ``code`` and decoded ``body`` (a `Status` object or anything else)."""
    reason, message, details = "", "", None
    if isinstance(body, dict):
        reason = str(body.get("reason") or "")
        message = str(body.get("message") or "")
        raw = body.get("details")
        details = raw if isinstance(raw, dict) else None
        inner = body.get("code")
        if isinstance(inner, int) and inner >= 400:
            code = inner
    elif body:
        message = str(body)[:500]
    kind = _kind(code, reason)
    return kind(code, reason, message or f"HTTP {code}", details=details, retry_after_s=retry_after_s)


def _kind(code: int, reason: str) -> type[ApiError]:
    if code == 409:
        return AlreadyExists if reason == "AlreadyExists" else Conflict
    if code == 410 or reason in ("Gone", "Expired"):
        return Gone
    return {404: NotFound, 422: Invalid, 400: Invalid}.get(code, ApiError)
