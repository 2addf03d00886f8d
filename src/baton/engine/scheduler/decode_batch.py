"""The running requests as arrays that live from step to step, so that a decode step costs little Python per row.

Owns row numbers and the array mirror of each running request's page table. The requests own the truth (`pages`,
`num_computed`); `check` compares the two. Deciding who runs is not here.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from baton.engine.scheduler.request import Request
from baton.kvcache.prefix_cache import PrefixCache

Rows = NDArray[np.intp]
"""Row numbers, ascending."""
NO_ROWS: Rows = np.zeros(0, np.intp)
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
        self.in_step: NDArray[np.bool_] = np.zeros(_INITIAL_ROWS, np.bool_)
        """[rows] a step in flight computes the row's token."""
        self.last_step: NDArray[np.int64] = np.zeros(_INITIAL_ROWS, np.int64)
        """[rows] the last step that did, or that had begun when the row was added."""
        self._num_steps = 0

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
        self.in_step[row] = False
        self.last_step[row] = self._num_steps

    def remove(self, req: Request) -> None:
        row = req.row_idx
        assert row is not None and self.requests[row] is req
        last = self.requests.pop()
        if last is not req:
            end = len(self.requests)
            for array in self._arrays():
                array[row] = array[end]
            self.requests[row] = last
            last.row_idx = row
        req.row_idx = None

    def all_rows(self) -> Rows:
        return np.arange(len(self.requests))

    def due(self, num_steps: int) -> Rows:
        """Who goes into the next step, if `num_steps` at once share the rows: of those that are in none, the ones that
        waited longest."""
        if num_steps == 1:
            return self.all_rows()
        count = len(self.requests)
        idle = np.flatnonzero(~self.in_step[:count])
        limit = -(-count // num_steps)
        if len(idle) > limit:
            idle = np.sort(idle[np.argsort(self.last_step[idle], kind="stable")[:limit]])
        return idle

    def begin_step(self, rows: Rows) -> list[Request]:
        """`rows` are in a step from now on, until `advance` or `remove`. Returns their requests."""
        self._num_steps += 1
        self.in_step[rows] = True
        self.last_step[rows] = self._num_steps
        if len(rows) == len(self.requests):
            return list(self.requests)
        return [self.requests[row] for row in rows.tolist()]

    def grow(self, cache: PrefixCache, rows: Rows) -> bool:
        """Give each of `rows` a page for its next token; False, and nothing changed, if there are too few."""
        full = rows[self.computed[rows] == self.num_pages[rows] * self.page_size]
        if not len(full):
            return True
        pages = cache.allocate(len(full))
        if pages is None:
            return False
        columns = self.num_pages[full]
        self._make_room(0, int(columns.max()) + 1)
        self.page_tables[full, columns] = pages
        self.num_pages[full] += 1
        for row, page in zip(full.tolist(), pages, strict=True):
            self.requests[row].pages.append(page)
        return True

    def advance(self, requests: list[Request], token_ids: list[int]) -> None:
        """After a step: the rows of `requests` have computed one token and got another. (The requests are advanced by the
        caller.)"""
        count = len(requests)
        everyone = requests == self.requests
        rows = slice(0, count) if everyone else np.array([req.row_idx for req in requests], np.intp)
        self.token_ids[rows] = token_ids
        self.computed[rows] += 1
        self.output_left[rows] -= 1
        self.in_step[rows] = False

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

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        return (
            self.token_ids, self.computed, self.num_pages, self.output_left, self.page_tables, self.in_step, self.last_step,
        )  # fmt: skip

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
        self.in_step = np.pad(self.in_step, (0, more))
        self.last_step = np.pad(self.last_step, (0, more))
