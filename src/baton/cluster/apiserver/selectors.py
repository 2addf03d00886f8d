"""Label and field selectors: parsing the query strings and matching objects.

Owns `LabelSelector`, `FieldSelector` and their errors in Kubernetes' words. Not here: which fields a kind may be
selected by (see `builtins`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

JSON = dict[str, Any]
_SET = re.compile(r"^(?P<key>[^\s!=<>,()]+)\s+(?P<op>in|notin)\s*\((?P<values>[^()]*)\)$")
_EQUAL = re.compile(r"^(?P<key>[^\s!=<>,()]+)\s*(?P<op>==|=|!=|>|<)\s*(?P<value>[^\s!=<>,()]*)$")
_EXISTS = re.compile(r"^(?P<no>!?)\s*(?P<key>[^\s!=<>,()]+)$")


class SelectorError(ValueError):
    """A selector that cannot be parsed."""


@dataclass(frozen=True, slots=True)
class Requirement:
    key: str
    operator: str  # in, notin, exists, !, gt, lt
    values: tuple[str, ...] = ()

    def matches(self, labels: JSON) -> bool:
        present = self.key in labels
        if self.operator == "in":
            return present and labels[self.key] in self.values
        if self.operator == "notin":
            return not present or labels[self.key] not in self.values
        if self.operator == "exists":
            return present
        if self.operator == "!":
            return not present
        try:
            number, limit = int(labels[self.key]), int(self.values[0])
        except (KeyError, ValueError):
            return False
        return number > limit if self.operator == "gt" else number < limit


@dataclass(frozen=True, slots=True)
class LabelSelector:
    """All requirements must hold; an empty selector matches everything."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: JSON) -> bool:
        return all(r.matches(labels) for r in self.requirements)

    @classmethod
    def parse(cls, text: str) -> LabelSelector:
        """The query form: `a=b,c in (d,e),!f`."""
        return cls(tuple(_requirement(part) for part in _split(text)))

    @classmethod
    def from_object(cls, selector: JSON) -> LabelSelector:
        """The object form, `{matchLabels, matchExpressions}`."""
        out = [Requirement(k, "in", (v,)) for k, v in (selector.get("matchLabels") or {}).items()]
        operators = {"In": "in", "NotIn": "notin", "Exists": "exists", "DoesNotExist": "!"}
        for entry in selector.get("matchExpressions") or ():
            operator = operators.get(entry.get("operator", ""))
            if operator is None:
                raise SelectorError(f'"{entry.get("operator")}" is not a valid label selector operator')
            values = tuple(entry.get("values") or ())
            if operator in ("in", "notin") and not values:
                raise SelectorError("for 'in', 'notin' operators, values set can't be empty")
            out.append(Requirement(entry["key"], operator, values))
        return cls(tuple(out))


def _split(text: str) -> Iterable[str]:
    """Splits at commas that are not inside parentheses."""
    depth, start = 0, 0
    for index, char in enumerate(text):
        depth += {"(": 1, ")": -1}.get(char, 0)
        if char == "," and depth == 0:
            yield text[start:index].strip()
            start = index + 1
    if text[start:].strip() or start:
        yield text[start:].strip()


def _requirement(part: str) -> Requirement:
    if found := _SET.match(part):
        values = tuple(v.strip() for v in found["values"].split(","))
        return Requirement(found["key"], found["op"], values)
    if found := _EQUAL.match(part):
        operator = {"=": "in", "==": "in", "!=": "notin", ">": "gt", "<": "lt"}[found["op"]]
        return Requirement(found["key"], operator, (found["value"],))
    if found := _EXISTS.match(part):
        return Requirement(found["key"], "!" if found["no"] else "exists")
    raise SelectorError(f"unable to parse requirement: found '{part[:1]}', expected: identifier")


@dataclass(frozen=True, slots=True)
class FieldSelector:
    """`path op value` terms; a missing field is the empty string."""

    terms: tuple[tuple[str, bool, str], ...] = ()

    @classmethod
    def parse(cls, text: str, supported: Callable[[str], bool]) -> FieldSelector:
        terms = []
        for part in filter(None, text.split(",")):
            found = re.match(r"^([^=!]+)(==|!=|=)(.*)$", part.strip())
            if not found:
                raise SelectorError(f"invalid selector: '{part}'; can't understand '{part}'")
            if not supported(found[1]):
                raise SelectorError(f"field label not supported: {found[1]}")
            terms.append((found[1], found[2] != "!=", found[3]))
        return cls(tuple(terms))

    def matches(self, obj: JSON) -> bool:
        return all((field_text(obj, path) == value) is equal for path, equal, value in self.terms)

    def only_name(self) -> str | None:
        """The name if the selector asks for one object by name."""
        return next((v for path, equal, v in self.terms if path == "metadata.name" and equal), None)


def field_text(obj: JSON, path: str) -> str:
    value: Any = obj
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            break
    if path == "source" and isinstance(value, dict):  # events: the component of the source
        value = value.get("component")
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)
