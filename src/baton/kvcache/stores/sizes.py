"""Sizes as people write them in a store's settings."""

import re

_UNITS = {"": 1, "b": 1} | {f"{unit}{b}": 1 << 10 * i for i, unit in enumerate("kmgt", 1) for b in ("", "b")}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


def parse_size(value: object) -> int:
    """Bytes of 4096, "4096", "16mb", "1.5 gb", "4G" (powers of 1024, as SGLang reads them). Raises `ValueError`."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value.strip().lower()) if isinstance(value, str) else None
    if match is None or match[2] not in _UNITS:
        raise ValueError('wants a number of bytes or a text such as "4gb"')
    return int(float(match[1]) * _UNITS[match[2]])
