"""Kubernetes quantities ("500m", "16Gi", "2") as exact numbers, for resourceFieldRef and size limits."""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation

_SUFFIX = {
    "": Decimal(1), "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "k": Decimal(10) ** 3,
    "M": Decimal(10) ** 6, "G": Decimal(10) ** 9, "T": Decimal(10) ** 12, "P": Decimal(10) ** 15, "E": Decimal(10) ** 18,
    "Ki": Decimal(2) ** 10, "Mi": Decimal(2) ** 20, "Gi": Decimal(2) ** 30, "Ti": Decimal(2) ** 40,
    "Pi": Decimal(2) ** 50, "Ei": Decimal(2) ** 60,
}  # fmt: skip
_FORM = re.compile(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)")


def parse(text: str | int | float) -> Decimal:
    """The number. Raises ValueError naming the text."""
    match = _FORM.fullmatch(str(text).strip())
    if match is None or match[2] not in _SUFFIX:
        raise ValueError(f"not a quantity: {text!r}")
    try:
        return Decimal(match[1]) * _SUFFIX[match[2]]
    except InvalidOperation:
        raise ValueError(f"not a quantity: {text!r}") from None


def divided(text: str | int | float, divisor: str | int = "1") -> str:
    """`text / divisor`, rounded up to a whole number, as resourceFieldRef gives it."""
    by = parse(divisor)
    return str(math.ceil(parse(text) / (by or Decimal(1))))
