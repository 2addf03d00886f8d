"""Errors of the API as Kubernetes `Status` objects.

Owns `StatusError` (what every handler raises), `Cause` (one wrong field) and the messages. Wording follows
kube-apiserver, because people and programs match on it. Not here: turning a Status into an HTTP response.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

JSON = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cause:
    """One entry of `details.causes`: the field's path, a reason word, and text."""

    field: str
    reason: str
    message: str

    @classmethod
    def required(cls, field: str, detail: str = "") -> Cause:
        return cls(field, "FieldValueRequired", _join("Required value", detail))

    @classmethod
    def invalid(cls, field: str, value: object, detail: str) -> Cause:
        return cls(field, "FieldValueInvalid", f"Invalid value: {_show(value)}: {detail}")

    @classmethod
    def wrong_type(cls, field: str, value: object, expected: str) -> Cause:
        got = _type_name(value)
        detail = f'{field or "object"} in body must be of type {expected}: "{got}"'
        return cls(field, "FieldValueTypeInvalid", f'Invalid value: "{got}": {detail}')

    @classmethod
    def not_supported(cls, field: str, value: object, allowed: Iterable[object]) -> Cause:
        names = ", ".join(_show(a) for a in allowed)
        return cls(field, "FieldValueNotSupported", f"Unsupported value: {_show(value)}: supported values: {names}")

    @classmethod
    def forbidden(cls, field: str, detail: str) -> Cause:
        return cls(field, "FieldValueForbidden", _join("Forbidden", detail))

    @classmethod
    def duplicate(cls, field: str, value: object) -> Cause:
        return cls(field, "FieldValueDuplicate", f"Duplicate value: {_show(value)}")

    @classmethod
    def not_found(cls, field: str, value: object) -> Cause:
        return cls(field, "FieldValueNotFound", f"Not found: {_show(value)}")

    def as_json(self) -> JSON:
        return {"reason": self.reason, "message": self.message, "field": self.field}


class StatusError(Exception):
    """An answer that is not a success. `details` may be empty; `code` is the HTTP status."""

    def __init__(self, code: int, reason: str, message: str, details: JSON | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details
        self.retry_after_s: int | None = None

    def status(self) -> JSON:
        out: JSON = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": self.message}
        if self.reason:
            out["reason"] = self.reason
        if self.details is not None:
            out["details"] = self.details
        out["code"] = self.code
        return out


def qualified(name: str, group: str) -> str:
    """`statefulsets.apps` or `Pod`: how messages name a resource or a kind."""
    return f"{name}.{group}" if group else name


def _details(plural: str, group: str, name: str) -> JSON:
    details: JSON = {"name": name} if name else {}
    if group:
        details["group"] = group
    details["kind"] = plural
    return details


def not_found(plural: str, group: str, name: str) -> StatusError:
    message = f'{qualified(plural, group)} "{name}" not found'
    return StatusError(404, "NotFound", message, _details(plural, group, name))


def no_such_resource() -> StatusError:
    return StatusError(404, "NotFound", "the server could not find the requested resource", {})


def already_exists(plural: str, group: str, name: str) -> StatusError:
    message = f'{qualified(plural, group)} "{name}" already exists'
    return StatusError(409, "AlreadyExists", message, _details(plural, group, name))


MODIFIED = "the object has been modified; please apply your changes to the latest version and try again"


def conflict(plural: str, group: str, name: str, why: str = MODIFIED) -> StatusError:
    message = f'Operation cannot be fulfilled on {qualified(plural, group)} "{name}": {why}'
    return StatusError(409, "Conflict", message, _details(plural, group, name))


def invalid(kind: str, group: str, name: str, causes: list[Cause]) -> StatusError:
    parts = [f"{c.field or '<nil>'}: {c.message}" for c in causes]
    text = parts[0] if len(parts) == 1 else f"[{', '.join(parts)}]"
    details = _details(kind, group, name)
    details["causes"] = [c.as_json() for c in causes]
    return StatusError(422, "Invalid", f'{qualified(kind, group)} "{name}" is invalid: {text}', details)


def bad_request(message: str) -> StatusError:
    return StatusError(400, "BadRequest", message)


def forbidden(message: str, details: JSON | None = None) -> StatusError:
    return StatusError(403, "Forbidden", message, details)


def unauthorized() -> StatusError:
    return StatusError(401, "Unauthorized", "Unauthorized")


def method_not_allowed() -> StatusError:
    return StatusError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource", {})


def unsupported_media_type(accepted: Iterable[str]) -> StatusError:
    message = f"the body of the request was in an unknown format - accepted media types include: {', '.join(accepted)}"
    return StatusError(415, "UnsupportedMediaType", message)


def too_large(limit_bytes: int) -> StatusError:
    return StatusError(413, "RequestEntityTooLarge", f"Request entity too large: limit is {limit_bytes}")


def expired(message: str) -> StatusError:
    return StatusError(410, "Expired", message)


def future_revision(asked: int, current: int) -> StatusError:
    """A list at a resourceVersion that does not exist yet; clients retry after a second."""
    error = StatusError(
        504,
        "Timeout",
        f"Timeout: Too large resource version: {asked}, current: {current}",
        {
            "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
            "retryAfterSeconds": 1,
        },
    )
    error.retry_after_s = 1
    return error


def internal(message: str) -> StatusError:
    return StatusError(500, "InternalError", f"Internal error occurred: {message}")


def _join(head: str, detail: str) -> str:
    return f"{head}: {detail}" if detail else head


def _show(value: object) -> str:
    if isinstance(value, dict | list):
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 200 else text[:200] + "..."
    return json.dumps(value, ensure_ascii=False)


def _type_name(value: object) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
