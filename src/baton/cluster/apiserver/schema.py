"""The one schema model: what fields an object has, and how lists and maps merge.

Owns `Schema`, a node that both the built-in kinds (`schema_text`) and CustomResourceDefinitions (`schema_crd`) become.
Everything that walks objects reads it: `conform` (prune, default, types), `validation`, `strategic`, `apply`,
`openapi`. Not here: any walking.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Absent(Enum):
    """Marks "no default": None is a legal default in a CRD."""

    ABSENT = 0


ABSENT = Absent.ABSENT


@dataclass(slots=True)
class Limits:
    """Value validations of a CRD field (all optional)."""

    enum: list[Any] | None = None
    pattern: str | None = None
    format: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: bool = False
    exclusive_maximum: bool = False
    multiple_of: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    min_items: int | None = None
    max_items: int | None = None
    unique_items: bool = False
    min_properties: int | None = None
    max_properties: int | None = None
    all_of: list[dict[str, Any]] = field(default_factory=list)
    any_of: list[dict[str, Any]] = field(default_factory=list)
    one_of: list[dict[str, Any]] = field(default_factory=list)
    negated: dict[str, Any] | None = None


@dataclass(slots=True)
class Schema:
    """One node. `type` is one of object, array, string, integer, number, boolean, any, quantity, intOrString,
    time, bytes.

    Invariant: `properties` and `additional` are only set for objects, `items` only for arrays. An object with
    neither is free-form when `preserve_unknown`, else it has no fields.
    """

    type: str
    name: str = ""  # type name of a built-in struct; empty for anonymous nodes
    properties: dict[str, Schema] = field(default_factory=dict)
    additional: Schema | None = None
    items: Schema | None = None
    required: tuple[str, ...] = ()
    defaulted: tuple[str, ...] = ()  # properties that have a default, so that the walk looks only at those
    list_type: str = "atomic"  # atomic | map | set
    list_keys: tuple[str, ...] = ()
    map_atomic: bool = False
    merge_key: str | None = None  # strategic merge; "" for a merged list of primitives
    retain_keys: bool = False
    default: Any = ABSENT
    preserve_unknown: bool = False
    embedded_resource: bool = False
    nullable: bool = False
    limits: Limits | None = None
    description: str = ""

    @property
    def is_map(self) -> bool:
        """True for free key maps such as labels."""
        return self.additional is not None


ANY = Schema("any", preserve_unknown=True)
