"""Manifest files: YAML or JSON documents as Kubernetes objects, each value with the line it came from.

Owns reading, the checks that need no server (a tab, a duplicate key, a document without kind), and the way back from a
field path of a server's complaint to a line. It reads YAML as kubectl does where PyYAML differs: dates stay texts,
`1e3` is a number, `12:30` is a text. What a field may hold is the API server's affair.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

_PART = re.compile(r"""([^.\[\]]+)|\[(\d+)\]|\[([^\]]+)\]""")
_SEPARATOR = re.compile(r"---\s*(#.*)?$")
_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a manifest, in one line: where, what, and (in the text) what to do. `line` counts from 1."""

    source: str
    text: str
    line: int | None = None

    def __str__(self) -> str:
        place = f"{self.source}:{self.line}" if self.line is not None else self.source
        return f"{place}: {self.text}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """One object of a file. `lines` maps field paths (`spec.roles[0].name`) to lines."""

    source: str
    content: dict[str, Any]
    line: int
    lines: dict[str, int] = field(repr=False, default_factory=dict)

    @property
    def kind(self) -> str:
        return str(self.content["kind"])

    @property
    def name(self) -> str:
        metadata = self.content.get("metadata")
        name = metadata.get("name") if isinstance(metadata, dict) else None
        return str(name) if name else ""

    @property
    def title(self) -> str:
        return f"{self.kind.lower()}/{self.name or '?'}"

    def line_of(self, path: str) -> int:
        """The line of a field path as servers write it; of its nearest parent that is in the file otherwise."""
        parts = _split(path)
        while parts:
            found = self.lines.get(_join(parts))
            if found is not None:
                return found
            parts.pop()
        return self.line

    def problem(self, text: str, path: str = "") -> Problem:
        return Problem(self.source, f"{self.title}: {text}", self.line_of(path))


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads plain scalars as kubectl does."""


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    dropped = {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
    kept = {
        first: [(tag, pattern) for tag, pattern in entries if tag not in dropped]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    integer = re.compile(r"[-+]?(0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
    for first in "-+0123456789":
        kept.setdefault(first, []).append(("tag:yaml.org,2002:int", integer))
    for first in "-+.0123456789":
        kept.setdefault(first, []).append(("tag:yaml.org,2002:float", number))
    return kept


def _integer(_: yaml.SafeLoader, node: ScalarNode) -> int:
    text = str(node.value).replace("_", "").lstrip("+")
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    for prefix, base in (("0x", 16), ("0b", 2), ("0o", 8)):
        if digits.startswith(prefix):
            return sign * int(digits[2:], base)
    return sign * int(digits, 8 if len(digits) > 1 and digits.startswith("0") else 10)


_Loader.yaml_implicit_resolvers = _resolvers()
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def load(paths: list[Path]) -> tuple[list[Manifest], list[Problem]]:
    """Every object of the files (a directory: its manifests, by name), and what could not be read. Reads on after both."""
    manifests: list[Manifest] = []
    problems: list[Problem] = []
    for path in paths:
        for file in _files(path):
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                problems.append(Problem(str(file), f"cannot be read: {getattr(error, 'strerror', None) or error}"))
                continue
            found, wrong = parse(text, str(file))
            if not found and not wrong:
                wrong = [Problem(str(file), "no object in it")]
            manifests += found
            problems += wrong
    return manifests, problems


def parse(text: str, source: str) -> tuple[list[Manifest], list[Problem]]:
    """The objects of one file. A document that cannot be parsed does not hide the ones beside it."""
    manifests: list[Manifest] = []
    problems: list[Problem] = []
    for first_line, document in _documents(text):
        try:
            node = yaml.compose(document, Loader=_Loader)
            if node is None:
                continue
            content = _value(document)
        except yaml.YAMLError as error:
            problems.append(_yaml_problem(source, error, first_line, document))
            continue
        except (ValueError, RecursionError) as error:
            problems.append(Problem(source, f"cannot be read: {error}", first_line + 1))
            continue
        lines: dict[str, int] = {}
        duplicates = list(_walk(node, "", lines, first_line))
        problems += [Problem(source, f"{path}: given twice; keep one", line) for path, line in duplicates]
        if not duplicates:
            for one in _objects(content, source, lines, node.start_mark.line + first_line + 1):
                if isinstance(one, Manifest):
                    manifests.append(one)
                else:
                    problems.append(one)
    return manifests, problems


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(one for one in path.iterdir() if one.suffix in _SUFFIXES)
    return [path]


def _documents(text: str) -> Iterator[tuple[int, str]]:
    """(lines before it, text) of each document, cut at `---` lines as kubectl cuts them."""
    start, current = 0, list[str]()
    for index, line in enumerate(text.splitlines(keepends=True)):
        if _SEPARATOR.match(line):
            yield start, "".join(current)
            start, current = index + 1, []
        else:
            current.append(line)
    yield start, "".join(current)


def _value(document: str) -> Any:
    return yaml.load(document, Loader=_Loader)


def _objects(content: Any, source: str, lines: dict[str, int], line: int) -> Iterator[Manifest | Problem]:
    if not isinstance(content, dict):
        yield Problem(source, "an object starts with 'apiVersion:' and 'kind:'; this document is no mapping", line)
        return
    for key in ("apiVersion", "kind"):
        if not isinstance(content.get(key), str) or not content[key]:
            yield Problem(source, f"{key}: is missing; say what the object is", lines.get(key, line))
            return
    if content["kind"] == "List" and isinstance(content.get("items"), list):
        for index, item in enumerate(content["items"]):
            prefix = f"items[{index}]"
            inner = {path[len(prefix) + 1 :]: number for path, number in lines.items() if path.startswith(prefix + ".")}
            yield from _objects(item, source, inner, lines.get(prefix, line))
        return
    yield Manifest(source, content, line, lines)


def _walk(node: Node, path: str, lines: dict[str, int], offset: int) -> Iterator[tuple[str, int]]:
    """Fill `lines`; yield (path, line) of keys that are given twice."""
    if isinstance(node, MappingNode):
        for key, value in node.value:
            inner = _child(path, str(key.value))
            line = key.start_mark.line + offset + 1
            if inner in lines:
                yield inner, line
            lines[inner] = line
            yield from _walk(value, inner, lines, offset)
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            inner = f"{path}[{index}]"
            lines[inner] = value.start_mark.line + offset + 1
            yield from _walk(value, inner, lines, offset)


def _child(path: str, key: str) -> str:
    part = f"[{key}]" if "." in key or "/" in key else key
    return f"{path}.{part}" if path and not part.startswith("[") else f"{path}{part}"


def _split(path: str) -> list[str]:
    """Parts of a server's field path: names, indexes and quoted keys alike."""
    return [name or number or key.strip("\"'") for name, number, key in _PART.findall(path)]


def _join(parts: list[str]) -> str:
    joined = ""
    for part in parts:
        joined = f"{joined}[{part}]" if part.isdigit() else _child(joined, part)
    return joined


def _yaml_problem(source: str, error: yaml.YAMLError, offset: int, document: str) -> Problem:
    """One line of a parser's four: where, what, and for the usual mistakes what to do."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line + offset + 1 if mark is not None else offset + 1
    what = str(getattr(error, "problem", None) or error).strip()
    written = document.splitlines()
    text = written[mark.line] if mark is not None and mark.line < len(written) else ""
    if "\t" in text[: len(text) - len(text.lstrip())] or "'\\t'" in what:
        return Problem(source, "a tab is used to indent; YAML allows only spaces there: put spaces instead", line)
    if "mapping values are not allowed" in what:
        what += " (a ':' too many, or a text with ': ' that needs quotes)"
    context = getattr(error, "context", None)
    return Problem(source, f"not YAML: {what}{f' {context}' if context else ''}", line)
