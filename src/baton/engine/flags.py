"""Command-line flags derived from the fields of a frozen dataclass: parsing, all errors in one pass, help.

A field made with `flag()` is a flag; nothing is typed twice. Behaves like argparse where manifests rely on it: `--a-b V`,
`--a-b=V`, unambiguous prefixes, repeated flags (the last wins); unlike argparse it reports every error of a command line at
once, and names the nearest known flag. Not here: which flags an engine has (`args`).
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from baton.protocol.errors import BatonError

Effect = Literal["effective", "gpu only", "no effect", "not served", "refused"]
"""effective: does what it says · gpu only: does nothing on a CPU · no effect: nothing to do here, on any device · not
served: the feature is missing but answers stay the same, so the worker starts and says so · refused: ignoring it would
change answers or break a contract, so the worker does not start."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Flag:
    """What is known of one flag beside its name, type and default."""

    help: str
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    effect: Effect = "effective"
    reason: str = ""
    """For every effect but "effective": why, in a phrase that completes `--flag: `."""
    kind: type = str
    """int, float, str or bool (a bool flag takes no value)."""
    is_list: bool = False
    is_required: bool = False
    minimum: float | None = None
    maximum: float | None = None
    accepts: tuple[str, ...] = ()
    """For "refused" and "not served": values that are nevertheless fine."""


class FlagError(BatonError):
    """A command line that cannot be used; `problems` has one line for each thing that is wrong with it."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class HelpRequested(Exception):  # noqa: N818  (no error)
    """-h or --help was given."""


def flag(default: Any, help: str, **options: Any) -> Any:  # noqa: A002
    """A dataclass field that is a flag. A default of None needs `kind` unless the value is text."""
    if "kind" not in options and default is not None:
        options["kind"] = type(default)
    return dataclasses.field(default=default, metadata={"flag": Flag(help=help, **options)})


def flags_of(settings: type[Any]) -> dict[str, Flag]:
    """Field name -> flag, in order of declaration."""
    return {one.name: one.metadata["flag"] for one in dataclasses.fields(settings) if "flag" in one.metadata}


def option(field_name: str) -> str:
    """The flag's own name: `page_size` -> `--page-size`."""
    return "--" + field_name.replace("_", "-")


def is_given(settings: Any, field: str) -> bool:
    """Whether a setting differs from its default."""
    default = next(one.default for one in dataclasses.fields(settings) if one.name == field)
    return bool(getattr(settings, field) != default)


def _given_against(settings: Any, effects: Collection[str]) -> Iterator[tuple[str, Flag]]:
    """Flags of these effects that were given with another value than those that are fine."""
    for field, one in flags_of(type(settings)).items():
        if one.effect in effects and is_given(settings, field) and str(getattr(settings, field)) not in one.accepts:
            yield field, one


def refusals(settings: Any) -> list[str]:
    """One line for each flag whose effect is "refused"."""
    found = _given_against(settings, ("refused",))
    return [f"{option(field)} {getattr(settings, field)}: {one.reason}" for field, one in found]


def effect_notes(settings: Any, device: str) -> list[str]:
    """One line for each flag that was given and does nothing on `device` ("cpu", "cuda"): its name and the reason."""
    effects: list[Effect] = ["no effect", "not served"]
    if device == "cpu":
        effects.append("gpu only")
    return [
        f"{option(field)} {'is not served' if one.effect == 'not served' else 'has no effect'}: {one.reason}"
        for field, one in _given_against(settings, effects)
    ]


def parse_flags(settings: type[T], argv: Sequence[str], check: Callable[[T], list[str]]) -> T:
    """Settings from a command line; `check` finds what is wrong with values that were understood.

    Raises `FlagError` with every problem found, or `HelpRequested`.
    """
    flags = flags_of(settings)
    names = {name: field for field, one in flags.items() for name in (option(field), *one.aliases)}
    values: dict[str, Any] = {}
    problems: list[str] = []
    arguments = list(argv)
    while arguments:
        token = arguments.pop(0)
        if token in ("-h", "--help"):
            raise HelpRequested
        name, has_value, inline = token.partition("=")
        if not name.startswith("--") or name == "--":
            problems.append(f"unexpected argument {token!r}: flags start with --")
            continue
        field, problem = _resolve(name, names)
        if field is None:
            problems.append(problem)
            while arguments and not arguments[0].startswith("--"):
                arguments.pop(0)  # its values are not worth a second complaint
            continue
        texts = [inline] if has_value else _values(flags[field], arguments)
        try:
            values[field] = _convert(flags[field], name, texts, has_value=bool(has_value))
        except ValueError as error:
            problems.append(str(error))
    problems += [
        f"{option(field)} is required" for field, one in flags.items() if one.is_required and field not in values
    ]
    parsed = settings(**values)
    problems += check(parsed)
    if problems:
        raise FlagError(problems)
    return parsed


def _resolve(name: str, names: dict[str, str]) -> tuple[str | None, str]:
    """The field that `name` means, or why it means none."""
    if name in names:
        return names[name], ""
    longer = sorted(known for known in names if known.startswith(name))
    fields = {names[known] for known in longer}
    if len(fields) == 1:
        return fields.pop(), ""
    if longer:
        return None, f"ambiguous flag {name}: it could be {', '.join(longer)}"
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return None, f"unknown flag {name}; nearest known: {nearest[0]}"


def _values(one: Flag, arguments: list[str]) -> list[str]:
    """Take this flag's values off the front of `arguments`."""
    if one.kind is bool:
        return []
    if not one.is_list:
        return [arguments.pop(0)] if arguments and not arguments[0].startswith("--") else []
    texts: list[str] = []
    while arguments and not arguments[0].startswith("--"):
        texts.append(arguments.pop(0))
    return texts


def _convert(one: Flag, name: str, texts: list[str], *, has_value: bool) -> Any:
    if one.kind is bool:
        if has_value and texts[0].lower() not in ("true", "false"):
            raise ValueError(f"{name} takes no value, got {texts[0]!r}")
        return not has_value or texts[0].lower() == "true"
    if not texts:
        raise ValueError(f"{name} needs a value")
    converted = tuple(_convert_one(one, name, text) for text in texts)
    return converted if one.is_list else converted[0]


def _convert_one(one: Flag, name: str, text: str) -> Any:
    try:
        value = one.kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(text)
    except ValueError:
        noun = {int: "a whole number", float: "a finite number"}[one.kind]
        raise ValueError(f"{name} needs {noun}, got {text!r}") from None
    if one.choices and value not in one.choices:
        raise ValueError(f"{name} must be one of {', '.join(one.choices)}; got {text!r}")
    if one.minimum is not None and value < one.minimum:
        raise ValueError(f"{name} must be at least {one.minimum:g}, got {text}")
    if one.maximum is not None and value > one.maximum:
        raise ValueError(f"{name} must be at most {one.maximum:g}, got {text}")
    return value


def format_help(settings: type[Any], usage: str) -> str:
    """What --help prints: every flag with its default, its meaning and what it does here."""
    lines = [usage, ""]
    for field, one in flags_of(settings).items():
        names = ", ".join((option(field), *one.aliases))
        value = "" if one.kind is bool else " " + ("|".join(one.choices) or one.kind.__name__.upper())
        lines.append(f"  {names}{value}{' ...' if one.is_list else ''}")
        default = next(f.default for f in dataclasses.fields(settings) if f.name == field)
        state = "required" if one.is_required else f"default: {default}"
        lines.append(f"      {one.help} [{state}]")
        if one.effect != "effective":
            lines.append(f"      ({one.effect}: {one.reason})")
    return "\n".join(lines)
