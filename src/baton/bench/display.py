"""What a benchmark shows on a terminal: a bar while it runs (stderr), a table of rounds at its end.

Standard output stays what SGLang's script prints; without a terminal there is a line for each round instead of a bar.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from baton.bench.report import RoundSummary, summarise_round
from baton.bench.runner import Record


class Display:
    """A context manager around one run; a `runner.Observer`."""

    def __init__(self, total: int, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("requests", total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def on_record(self, record: Record) -> None:
        self._progress.advance(self._task)
        if record.answer is None:
            self._console.print(
                f"client {record.client}, round {record.round_idx} failed: {record.error}",
                markup=False,
                highlight=False,
            )

    def on_round(self, round_idx: int, records: list[Record]) -> None:
        one = summarise_round(records)
        self._console.print(
            f"round {round_idx}: hit rate {one.cache_hit_rate:.1%}, TTFT {one.average_ttft:.2f} s, "
            f"{one.request_count} requests in {one.duration_s:.1f} s",
            highlight=False,
        )


def rounds_table(rounds: Sequence[RoundSummary]) -> Table:
    """One row a round; a column for each tier that the server told of, one for failures if there are any."""
    tiers = [tier for tier in ("device", "host", "storage") if any(tier in one.cached_by_tier for one in rounds)]
    has_failures = any(one.failed_count for one in rounds)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    failed = ("Failed",) if has_failures else ()
    for heading in ("Round", "Reqs", *failed, "Hit rate", *tiers, "TTFT s", "P90 s", "Tok/s in"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, one in enumerate(rounds):
        shares = [one.cache_hit_rate, *(one.cached_by_tier.get(tier, 0) / max(1, one.prompt_tokens) for tier in tiers)]
        cells = [str(index), str(one.request_count), *([str(one.failed_count)] if has_failures else [])]
        cells += [f"{share:.1%}" for share in shares]
        cells += [f"{one.average_ttft:.3f}", f"{one.p90_ttft:.3f}"]
        table.add_row(*cells, f"{one.prompt_tokens / one.duration_s:.0f}" if one.duration_s else "-")
    return table
