"""Hit rate and TTFT by round, as a picture. Needs matplotlib, the optional extra `plot`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.bench.errors import BenchError
from baton.bench.report import RoundSummary

_COLOURS = ("#4c566a", "#d08770", "#5e81ac", "#a3be8c", "#b48ead")


def need_matplotlib() -> None:
    """Raises `BenchError` saying what to install; to be called before a long run."""
    _import()


def plot_rounds(runs: Mapping[str, Sequence[RoundSummary]], path: Path, *, ceiling: Sequence[float] = ()) -> None:
    """One line a run. `ceiling`: the best hit rate that each round can have, drawn dotted. Raises `BenchError`."""
    pyplot = _import()
    # Text as text and no random ids: the picture stays small, and the same figures give the same file.
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "baton", "font.size": 9}):
        figure, (rates, times) = pyplot.subplots(1, 2, figsize=(8.4, 3.1), layout="constrained")
        if ceiling:
            rates.plot(
                range(1, len(ceiling) + 1), [100 * one for one in ceiling], ":", color="#999999", label="ceiling"
            )
        for index, (name, rounds) in enumerate(runs.items()):
            x, colour = range(1, len(rounds) + 1), _COLOURS[index % len(_COLOURS)]
            style = {"color": colour, "label": name, "marker": "o", "markersize": 3, "linewidth": 1.4}
            rates.plot(x, [100 * one.cache_hit_rate for one in rounds], **style)
            times.plot(x, [one.average_ttft for one in rounds], **style)
        rates.set(xlabel="round", ylabel="cache hit rate, %", ylim=(0, 100))
        times.set(xlabel="round", ylabel="mean TTFT, s", ylim=(0, None))
        for axes in (rates, times):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", linewidth=0.4, alpha=0.6)
            axes.set_xticks(range(1, 1 + max(len(rounds) for rounds in runs.values())))
        # There, and not beside the rates, since times begin low.
        times.legend(*rates.get_legend_handles_labels(), loc="upper left", frameon=False, fontsize=8)
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise BenchError(f"--plot {path}: {error.strerror}") from None
        finally:
            pyplot.close(figure)


def _import() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise BenchError("--plot needs matplotlib: pip install 'baton-llm[plot]'") from None
    return pyplot
