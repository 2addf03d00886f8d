"""How pages become objects of a store: their names, and which bytes of a page each holds.

A name is `{page key}_{digest}_L{start}-{end}_H{start}-{end}`: the key says which tokens of which model (`page_keys`), the digest
how the numbers are laid out, the ranges which layers and KV heads these are. Nothing in it depends on how many ranks share a
model (after SGLang 0.5.23's unified key scheme). Two ways to cut a page (layer, K/V, KV head, token, dim) of one rank:

- `default`: one object with all heads of the rank, moved in place. Deployments share it if their ranks hold the same heads.
- `unified`: one object per KV head, gathered into a staging buffer, so that tensor-parallel sizes 1, 2, 3 ... share them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from baton.kvcache.stores.base import Object
from baton.kvcache.stores.seal import SEAL_BYTES, check, seal

_LAYOUT = "layer,kv,head,token,dim"
SCHEMES = ("default", "unified")


@dataclass(frozen=True, slots=True, kw_only=True)
class PageShape:
    """The part of a page that this rank holds: (layers, K and V, KV heads, page_size, head_dim) numbers of `dtype`."""

    layers: range
    """Of the whole model's layers, those in the page."""
    kv_heads: range
    """Of the whole model's KV heads, those of this rank."""
    page_size: int
    head_dim: int
    dtype: str
    dtype_bytes: int

    @property
    def head_bytes(self) -> int:
        """One head of one layer, K or V: the longest run of bytes that always stays together."""
        return self.page_size * self.head_dim * self.dtype_bytes

    @property
    def page_bytes(self) -> int:
        return len(self.layers) * 2 * len(self.kv_heads) * self.head_bytes

    @property
    def digest(self) -> str:
        """16 hex digits of what decides the layout of an object besides its ranges."""
        parts = (_LAYOUT, self.dtype, str(self.dtype_bytes), str(self.page_size), str(self.head_dim))
        return hashlib.sha256("\0".join(("baton-object-v1", *parts)).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ObjectScheme:
    """How the pages of one rank are cut. `name` is one of SCHEMES."""

    name: str
    shape: PageShape

    @property
    def per_page(self) -> int:
        return 1 if self.name == "default" else len(self.shape.kv_heads)

    @property
    def object_bytes(self) -> int:
        """Size of every object, seal included."""
        return (
            self.shape.page_bytes // len(self.shape.kv_heads) * (len(self.shape.kv_heads) // self.per_page) + SEAL_BYTES
        )

    def names(self, key: bytes) -> list[str]:
        """The `per_page` names of the page with this key."""
        prefix = f"{key.hex()}_{self.shape.digest}_L{self.shape.layers.start}-{self.shape.layers.stop}_H"
        heads = self.shape.kv_heads
        if self.name == "default":
            return [f"{prefix}{heads.start}-{heads.stop}"]
        return [f"{prefix}{head}-{head + 1}" for head in heads]

    def open(self, max_pages: int) -> "PageObjects":
        """For one thread, which moves at most `max_pages` pages at a time."""
        return WholePages() if self.name == "default" else HeadObjects(self, max_pages)


class PageObjects(Protocol):
    """The objects of pages in memory. A page is uint8 [page_bytes + SEAL_BYTES], C-contiguous."""

    staging: NDArray[np.uint8] | None
    """Where objects lie if not in the pages themselves."""

    def buffers(self, pages: Sequence[Object]) -> list[Object]:
        """Where the objects of these pages lie, `per_page` for each page in order."""

    def before_put(self, pages: Sequence[Object], names: Sequence[str]) -> None:
        """Fill and seal `buffers(pages)`."""

    def after_get(self, pages: Sequence[Object], names: Sequence[str], got: Sequence[bool]) -> list[bool]:
        """Check what was read into `buffers(pages)` and complete the pages. False for each object that is damaged or foreign
        (and for those that were not `got`)."""


class WholePages:
    """The `default` scheme: the page is the object."""

    staging: NDArray[np.uint8] | None = None

    def buffers(self, pages: Sequence[Object]) -> list[Object]:
        return list(pages)

    def before_put(self, pages: Sequence[Object], names: Sequence[str]) -> None:
        for page, name in zip(pages, names, strict=True):
            seal(page, _seal_key(name))

    def after_get(self, pages: Sequence[Object], names: Sequence[str], got: Sequence[bool]) -> list[bool]:
        return [ok and check(page, _seal_key(name)) for page, name, ok in zip(pages, names, got, strict=True)]


class HeadObjects:
    """The `unified` scheme: an object holds one KV head of all layers, (layer, K/V, token, dim), gathered in `staging`."""

    staging: NDArray[np.uint8] | None
    """uint8 [max_pages * heads, object_bytes]"""

    def __init__(self, scheme: ObjectScheme, max_pages: int) -> None:
        shape = scheme.shape
        self._per_page = scheme.per_page
        self._runs = (len(shape.layers) * 2, len(shape.kv_heads), shape.head_bytes)
        self.staging = self._staged = np.zeros((max_pages * scheme.per_page, scheme.object_bytes), dtype=np.uint8)

    def buffers(self, pages: Sequence[Object]) -> list[Object]:
        return list(self._staged[: len(pages) * self._per_page])

    def before_put(self, pages: Sequence[Object], names: Sequence[str]) -> None:
        for i, name in enumerate(names):
            np.copyto(self._payload(i), self._head(pages, i))
            seal(self._staged[i], _seal_key(name))

    def after_get(self, pages: Sequence[Object], names: Sequence[str], got: Sequence[bool]) -> list[bool]:
        verified = [ok and check(self._staged[i], _seal_key(names[i])) for i, ok in enumerate(got)]
        for i, ok in enumerate(verified):
            if ok:
                np.copyto(self._head(pages, i), self._payload(i))
        return verified

    def _payload(self, i: int) -> NDArray[np.uint8]:
        """uint8 [layers * 2, head_bytes] of staged object i."""
        num_runs, _, head_bytes = self._runs
        return self._staged[i, :-SEAL_BYTES].reshape(num_runs, head_bytes)

    def _head(self, pages: Sequence[Object], i: int) -> NDArray[np.uint8]:
        """The same bytes where they lie in the page: uint8 [layers * 2, head_bytes], strided over the other heads."""
        page, head = divmod(i, self._per_page)
        return pages[page][:-SEAL_BYTES].reshape(self._runs)[:, head]


def _seal_key(name: str) -> bytes:
    """The seal binds the whole name, so that an object under another object's name does not verify."""
    return hashlib.sha256(name.encode()).digest()
