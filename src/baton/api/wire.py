"""The base of our resource types, and errors that name a field.

One rule for names: Python snake_case, wire camelCase (pydantic's `to_camel`); no field is renamed by hand. Unknown
fields are kept (so that reading and writing back loses nothing) and reported by :func:`unknown_fields`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from baton.api.resources import Object

Reason = Literal[
    "FieldValueRequired", "FieldValueInvalid", "FieldValueDuplicate", "FieldValueNotFound", "FieldValueNotSupported"
]


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing wrong with an object: where (``spec.roles[1].name``), what, and what to do. ``reason`` is Kubernetes'."""

    field: str
    message: str
    reason: Reason = "FieldValueInvalid"

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message

    def cause(self) -> Object:
        """As an entry of `Status.details.causes`."""
        return {"reason": self.reason, "message": self.message, "field": self.field}


class InvalidObjectError(ValueError):
    """An object does not have the shape of its kind; ``errors`` says where, each with its field path."""

    def __init__(self, errors: list[FieldError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = errors


class Model(BaseModel):
    """Frozen; built from wire JSON by :meth:`parse`, turned back by :meth:`wire` (only what was set)."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="allow", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, data: object) -> object:
        # Only here, field by field: inside pod templates and patches a null has a meaning of its own.
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data

    @classmethod
    def parse(cls, data: object, path: str = "") -> Self:
        """Raises :class:`InvalidObjectError` with the wire path of every wrong field, ``path`` in front."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InvalidObjectError([_field_error(entry, path) for entry in error.errors()]) from None

    def wire(self) -> Object:
        return self.model_dump(by_alias=True, exclude_unset=True)


JsonMap = dict[str, Any]
"""An object we do not type ourselves (a pod template, say)."""
StringMap = dict[str, str]


def unknown_fields(model: Model, path: str = "") -> Iterator[str]:
    """Paths of fields that the type does not have, in depth."""
    for name in model.model_extra or {}:
        yield f"{path}.{name}" if path else name
    for name, field in type(model).model_fields.items():
        alias = field.alias or name
        yield from _unknown_in(getattr(model, name), f"{path}.{alias}" if path else alias)


def _unknown_in(value: object, path: str) -> Iterator[str]:
    if isinstance(value, Model):
        yield from unknown_fields(value, path)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _unknown_in(item, f"{path}[{index}]")


_WORDS = {
    "missing": "is required",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}


def _field_error(entry: Any, path: str) -> FieldError:
    # Union members show up as extra path elements that are no field names; wire names never contain "[" or "-".
    for part in entry["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int"):
            path += f".{part}" if path else part
    kind, value = entry["type"], entry.get("input")
    if kind == "missing":
        return FieldError(path, "is required", "FieldValueRequired")
    what = _WORDS.get(kind) or entry["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(value, dict | list) else f", got {value!r}"
    return FieldError(path, f"{what}{shown}")
