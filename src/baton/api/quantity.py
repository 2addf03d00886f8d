"""Kubernetes numbers: resource quantities ("500m", "16Gi") and int-or-percent values ("25%"). Exact, no floats."""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal, InvalidOperation
from functools import lru_cache

_SUFFIX: dict[str, Decimal] = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    "": Decimal(1),
    "k": Decimal(10**3),
    "M": Decimal(10**6),
    "G": Decimal(10**9),
    "T": Decimal(10**12),
    "P": Decimal(10**15),
    "E": Decimal(10**18),
    "Ki": Decimal(2**10),
    "Mi": Decimal(2**20),
    "Gi": Decimal(2**30),
    "Ti": Decimal(2**40),
    "Pi": Decimal(2**50),
    "Ei": Decimal(2**60),
}


def parse_quantity(value: object) -> Decimal:
    """The number a quantity stands for. Raises ``ValueError`` naming the text."""
    return _parse(str(value).strip())


@lru_cache(maxsize=4096)  # the same few texts come up for every pod of every pass
def _parse(text: str) -> Decimal:
    digits = text.rstrip("numkMGTPEi") if not _is_exponent(text) else text
    try:
        if digits != digits.strip():
            raise InvalidOperation
        number = Decimal(digits) * _SUFFIX[text[len(digits) :]]
    except (InvalidOperation, KeyError):
        raise ValueError(f"{text!r} is not a quantity; examples: 2, 500m, 16Gi") from None
    if not number.is_finite():
        raise ValueError(f"{text!r} is not a quantity; examples: 2, 500m, 16Gi")
    return number


def _is_exponent(text: str) -> bool:
    mantissa, _, exponent = text.replace("E", "e").partition("e")
    return bool(mantissa) and exponent.lstrip("+-").isdigit()


def resolve_count(value: int | str, total: int, *, round_up: bool) -> int:
    """An int-or-percent of ``total``. Raises ``ValueError`` for anything else and for negative values."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} must be a number or a percentage such as '25%'")
    if isinstance(value, int):
        count = value
    elif value.endswith("%") and value[:-1].isdigit():
        scaled = int(value[:-1]) * total
        count = -(-scaled // 100) if round_up else scaled // 100
    elif value.isdigit():
        count = int(value)
    else:
        raise ValueError(f"{value!r} must be a number or a percentage such as '25%'")
    if count < 0:
        raise ValueError(f"{value!r} must not be negative")
    return count


def whole(number: Decimal) -> int:
    """Rounded up, as Kubernetes does for capacities."""
    return int(number.to_integral_value(ROUND_CEILING))
