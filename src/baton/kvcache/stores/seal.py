"""The seal behind every stored page: what makes a lost, torn, damaged or mixed-up object a miss instead of a wrong answer.

A region is payload and seal in one piece, so that a store moves both at once and no copy is made. The seal names its object
(32 bytes, from `objects`), so bytes that belong to another model, tenant, prefix, head range or layout never verify. It is
no defence against a forger, who could seal what he likes: whoever may write to a store is trusted with it.
"""

import struct

import numpy as np
import xxhash
from numpy.typing import NDArray

SEAL_BYTES = 64
KEY_BYTES = 32

_MAGIC = b"BKVS"
_VERSION = 1
_HEAD = struct.Struct("<4sIQ32s")
"""magic, version, bytes of payload, key; then xxh3 (64 bit) of the payload and zeros up to SEAL_BYTES."""
_SUM = struct.Struct("<Q8x")


def seal(region: NDArray[np.uint8], key: bytes) -> None:
    """Write the seal of `region` (uint8 [payload bytes + SEAL_BYTES], C-contiguous) behind its payload. `key` has 32 bytes."""
    region[-SEAL_BYTES:] = np.frombuffer(_expected(region, key), dtype=np.uint8)


def check(region: NDArray[np.uint8], key: bytes) -> bool:
    """Is `region` exactly what was sealed under `key`? The sum is only made when everything else fits."""
    head = _head(region, key)
    found = region[-SEAL_BYTES:].tobytes()
    return found.startswith(head) and found == _expected(region, key)


def _head(region: NDArray[np.uint8], key: bytes) -> bytes:
    return _HEAD.pack(_MAGIC, _VERSION, len(region) - SEAL_BYTES, key)


def _expected(region: NDArray[np.uint8], key: bytes) -> bytes:
    return _head(region, key) + _SUM.pack(xxhash.xxh3_64_intdigest(region[:-SEAL_BYTES].data))
