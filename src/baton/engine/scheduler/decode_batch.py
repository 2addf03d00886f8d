"""The running requests as arrays that live from step to step, so that a decode step costs little Python per row.

Owns row numbers and the array mirror of each running request's page table. The requests own the truth (`pages`,
`num_computed`); `check` compares the two. Deciding who runs is not here.
"""

import numpy as np
from numpy.typing import NDArray

from baton.engine.scheduler.request import Request
from baton.kvcache.prefix_cache import PrefixCache

_INITIAL_ROWS = 32
_INITIAL_COLUMNS = 64


class DecodeBatch:
    """B rows, dense: removing one moves the last row into its place.

    Arrays have room for more rows and columns than are used; rows 0 .. B-1 are valid.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.requests: list[Request] = []
        # Invariant: requests[i].row_idx == i.
        self.token_ids: NDArray[np.int64] = np.zeros(_INITIAL_ROWS, np.int64)
        """[rows] the token whose KV the next step computes."""
        self.computed: NDArray[np.int32] = np.zeros(_INITIAL_ROWS, np.int32)
        """[rows] tokens whose KV exists."""
        self.num_pages: NDArray[np.int32] = np.zeros(_INITIAL_ROWS, np.int32)
        self.output_left: NDArray[np.int64] = np.zeros(_INITIAL_ROWS, np.int64)
        """[rows] output tokens until the limit."""
        self.page_tables: NDArray[np.int32] = np.zeros((_INITIAL_ROWS, _INITIAL_COLUMNS), np.int32)

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, req: Request) -> None:
        row = len(self.requests)
        self._make_room(row + 1, len(req.pages) + 1)
        self.requests.append(req)
        req.row_idx = row
        self.token_ids[row] = req.output_ids[-1]
        self.computed[row] = req.num_computed
        self.num_pages[row] = len(req.pages)
        self.output_left[row] = req.num_output_left
        self.page_tables[row, : len(req.pages)] = req.pages
        self.page_tables[row, len(req.pages) :] = 0

    def remove(self, req: Request) -> None:
        row = req.row_idx
        assert row is not None and self.requests[row] is req
        last = self.requests.pop()
        if last is not req:
            end = len(self.requests)
            for array in (self.token_ids, self.computed, self.num_pages, self.output_left, self.page_tables):
                array[row] = array[end]
            self.requests[row] = last
            last.row_idx = row
        req.row_idx = None

    def grow(self, cache: PrefixCache) -> bool:
        """Give each row a page for its next token; False, and nothing changed, if there are too few."""
        count = len(self.requests)
        full = np.flatnonzero(self.computed[:count] == self.num_pages[:count] * self.page_size)
        if not len(full):
            return True
        pages = cache.allocate(len(full))
        if pages is None:
            return False
        columns = self.num_pages[full]
        self._make_room(count, int(columns.max()) + 1)
        self.page_tables[full, columns] = pages
        self.num_pages[full] += 1
        for row, page in zip(full.tolist(), pages, strict=True):
            self.requests[row].pages.append(page)
        return True

    def advance(self, token_ids: list[int]) -> None:
        """After a step: every row has computed one token and got another. (The requests are advanced by the caller.)"""
        count = len(self.requests)
        self.token_ids[:count] = token_ids
        self.computed[:count] += 1
        self.output_left[:count] -= 1

    def reserve_tokens(self, clip: int) -> int:
        """Output tokens that the rows may still ask for, at most `clip` each."""
        count = len(self.requests)
        return int(np.minimum(self.output_left[:count], clip).sum()) if count else 0

    def check(self) -> None:
        """Rows mirror their requests. AssertionError names the row."""
        for row, req in enumerate(self.requests):
            mine = (
                int(self.token_ids[row]),
                int(self.computed[row]),
                int(self.output_left[row]),
                self.page_tables[row, : self.num_pages[row]].tolist(),
            )
            theirs = (req.output_ids[-1], req.num_computed, req.num_output_left, req.pages)
            assert req.row_idx == row and mine == theirs, f"row {row} has {mine}, {req.rid} has {theirs}"

    def _make_room(self, rows: int, columns: int) -> None:
        have_rows, have_columns = self.page_tables.shape
        if rows <= have_rows and columns <= have_columns:
            return
        new_rows, new_columns = have_rows, have_columns
        while new_rows < rows:
            new_rows *= 2
        while new_columns < columns:
            new_columns *= 2
        tables = np.zeros((new_rows, new_columns), np.int32)
        tables[:have_rows, :have_columns] = self.page_tables
        self.page_tables = tables
        more = new_rows - have_rows
        self.token_ids = np.pad(self.token_ids, (0, more))
        self.computed = np.pad(self.computed, (0, more))
        self.num_pages = np.pad(self.num_pages, (0, more))
        self.output_left = np.pad(self.output_left, (0, more))
