"""Names of KV pages: a hash chained over pages of tokens and seeded with everything else that decides what a page holds.

Two pages have the same key if and only if they hold the same numbers: same tokens from the start of the sequence, same
weights, dtype and page size, same tenant. The key says nothing of how many ranks share the heads: which layers and heads an
object holds is added by `stores.objects`, so that deployments of different sizes can share a store.
The chain is SGLang's (`get_hash_str`), seeded as its later versions do, since without that two models or two tenants
would read each other's pages.
"""

import hashlib
import struct
from collections.abc import Sequence

SCHEMA_VERSION = 1
"""Part of every key: raise it when the meaning of a page's bytes changes."""


class PageKeys:
    """`model`: fingerprint of config and weights. Keys are 32 bytes."""

    def __init__(self, model: str, dtype: str, page_size: int) -> None:
        self.page_size = page_size
        self._pack = struct.Struct(f"<{page_size}I").pack
        self._base = _digest(b"baton-kv", str(SCHEMA_VERSION), model, dtype, str(page_size))

    def root(self, extra_key: str | None) -> bytes:
        """The key before the first page of a tenant's sequences (`extra_key`: cache_salt, LoRA)."""
        return self._base if extra_key is None else _digest(self._base, "extra", extra_key)

    def extend(self, previous: bytes, token_ids: Sequence[int]) -> list[bytes]:
        """Keys of the whole pages of `token_ids`, which follow the page (or root) with key `previous`."""
        keys = []
        size, pack = self.page_size, self._pack
        for start in range(0, len(token_ids) // size * size, size):
            previous = hashlib.sha256(previous + pack(*token_ids[start : start + size])).digest()
            keys.append(previous)
        return keys


def key_as_int64(key: bytes) -> int:
    """The block hash of KV events: the first 8 bytes, big endian, signed (SGLang's `hash_str_to_int64`)."""
    return int.from_bytes(key[:8], "big", signed=True)


def _digest(first: bytes, *parts: str) -> bytes:
    digest = hashlib.sha256(first)
    for part in parts:
        data = part.encode()
        digest.update(struct.pack("<I", len(data)) + data)
    return digest.digest()
