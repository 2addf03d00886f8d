"""Reads the `.schema` files: the built-in kinds' fields, types, list keys and simple defaults.

Owns the small text format:

    TypeName [atomic] [| description]
      field type [!] [key=a,b] [patch=k] [set] [atomic] [retain] [=default]

`[]T` is a list, `{}T` a map from string; `!` means required; `key=` the keys of a list that is a map (its first key is
also the strategic merge key unless `patch=` says otherwise); `set` a list of unique scalars; `atomic` one value;
`retain` strategic merge's retainKeys. Not here: defaults that depend on other fields (see `defaults`).
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources

from baton.cluster.apiserver.schema import ABSENT, Schema

_SCALARS = {
    "string": "string",
    "int": "integer",
    "number": "number",
    "bool": "boolean",
    "time": "time",
    "bytes": "bytes",
    "quantity": "quantity",
    "intOrString": "intOrString",
}
FILES = ("meta", "pod", "core", "apps", "groups")


@lru_cache(maxsize=1)
def builtin_types() -> dict[str, Schema]:
    """Every struct of the built-in kinds by type name. Shared: treat as read-only."""
    types: dict[str, Schema] = {}
    lines: list[tuple[Schema, str]] = []
    for name in FILES:
        text = resources.files(__package__).joinpath("schemas", f"{name}.schema").read_text("utf-8")
        lines += _structs(text, types)
    for struct, line in lines:
        _field(struct, line, types)
    return types


def _structs(text: str, types: dict[str, Schema]) -> list[tuple[Schema, str]]:
    """First pass: creates the empty structs, so that fields can refer to any of them."""
    fields: list[tuple[Schema, str]] = []
    struct: Schema | None = None
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if not line.startswith(" "):
            head, _, description = line.partition(" | ")
            name, *flags = head.split()
            struct = Schema("object", name=name, map_atomic="atomic" in flags, description=description)
            types[name] = struct
        elif struct is not None:
            fields.append((struct, line.strip()))
    return fields


def _field(struct: Schema, line: str, types: dict[str, Schema]) -> None:
    name, type_text, *flags = line.split()
    node = _type(type_text, types)
    for flag in flags:
        if flag == "!":
            struct.required += (name,)
        elif flag.startswith("key="):
            node.list_type, node.list_keys = "map", tuple(flag[4:].split(","))
            node.merge_key = node.list_keys[0]
        elif flag.startswith("patch="):
            node.merge_key = flag[6:]
        elif flag == "set":
            node.list_type, node.merge_key = "set", ""
        elif flag == "atomic":
            node.map_atomic = node.type == "object"
        elif flag == "retain":
            node.retain_keys = True
        elif flag.startswith("="):
            node.default = _default(flag[1:], node)
            struct.defaulted += (name,)
        else:
            raise ValueError(f"schema file: {struct.name}.{name}: unknown flag {flag!r}")
    struct.properties[name] = node


def _type(text: str, types: dict[str, Schema]) -> Schema:
    if text.startswith("[]"):
        return Schema("array", items=_type(text[2:], types))
    if text.startswith("{}"):
        return Schema("object", additional=_type(text[2:], types))
    if text == "any":
        return Schema("any", preserve_unknown=True)
    if text in _SCALARS:
        return Schema(_SCALARS[text])
    return types[text]


def _default(text: str, node: Schema) -> object:
    if node.default is not ABSENT and node.name:
        # A struct node is shared by all fields of its type, so all of them must agree on its default ({}).
        assert node.default == {}, node.name
    if node.type in ("integer", "boolean") or text[:1] in '{["':
        return json.loads(text)
    return text
