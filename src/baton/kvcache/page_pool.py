"""The pool of KV page ids: which are free, nothing else.

Owns the free list. What a page holds, who uses it and what is shared is the business of `radix_tree` and `prefix_cache`;
the memory behind an id belongs to the model runner. No device, no I/O.
"""

from collections.abc import Iterable


class PagePool:
    """Page ids 0 .. num_pages - 1, each either free or taken.

    Invariant: `_is_free[p] == 1` if and only if p is in `_free` (once).
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages <= 0:
            raise ValueError(f"num_pages must be positive, got {num_pages}")
        self.num_pages = num_pages
        # A stack: the page freed last is reused first, while its memory may still be in a CPU cache.
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = bytearray(b"\x01") * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free_pages(self) -> list[int]:
        """A copy, in no particular order (for the self-check)."""
        return list(self._free)

    def alloc(self, num_pages: int) -> list[int] | None:
        """Take `num_pages` pages, or none at all (None) when fewer are free."""
        if num_pages > len(self._free):
            return None
        if num_pages == 0:
            return []
        pages = self._free[-num_pages:]
        pages.reverse()
        del self._free[-num_pages:]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back. A page that is free already, or not of this pool, is our bug: AssertionError."""
        for page in pages:
            assert 0 <= page < self.num_pages, f"page {page} is not of this pool of {self.num_pages}"
            assert not self._is_free[page], f"page {page} freed twice"
            self._is_free[page] = 1
            self._free.append(page)
