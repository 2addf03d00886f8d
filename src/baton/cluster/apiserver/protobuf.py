"""The few protobuf bodies that kubectl's generators send: `create namespace|configmap|secret|serviceaccount`.

Owns a small wire-format reader and the field numbers of those four kinds. Everything else gets 415 with advice. Not
here: answers, which are always JSON (clients accept that).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from baton.cluster.apiserver.errors import StatusError, bad_request

JSON = dict[str, Any]
PROTOBUF_TYPE = "application/vnd.kubernetes.protobuf"
_MAGIC = b"k8s\x00"

# Field number -> (JSON name, type): s string, i integer, b bool, y bytes (base64 in JSON), {x map of string to x,
# [x list of x, else a message below.
_MESSAGES: dict[str, dict[int, tuple[str, str]]] = {
    "ObjectMeta": {
        1: ("name", "s"), 2: ("generateName", "s"), 3: ("namespace", "s"), 5: ("uid", "s"),
        6: ("resourceVersion", "s"), 11: ("labels", "{s"), 12: ("annotations", "{s"), 14: ("finalizers", "[s"),
    },
    "Namespace": {1: ("metadata", "ObjectMeta"), 2: ("spec", "NamespaceSpec"), 3: ("status", "NamespaceStatus")},
    "NamespaceSpec": {1: ("finalizers", "[s")},
    "NamespaceStatus": {1: ("phase", "s")},
    "ConfigMap": {1: ("metadata", "ObjectMeta"), 2: ("data", "{s"), 3: ("binaryData", "{y"), 4: ("immutable", "b")},
    "Secret": {1: ("metadata", "ObjectMeta"), 2: ("data", "{y"), 3: ("type", "s"), 4: ("stringData", "{s"),
               5: ("immutable", "b")},
    "ServiceAccount": {1: ("metadata", "ObjectMeta"), 4: ("automountServiceAccountToken", "b")},
}  # fmt: skip


def decode_protobuf(raw: bytes) -> JSON:
    """A `k8s\\0` envelope as the JSON object it stands for; 415 for kinds that are not known here."""
    if not raw.startswith(_MAGIC):
        raise bad_request("the protobuf body does not start with the Kubernetes prefix")
    envelope = dict(_fields(raw[4:]))
    type_meta = dict(_fields(_bytes(envelope.get(1, b""))))
    kind, api_version = _text(type_meta.get(2, b"")), _text(type_meta.get(1, b""))
    if kind not in _MESSAGES or api_version != "v1":
        advice = "add --dry-run=client -o yaml and pipe it to kubectl create -f -"
        message = f"protobuf bodies of {api_version} {kind} are not accepted, application/json is: {advice}"
        raise StatusError(415, "UnsupportedMediaType", message)
    return {"apiVersion": api_version, "kind": kind, **_message(_bytes(envelope.get(2, b"")), kind)}


def _message(raw: bytes, kind: str) -> JSON:
    out: JSON = {}
    known = _MESSAGES[kind]
    for number, value in _fields(raw):
        if number not in known:
            continue
        name, form = known[number]
        if form[0] == "{":
            entry = dict(_fields(_bytes(value)))
            out.setdefault(name, {})[_text(entry.get(1, b""))] = _scalar(entry.get(2, b""), form[1])
        elif form[0] == "[":
            out.setdefault(name, []).append(_scalar(value, form[1]))
        elif form in _MESSAGES:
            out[name] = _message(_bytes(value), form)
        elif value not in (b"", 0):
            out[name] = _scalar(value, form)
    return out


def _scalar(value: bytes | int, form: str) -> Any:
    if form == "b":
        return bool(value)
    if form == "y":
        return base64.b64encode(_bytes(value)).decode()
    return value if form == "i" else _text(value)


def _fields(raw: bytes) -> Iterator[tuple[int, bytes | int]]:
    position = 0
    while position < len(raw):
        tag, position = _varint(raw, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(raw, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(raw, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise bad_request("the protobuf body is malformed: unknown wire type")
        if position + size > len(raw):
            raise bad_request("the protobuf body is malformed: a field is cut off")
        yield number, raw[position : position + size]
        position += size


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(raw):
            break
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise bad_request("the protobuf body is malformed: a number is cut off")


def _bytes(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise bad_request("the protobuf body is malformed: a number where text belongs")
    return value


def _text(value: bytes | int) -> str:
    try:
        return _bytes(value).decode()
    except UnicodeDecodeError:
        raise bad_request("the protobuf body is malformed: text is not UTF-8") from None
