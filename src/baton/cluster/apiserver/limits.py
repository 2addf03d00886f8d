"""Value validations of CRD fields: enum, pattern, ranges, sizes, formats, anyOf/oneOf/allOf/not.

Owns `check_limits` (on a field's parsed `Limits`) and `matches` (a small JSON schema judge for the combinators).
Not here: CEL rules (`x-kubernetes-validations`); `crd` warns that they are not evaluated.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

from baton.cluster.apiserver.errors import Cause
from baton.cluster.apiserver.schema import Limits

JSON = dict[str, Any]
_DURATION = re.compile(r"^[-+]?(0|(\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h))+$")


def check_limits(value: Any, limits: Limits, path: str) -> list[Cause]:
    """All ways in which `value` breaks `limits`."""
    if limits.enum is not None and value not in limits.enum:
        return [Cause.not_supported(path, value, limits.enum)]
    out: list[Cause] = []
    if isinstance(value, str):
        _text(value, limits, path, out)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _number(value, limits, path, out)
    elif isinstance(value, list):
        _sizes(len(value), limits.min_items, limits.max_items, "items", path, value, out)
        if limits.unique_items and any(item in value[:index] for index, item in enumerate(value)):
            out.append(Cause.invalid(path, value, f"{path} in body shouldn't contain duplicates"))
    elif isinstance(value, dict):
        _sizes(len(value), limits.min_properties, limits.max_properties, "properties", path, value, out)
    _combinators(value, limits, path, out)
    return out


def _text(value: str, limits: Limits, path: str, out: list[Cause]) -> None:
    if limits.max_length is not None and len(value) > limits.max_length:
        out.append(Cause(path, "FieldValueTooLong", f"Too long: may not be more than {limits.max_length} bytes"))
    if limits.min_length is not None and len(value) < limits.min_length:
        out.append(Cause.invalid(path, value, f"{path} in body should be at least {limits.min_length} chars long"))
    if limits.pattern is not None and not _pattern(limits.pattern).search(value):
        out.append(Cause.invalid(path, value, f"{path} in body should match '{limits.pattern}'"))
    if limits.format and not _format_ok(limits.format, value):
        out.append(Cause.invalid(path, value, f'{path} in body must be of type {limits.format}: "{value}"'))


@lru_cache(maxsize=512)
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text)


def _number(value: float, limits: Limits, path: str, out: list[Cause]) -> None:
    low, high = limits.minimum, limits.maximum
    if low is not None and (value < low or (limits.exclusive_minimum and value == low)):
        word = "greater than" if limits.exclusive_minimum else "greater than or equal to"
        out.append(Cause.invalid(path, value, f"{path} in body should be {word} {_plain(low)}"))
    if high is not None and (value > high or (limits.exclusive_maximum and value == high)):
        word = "less than" if limits.exclusive_maximum else "less than or equal to"
        out.append(Cause.invalid(path, value, f"{path} in body should be {word} {_plain(high)}"))
    if limits.multiple_of and value % limits.multiple_of:
        out.append(Cause.invalid(path, value, f"{path} in body should be a multiple of {_plain(limits.multiple_of)}"))


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)


def _sizes(size: int, low: int | None, high: int | None, what: str, path: str, value: Any, out: list[Cause]) -> None:
    if high is not None and size > high:
        out.append(Cause(path, "FieldValueTooMany", f"Too many: {size}: must have at most {high} {what}"))
    if low is not None and size < low:
        out.append(Cause.invalid(path, value, f"{path} in body should have at least {low} {what}"))


def _combinators(value: Any, limits: Limits, path: str, out: list[Cause]) -> None:
    if not all(matches(value, s) for s in limits.all_of):
        out.append(Cause.invalid(path, value, f'"{path}" must validate all the schemas (allOf)'))
    if limits.any_of and not any(matches(value, s) for s in limits.any_of):
        out.append(Cause.invalid(path, value, f'"{path}" must validate at least one schema (anyOf)'))
    if limits.one_of and sum(matches(value, s) for s in limits.one_of) != 1:
        out.append(Cause.invalid(path, value, f'"{path}" must validate one and only one schema (oneOf)'))
    if limits.negated is not None and matches(value, limits.negated):
        out.append(Cause.invalid(path, value, f'"{path}" must not validate the schema (not)'))


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
}


def matches(value: Any, schema: JSON) -> bool:
    """Whether `value` validates the JSON schema (the subset that structural schemas allow in combinators)."""
    kind = schema.get("type")
    if kind and not _TYPES[kind](value):
        return False
    if check_limits(value, limits_of(schema) or Limits(), ""):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        return all(r in value for r in schema.get("required", [])) and all(
            matches(value[k], s) for k, s in properties.items() if k in value
        )
    if isinstance(value, list) and "items" in schema:
        return all(matches(v, schema["items"]) for v in value)
    return True


_PLAIN = {
    "enum": "enum", "pattern": "pattern", "format": "format", "minimum": "minimum", "maximum": "maximum",
    "exclusiveMinimum": "exclusive_minimum", "exclusiveMaximum": "exclusive_maximum", "multipleOf": "multiple_of",
    "minLength": "min_length", "maxLength": "max_length", "minItems": "min_items", "maxItems": "max_items",
    "uniqueItems": "unique_items", "minProperties": "min_properties", "maxProperties": "max_properties",
    "allOf": "all_of", "anyOf": "any_of", "oneOf": "one_of", "not": "negated",
}  # fmt: skip


def limits_of(schema: JSON) -> Limits | None:
    """The `Limits` of a JSON schema node; None when it has none."""
    found = {attribute: schema[name] for name, attribute in _PLAIN.items() if schema.get(name) is not None}
    if found.get("format") not in _FORMATS:
        found.pop("format", None)
    return Limits(**found) if found else None


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def _parses(parse: Callable[[str], object]) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        try:
            parse(text)
        except ValueError:
            return False
        return True

    return check


_FORMATS: dict[str, Callable[[str], bool]] = {
    "date-time": _parses(datetime.fromisoformat),
    "byte": _is_base64,
    "ipv4": _parses(ipaddress.IPv4Address),
    "ipv6": _parses(ipaddress.IPv6Address),
    "cidr": _parses(ipaddress.ip_network),
    "duration": lambda text: bool(_DURATION.match(text)),
    "uuid": lambda text: bool(re.fullmatch(r"(?i)[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12}", text)),
}


def _format_ok(name: str, value: str) -> bool:
    return _FORMATS[name](value)
