"""Names, labels and label values: what Kubernetes allows, and its words for what it does not.

Owns checks on strings that return a list of messages (empty: fine). Not here: which field is checked by which.
"""

from __future__ import annotations

import re
import secrets
from typing import Any

from baton.cluster.apiserver.errors import Cause

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_SUFFIX = "bcdfghjklmnpqrstvwxz2456789"

_SUBDOMAIN_TEXT = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    r"'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_LABEL_TEXT = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_LABEL_1035_TEXT = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, "
    "and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is "
    "'[a-z]([-a-z0-9]*[a-z0-9])?')"
)
_QUALIFIED_TEXT = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric "
    "character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is "
    "'([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)
_VALUE_TEXT = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)


def check_subdomain(name: str) -> list[str]:
    return _check(name, _SUBDOMAIN, 253, _SUBDOMAIN_TEXT)


def check_label(name: str) -> list[str]:
    return _check(name, _LABEL, 63, _LABEL_TEXT)


def check_label_1035(name: str) -> list[str]:
    return _check(name, _LABEL_1035, 63, _LABEL_1035_TEXT)


def _check(name: str, pattern: re.Pattern[str], limit: int, text: str) -> list[str]:
    out = [] if pattern.fullmatch(name) else [text]
    if len(name) > limit:
        out.append(f"must be no more than {limit} characters")
    return out


def check_qualified(key: str) -> list[str]:
    """A label or annotation key, `prefix/name`."""
    prefix, slash, name = key.rpartition("/")
    out = []
    if slash:
        out += [f"prefix part {text}" for text in (check_subdomain(prefix) if prefix else ["must be non-empty"])]
    if not name:
        out.append("name part must be non-empty")
    elif not _QUALIFIED.fullmatch(name):
        out.append(_QUALIFIED_TEXT)
    if len(name) > 63:
        out.append("name part must be no more than 63 characters")
    return out


def check_label_value(value: str) -> list[str]:
    return _check(value, _VALUE, 63, _VALUE_TEXT)


def check_labels(labels: dict[str, Any], path: str) -> list[Cause]:
    out = [Cause.invalid(path, key, text) for key in labels for text in check_qualified(key)]
    return out + [Cause.invalid(path, v, text) for v in labels.values() for text in check_label_value(str(v))]


def check_annotations(annotations: dict[str, Any], path: str) -> list[Cause]:
    out = [Cause.invalid(path, key, text) for key in annotations for text in check_qualified(key.lower())]
    if sum(len(k) + len(str(v)) for k, v in annotations.items()) > 256 * 1024:
        out.append(Cause(path, "FieldValueTooLong", "Too long: may not be more than 262144 bytes"))
    return out


def generate(prefix: str) -> str:
    """A name from generateName: the prefix (cut to 58) and five random characters."""
    return prefix[:58] + "".join(secrets.choice(_SUFFIX) for _ in range(5))
