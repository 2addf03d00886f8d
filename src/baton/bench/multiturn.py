"""`baton bench multiturn`: many conversations at once against a running server, SGLang's bench_multiturn by another hand.

Measures what a cache of KV pages saves when the same prefixes come back turn after turn. Joins the room's parts: flags,
workload, runs, report. Differences from SGLang's script: a failed request is counted and named and the run ends; tokens are
counted by event; which question a client gets does not depend on timing; nothing is downloaded.
"""

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import aiohttp
from rich.console import Console

from baton.bench.args import AUTO_RATES, USAGE, MultiturnArgs, parse_multiturn_args, start_notes
from baton.bench.client import flush_cache, get_json, open_session
from baton.bench.display import Display, rounds_table
from baton.bench.errors import BenchError
from baton.bench.plot import need_matplotlib, plot_rounds
from baton.bench.report import (
    RoundSummary,
    Summary,
    append_line,
    failure_lines,
    json_line,
    output_hash,
    report_lines,
    summarise,
    summarise_rounds,
)
from baton.bench.runner import BetweenRounds, Run, Runner
from baton.bench.workload import Workload, make_workload
from baton.engine.errors import ModelError
from baton.engine.flags import FlagError, HelpRequested, format_help
from baton.engine.tokenizer import TextTokenizer, open_tokenizer
from baton.engine.weights.resolve import resolve_model


@dataclass(frozen=True)
class Result:
    """One run with its figures."""

    run: Run
    summary: Summary
    rounds: list[RoundSummary]
    workload: Workload

    @property
    def output_hash(self) -> str:
        return output_hash(self.run)


async def measure(
    args: MultiturnArgs, console: Console, *, request_rate: float, between_rounds: BetweenRounds | None = None
) -> Result:
    """Flush the server's cache, then one run. Raises `BenchError` when the server or the data set does not serve."""
    async with open_session(args.request_timeout) as session:
        tokenizer = open_tokenizer_of(args.model_path or await _served_model_path(session, args))
        workload = make_workload(args, tokenizer, tokenizer.tokenizer.get_vocab_size(with_added_tokens=False))
        model = await _served_name(session, args) if args.api_format == "openai" else ""
        await flush_cache(session, args.flush_url or f"{args.base_url}/flush_cache")
        with Display(workload.num_requests, console) as display:
            runner = Runner(
                args, workload, tokenizer, session, display,
                request_rate=request_rate, model=model, between_rounds=between_rounds,
            )  # fmt: skip
            try:
                run = await runner.run()
            except ExceptionGroup as group:
                known = group.subgroup(BenchError)
                raise group if known is None else known.exceptions[0] from None
    return Result(run, summarise(run, request_rate), summarise_rounds(run), workload)


def open_tokenizer_of(name_or_path: str) -> TextTokenizer:
    """Raises `BenchError` naming the flag that helps."""
    try:
        return open_tokenizer(resolve_model(name_or_path))
    except ModelError as error:
        raise BenchError(f"--model-path: {error}") from None


async def _served_model_path(session: aiohttp.ClientSession, args: MultiturnArgs) -> str:
    info = await get_json(session, f"{args.base_url}/get_model_info")
    path = info.get("tokenizer_path") or info.get("model_path")
    if not isinstance(path, str):
        raise BenchError(f"{args.base_url}/get_model_info names no model_path; give --model-path")
    return path


async def _served_name(session: aiohttp.ClientSession, args: MultiturnArgs) -> str:
    try:
        return str((await get_json(session, f"{args.base_url}/v1/models"))["data"][0]["id"])
    except (LookupError, TypeError):
        raise BenchError(f"{args.base_url}/v1/models names no model") from None


def main(argv: Sequence[str]) -> int:
    """0: all requests were answered; 1: some failed, or the run could not be made; 2: the command line is wrong."""
    try:
        args = parse_multiturn_args(argv)
    except HelpRequested:
        sys.stdout.write(format_help(MultiturnArgs, USAGE) + "\n")
        return 0
    except FlagError as error:
        sys.stderr.write("".join(f"baton bench multiturn: {problem}\n" for problem in error.problems))
        return 2
    for note in start_notes(args):
        sys.stderr.write(f"note: {note}\n")
    try:
        return asyncio.run(_run_all(args))
    except BenchError as error:
        sys.stderr.write(f"baton bench multiturn: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("baton bench multiturn: interrupted\n")
        return 130


async def _run_all(args: MultiturnArgs) -> int:
    if args.plot is not None:
        need_matplotlib()
    output, progress = Console(highlight=False), Console(stderr=True, soft_wrap=True)
    kind = "specified request rate" if args.disable_auto_run else "different request rates"
    sys.stdout.write(f"{'Running with' if args.disable_auto_run else 'Auto-running with'} {kind}...\n")
    num_failed, plotted = 0, {}
    for rate in (args.request_rate,) if args.disable_auto_run else AUTO_RATES:
        result = await measure(args, progress, request_rate=rate)
        _print(result, args, output)
        append_line(
            Path(args.log_file), json_line(result.run, result.summary, result.rounds, tag=args.tag, now=datetime.now())
        )
        plotted[args.tag or f"{rate:g} requests/s"] = result.rounds
        num_failed += len(result.run.failures)
    if args.plot is not None:
        plot_rounds(plotted, Path(args.plot))
    return 1 if num_failed else 0


def _print(result: Result, args: MultiturnArgs, output: Console) -> None:
    lines = [*failure_lines(result.run), *report_lines(result.summary, result.rounds)]
    if args.output_hash:
        lines.append(f"Output hash: {result.output_hash}")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    output.print(rounds_table(result.rounds))
