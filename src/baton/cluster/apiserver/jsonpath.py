"""The simple JSONPaths of CRD printer columns, scale paths and selectable fields.

Owns `find` and `put`. Supports `.a.b`, `['a.b']`, `[0]`, `[*]` and `[?(@.k=="v")]`; anything else finds nothing.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

JSON = dict[str, Any]
_STEP = re.compile(
    r"\.(?P<name>(?:[^.\[\\]|\\.)+)"
    r"|\[(?P<index>-?\d+)\]"
    r"|\[(?P<all>\*)\]"
    r"|\[['\"](?P<quoted>[^'\"]*)['\"]\]"
    r"|\[\?\(\s*@\.(?P<key>[^=!\s]+)\s*(?P<op>==|!=)\s*(?P<value>\"[^\"]*\"|'[^']*'|[^)\s]+)\s*\)\]"
)


@lru_cache(maxsize=1024)
def _steps(path: str) -> tuple[re.Match[str], ...] | None:
    text = path.strip().removeprefix("{").removesuffix("}").removeprefix("$")
    if text and text[0] not in ".[":
        text = "." + text
    out, position = [], 0
    while position < len(text):
        found = _STEP.match(text, position)
        if not found:
            return None
        out.append(found)
        position = found.end()
    return tuple(out)


def find(obj: Any, path: str) -> list[Any]:
    """All values at `path`; empty when there are none."""
    values = [obj]
    for step in _steps(path) or ():
        values = [v for value in values for v in _walk(value, step)]
    return values if _steps(path) else []


def _walk(value: Any, step: re.Match[str]) -> list[Any]:
    name = step["name"] if step["name"] is not None else step["quoted"]
    if name is not None:
        name = name.replace("\\.", ".")
        return [value[name]] if isinstance(value, dict) and name in value else []
    if not isinstance(value, list):
        return list(value.values()) if step["all"] and isinstance(value, dict) else []
    if step["index"] is not None:
        index = int(step["index"])
        return [value[index]] if -len(value) <= index < len(value) else []
    if step["all"]:
        return list(value)
    return [v for v in value if _passes(v, step)]


def _passes(value: Any, step: re.Match[str]) -> bool:
    found = find(value, "." + step["key"])
    text = step["value"]
    wanted = text[1:-1] if text[:1] in "'\"" else _literal(text)
    return bool(found) and (found[0] == wanted) is (step["op"] == "==")


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def put(obj: JSON, path: str, value: Any) -> JSON:
    """A copy of `obj` with the value at a plain dotted path; the parts on the way are copied, the rest shared."""
    names = path.strip(".").split(".")
    out = dict(obj)
    here = out
    for name in names[:-1]:
        here[name] = dict(here.get(name) or {})
        here = here[name]
    here[names[-1]] = value
    return out
