"""What a benchmark shows on a terminal: a bar while it runs (stderr), a table of rounds at its end.

Standard output stays what SGLang's script prints; without a terminal there is a line for each round instead of a bar.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

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
    """One row a round; a column for each tier that the server told of."""
    tiers = sorted({tier for one in rounds for tier in one.cached_by_tier}, key=("device", "host", "storage").index)
    table = Table(title=None)
    headings = ("Round", "Requests", "Failed", "Tokens", "Hit rate", *(f"from {tier}" for tier in tiers),
                "TTFT s", "P90 TTFT s", "Input tok/s")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right")
    for index, one in enumerate(rounds):
        shares = (one.cached_by_tier.get(tier, 0) / max(1, one.prompt_tokens) for tier in tiers)
        table.add_row(
            str(index), str(one.request_count), str(one.failed_count), str(one.prompt_tokens), f"{one.cache_hit_rate:.1%}",
            *(f"{share:.1%}" for share in shares), f"{one.average_ttft:.3f}", f"{one.p90_ttft:.3f}",
            f"{one.prompt_tokens / one.duration_s:.0f}" if one.duration_s else "-",
        )  # fmt: skip
    return table
