"""Rows that change while a command waits: one live line each on a terminal, elsewhere a plain line for what lasts."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baton.cluster.progress import Row

QUIET_S = 1.0
"""On no terminal: how long a row keeps still after a line of it, unless it becomes ready."""
_MARKS = {"ready": ("✓", "green"), "waiting": ("…", "yellow"), "stuck": ("✗", "red")}


class Lines:
    """Use as a context manager; `show` takes all rows each time."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._shown: dict[str, tuple[str, float]] = {}

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, rows: list[Row]) -> None:
        if self._live is not None:
            self._live.update(_table(rows), refresh=True)
            return
        now = time.monotonic()
        for row in rows:
            text, since = self._shown.get(row.title, ("", float("-inf")))
            if row.text != text and (row.state == "ready" or now - since >= QUIET_S):
                self._shown[row.title] = (row.text, now)
                self._console.print(Text(str(row)))


def _table(rows: list[Row]) -> Table:
    table = Table.grid(padding=(0, 1))
    for row in rows:
        mark, colour = _MARKS[row.state]
        table.add_row(Text(mark, style=colour), Text(row.title), Text(row.text, overflow="ellipsis", no_wrap=True))
    return table
