"""Command line of `baton bench multiturn`: the flags and defaults of SGLang's bench_multiturn, and a few of ours.

Values are checked here in one pass, so that a run never stops half-way for a flag. Not here: what the flags do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from baton.engine.flags import flag, parse_flags

USAGE = "usage: baton bench multiturn [flags]     (the flags of SGLang's benchmark/hicache/bench_multiturn.py)"
AUTO_RATES = (16.0, 14.0, 12.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)
"""What is tried, one run each, unless `--disable-auto-run` is given (SGLang's list)."""


@dataclass(frozen=True)
class MultiturnArgs:
    """One field, one flag."""

    num_clients: int = flag(256, "conversations", minimum=1)
    max_parallel: int = flag(128, "requests in progress at once", minimum=1)
    request_length: int = flag(512, "tokens of a client's first prompt", minimum=1)
    output_length: int = flag(64, "tokens of every answer", minimum=1)
    num_rounds: int = flag(5, "turns of every conversation", minimum=1)
    min_rounds: int = flag(0, "turns of the shortest conversation; 0: --max-rounds, or --num-rounds", minimum=0)
    max_rounds: int = flag(0, "turns of the longest conversation; 0: --min-rounds, or --num-rounds", minimum=0)
    distribution: Literal["poisson", "uniform"] = flag(
        "poisson", "of the pauses between two sendings", choices=("poisson", "uniform")
    )
    request_rate: float = flag(1.0, "sendings per second, at most; with --disable-auto-run")
    host: str = flag("localhost", "of the server or router")
    port: int = flag(30000, "of the server or router", minimum=1, maximum=65535)
    model_path: str | None = flag(
        None, "where the tokenizer is: model directory, .gguf file or hub id; none: what the server says"
    )
    dataset_path: str = flag(
        "", "ShareGPT JSON file whose first turns become prompts; not read with --disable-random-sample"
    )
    log_file: str = flag("performance_metrics.jsonl", "one JSON line for each run is appended here")
    disable_auto_run: bool = flag(False, "one run at --request-rate instead of one for each of several rates")
    disable_random_sample: bool = flag(
        False, "synthetic prompts (token ids that count up from a random one); needs no data set"
    )
    enable_round_barrier: bool = flag(False, "no client begins its next turn before all have had theirs")
    sub_question_input_length: int = flag(0, "tokens of every later prompt; 0: --request-length", minimum=0)
    ready_queue_policy: Literal["random", "fifo"] = flag(
        "random", "which waiting client is next", choices=("random", "fifo")
    )
    range_ratio: float = flag(1.0, "lengths are drawn between this share of the full one and the full one", minimum=0.0)
    tag: str = flag("", "name of the run in --log-file")
    seed: int = flag(1, "of prompts, order and pauses", minimum=0)
    lora_path: str = flag("", "adapter that every request asks for")
    api_format: Literal["sglang", "openai"] = flag(
        "sglang", "/generate or /v1/chat/completions", choices=("sglang", "openai")
    )
    flush_between_rounds: bool = flag(False, "flush the server's cache at every barrier, so that only a store can help")
    flush_url: str = flag("", "where to POST for a flush; none: /flush_cache of --host and --port")

    # Ours.
    prompt_format: Literal["ids", "text"] = flag(
        "ids",
        "ids: histories are token ids, as in newer versions of the script; text: as in older ones, re-tokenised by the server at every turn",
        choices=("ids", "text"),
    )
    request_timeout: float = flag(600.0, "seconds after which a request has failed", minimum=0.001)
    output_hash: bool = flag(False, "print a hash over all answers, which equal runs have in common")
    plot: str | None = flag(
        None, "file to draw hit rate and TTFT of each round into (.svg, .png, .pdf); needs the extra `plot`"
    )

    @property
    def base_url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def rounds_range(self) -> tuple[int, int]:
        """Turns of the shortest and of the longest conversation."""
        low, high = self.min_rounds or self.max_rounds, self.max_rounds or self.min_rounds
        return (low, high) if low else (self.num_rounds, self.num_rounds)


def parse_multiturn_args(argv: Sequence[str]) -> MultiturnArgs:
    """Raises `FlagError` with every problem found, or `HelpRequested`."""
    return parse_flags(MultiturnArgs, argv, _problems)


def start_notes(args: MultiturnArgs) -> list[str]:
    """One line for each flag that was given and does nothing in this combination."""
    notes: list[str] = []
    if args.disable_random_sample and args.dataset_path:
        notes.append("--dataset-path is not read with --disable-random-sample")
    if not args.disable_auto_run and args.request_rate != MultiturnArgs.request_rate:
        notes.append("--request-rate has no effect without --disable-auto-run")
    if args.api_format == "openai" and args.prompt_format != MultiturnArgs.prompt_format:
        notes.append("--prompt-format has no effect with --api-format openai, where prompts are messages")
    return notes


def _problems(args: MultiturnArgs) -> list[str]:
    problems: list[str] = []
    low, high = args.rounds_range
    if low > high:
        problems.append(f"--min-rounds must be at most --max-rounds ({high}), got {low}")
    if not args.request_rate > 0:
        problems.append(f"--request-rate must be above 0, got {args.request_rate:g}")
    if not 0 <= args.range_ratio <= 1:
        problems.append(f"--range-ratio must be between 0 and 1, got {args.range_ratio:g}")
    if not math.isfinite(args.request_timeout):
        problems.append(f"--request-timeout must be finite, got {args.request_timeout}")
    if args.port > 65535:
        problems.append(f"--port must be at most 65535, got {args.port}")
    if args.flush_between_rounds and not args.enable_round_barrier:
        problems.append("--flush-between-rounds needs --enable-round-barrier")
    if args.flush_url and not args.flush_url.startswith(("http://", "https://")):
        problems.append(f"--flush-url must begin with http://, got {args.flush_url!r}")
    if args.api_format == "openai" and args.lora_path:
        problems.append("--lora-path needs --api-format sglang: the OpenAI format has no field for it")
    if not args.disable_random_sample and not Path(args.dataset_path).is_file():
        problems.append(
            f"--dataset-path must be a ShareGPT JSON file on this machine, got {args.dataset_path!r}: nothing is downloaded; "
            "--disable-random-sample needs no data set"
        )
    if args.plot is not None and Path(args.plot).suffix not in (".svg", ".png", ".pdf"):
        problems.append(f"--plot must end in .svg, .png or .pdf, got {args.plot!r}")
    return problems
