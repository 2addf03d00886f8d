"""Strategic merge patch: merge patch that knows which lists are maps.

Owns `strategic_merge`. Directives: `$patch: replace|delete|merge`, `$retainKeys`, `$deleteFromPrimitiveList/x`,
`$setElementOrder/x`. Merge keys come from the schema, so only built-in kinds have it. Not here: merge patch.
"""

from __future__ import annotations

from typing import Any

from baton.cluster.apiserver.errors import bad_request
from baton.cluster.apiserver.fieldset import child_schema
from baton.cluster.apiserver.schema import ANY, Schema

JSON = dict[str, Any]
_ORDER, _DELETE = "$setElementOrder/", "$deleteFromPrimitiveList/"


def strategic_merge(target: JSON, patch: JSON, schema: Schema) -> JSON:
    """A new object; raises 400 for a patch whose directives or merge keys are wrong."""
    return _map(target, patch, schema)


def _map(target: JSON, patch: JSON, schema: Schema) -> JSON:
    directive = patch.get("$patch")
    if directive == "replace":
        return _clean_map({k: v for k, v in patch.items() if k != "$patch"})
    if directive == "delete":
        return {}
    if directive not in (None, "merge"):
        raise bad_request(f'unknown $patch directive "{directive}" in the patch')
    out = dict(target)
    if "$retainKeys" in patch:
        out = {k: v for k, v in out.items() if k in patch["$retainKeys"]}
    for name, value in patch.items():
        if name in ("$patch", "$retainKeys") or name.startswith((_ORDER, _DELETE)):
            continue
        if value is None:
            out.pop(name, None)
            continue
        child = child_schema(schema, name)
        if isinstance(value, dict):
            out[name] = _map(out[name] if isinstance(out.get(name), dict) else {}, value, child)
        elif isinstance(value, list):
            order = patch.get(_ORDER + name)
            out[name] = _list(out.get(name) or [], value, child, order, name)
        else:
            out[name] = value
    for name, value in patch.items():
        if name.startswith(_DELETE):
            field = name.removeprefix(_DELETE)
            out[field] = [v for v in out.get(field) or [] if v not in value]
        elif name.startswith(_ORDER):
            field = name.removeprefix(_ORDER)
            if field not in patch and field in out:
                out[field] = _ordered(out[field], value, child_schema(schema, field))
    return out


def _list(target: list[Any], patch: list[Any], schema: Schema, order: list[Any] | None, name: str) -> list[Any]:
    key = schema.merge_key
    if key is None:
        return _clean_list([v for v in patch if not (isinstance(v, dict) and "$patch" in v and len(v) == 1)])
    if any(isinstance(v, dict) and v.get("$patch") == "replace" for v in patch):
        return _clean_list([v for v in patch if v != {"$patch": "replace"}])
    if key == "":
        out = list(target) + [v for v in patch if v not in target]
    else:
        out = _merge_items(target, patch, schema, key, name)
    return _ordered(out, order, schema) if order else out


def _merge_items(target: list[Any], patch: list[Any], schema: Schema, key: str, name: str) -> list[Any]:
    items = schema.items or ANY
    out = list(target)
    for entry in patch:
        if not isinstance(entry, dict) or key not in entry:
            raise bad_request(f"map: {entry!r} does not contain declared merge key: {key} (list {name})")
        place = next((i for i, v in enumerate(out) if _same_item(v, entry, schema, key)), None)
        if entry.get("$patch") == "delete":
            out = [v for v in out if v.get(key) != entry[key]]
        elif place is None:
            out.append(_clean({k: v for k, v in entry.items() if k != "$patch"}))
        else:
            known = {} if entry.get("$patch") == "replace" else out[place]
            entry = {k: v for k, v in entry.items() if k != "$patch"}
            out[place] = _map(known, entry, items)
    return out


def _same_item(item: JSON, entry: JSON, schema: Schema, key: str) -> bool:
    """Same merge key; further keys (a port's protocol) tell items apart when the patch names them."""
    others = schema.list_keys[1:]
    return item.get(key) == entry[key] and all(entry.get(k, item.get(k)) == item.get(k) for k in others)


def _ordered(items: list[Any], order: list[Any], schema: Schema) -> list[Any]:
    """Items in the given order; those it does not name keep their place relative to their predecessors."""
    key = schema.merge_key
    wanted = [o.get(key) if isinstance(o, dict) and key else o for o in order]

    def rank(item: Any) -> int | None:
        name = item.get(key) if isinstance(item, dict) and key else item
        return wanted.index(name) if name in wanted else None

    ranks: list[tuple[int, int]] = []
    last = -1
    for position, item in enumerate(items):
        place = rank(item)
        last = place if place is not None else last
        ranks.append((last, position))
    named = sorted((p for p in ranks if rank(items[p[1]]) is not None), key=lambda p: p[0])
    rest = [p for p in ranks if rank(items[p[1]]) is None]
    merged = sorted(named + rest, key=lambda p: (p[0], rank(items[p[1]]) is None, p[1]))
    return [items[p[1]] for p in merged]


def _clean_map(value: JSON) -> JSON:
    return {k: _clean(v) for k, v in value.items() if v is not None and not k.startswith("$")}


def _clean_list(value: list[Any]) -> list[Any]:
    return [_clean(v) for v in value]


def _clean(value: Any) -> Any:
    """A patch value as content: without directives and nulls."""
    if isinstance(value, dict):
        return _clean_map(value)
    return _clean_list(value) if isinstance(value, list) else value
