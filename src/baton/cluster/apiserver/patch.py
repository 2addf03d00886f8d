"""JSON patch (RFC 6902) and merge patch (RFC 7386) on plain objects.

Owns `json_patch` and `merge_patch`; both return a new object. Not here: strategic merge (`strategic`), apply
(`ownership`).
"""

from __future__ import annotations

import copy
from typing import Any

from baton.cluster.apiserver.errors import StatusError, bad_request

JSON = dict[str, Any]
MAX_OPERATIONS = 10_000


def merge_patch(target: Any, patch: Any) -> Any:
    """`null` deletes, objects merge, everything else replaces."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    out = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            out.pop(name, None)
        else:
            out[name] = merge_patch(out.get(name), value)
    return out


def json_patch(target: JSON, operations: Any) -> JSON:
    """Applies the list of operations; raises 400 for a malformed one, 422 for one that does not fit the object."""
    if not isinstance(operations, list):
        what = "object" if isinstance(operations, dict) else type(operations).__name__
        raise bad_request(
            f"error decoding patch: json: cannot unmarshal {what} into Go value of type []handlers.jsonPatchOp"
        )
    if len(operations) > MAX_OPERATIONS:
        raise StatusError(
            413,
            "RequestEntityTooLarge",
            f"The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {len(operations)}",
        )
    document: Any = copy.deepcopy(target)
    for index, operation in enumerate(operations):
        if not isinstance(operation, dict) or not isinstance(operation.get("path"), str) or "op" not in operation:
            raise bad_request(f"error decoding patch: operation {index} needs op and path")
        try:
            document = _apply(document, operation)
        except (KeyError, IndexError, TypeError, ValueError):
            raise StatusError(
                422, "Invalid", "the server rejected our request due to an error in our request", {}
            ) from None
    if not isinstance(document, dict):
        raise bad_request("the patched document is not an object")
    return document


def _apply(document: Any, operation: JSON) -> Any:
    kind, path = operation["op"], _pointer(operation["path"])
    if kind == "add":
        return _add(document, path, copy.deepcopy(operation["value"]))
    if kind == "remove":
        return _remove(document, path)
    if kind == "replace":
        _get(document, path)
        return _add(_remove(document, path), path, copy.deepcopy(operation["value"])) if path else operation["value"]
    if kind == "test":
        if not _equal(_get(document, path), operation.get("value")):
            raise ValueError("test failed")
        return document
    source = _pointer(operation["from"])
    value = copy.deepcopy(_get(document, source))
    if kind == "move":
        return _add(_remove(document, source), path, value)
    if kind == "copy":
        return _add(document, path, value)
    raise ValueError(f"unknown operation {kind!r}")


def _equal(a: Any, b: Any) -> bool:
    """JSON equality: true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _pointer(text: str) -> list[str]:
    if text == "":
        return []
    if not text.startswith("/"):
        raise ValueError("a JSON pointer starts with /")
    return [part.replace("~1", "/").replace("~0", "~") for part in text[1:].split("/")]


def _get(document: Any, path: list[str]) -> Any:
    for name in path:
        document = document[_index(name, len(document) - 1)] if isinstance(document, list) else document[name]
    return document


def _index(name: str, last: int) -> int:
    if not name.isdigit() or (len(name) > 1 and name[0] == "0") or int(name) > last:
        raise IndexError(name)
    return int(name)


def _add(document: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    parent, name = _get(document, path[:-1]), path[-1]
    if isinstance(parent, list):
        parent.insert(len(parent) if name == "-" else _index(name, len(parent)), value)
    elif isinstance(parent, dict):
        parent[name] = value
    else:
        raise TypeError(name)
    return document


def _remove(document: Any, path: list[str]) -> Any:
    if not path:
        return None
    parent, name = _get(document, path[:-1]), path[-1]
    if isinstance(parent, list):
        del parent[_index(name, len(parent) - 1)]
    else:
        del parent[name]
    return document
