"""Figures of a run: SGLang's summary, lines and JSON keys, and ours beside them.

Pure functions of a `Run`. SGLang's definitions are kept: the hit rate is cached tokens by prompt tokens, the p-th percentile
is `sorted[int(p * n)]`, and throughput divides by the whole time, pauses and barriers included. Failed requests are in no
average; they are counted apart.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from baton.bench.errors import BenchError
from baton.bench.runner import Record, Run


@dataclass(frozen=True)
class Summary:
    """SGLang's keys, in its order. Times in seconds, lengths in tokens, throughputs per second."""

    total_requests: int
    request_rate: float
    average_prompt_len: float
    average_output_len: float
    average_ttft: float
    p90_ttft: float
    median_ttft: float
    average_latency: float
    p90_latency: float
    median_latency: float
    input_token_throughput: float
    output_token_throughput: float
    throughput: float
    cache_hit_rate: float


@dataclass(frozen=True)
class RoundSummary:
    average_ttft: float
    cache_hit_rate: float
    request_count: int
    p90_ttft: float
    """This and what follows are ours."""
    failed_count: int
    prompt_tokens: int
    cached_tokens: int
    cached_by_tier: dict[str, int]
    """Empty if the server does not say."""
    duration_s: float
    """From the first sending to the last answer."""


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0.0


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def summarise(run: Run, request_rate: float) -> Summary:
    answers = [one.answer for one in run.records if one.answer is not None]
    ttfts, latencies = [one.ttft_s for one in answers], [one.latency_s for one in answers]
    prompts, outputs = [one.prompt_len for one in answers], [one.output_len for one in answers]
    duration_s = run.duration_s or float("inf")
    return Summary(
        total_requests=len(answers),
        request_rate=request_rate,
        average_prompt_len=mean(prompts),
        average_output_len=mean(outputs),
        average_ttft=mean(ttfts),
        p90_ttft=percentile(ttfts, 0.9),
        median_ttft=percentile(ttfts, 0.5),
        average_latency=mean(latencies),
        p90_latency=percentile(latencies, 0.9),
        median_latency=percentile(latencies, 0.5),
        input_token_throughput=sum(prompts) / duration_s,
        output_token_throughput=sum(outputs) / duration_s,
        throughput=len(answers) / duration_s,
        cache_hit_rate=sum(one.cached_tokens for one in answers) / max(1, sum(prompts)),
    )


def summarise_round(records: Sequence[Record]) -> RoundSummary:
    answered = [(one.sent_s, one.answer) for one in records if one.answer is not None]
    ttfts = [answer.ttft_s for _, answer in answered]
    prompt_tokens = sum(answer.prompt_len for _, answer in answered)
    cached_tokens = sum(answer.cached_tokens for _, answer in answered)
    by_tier: dict[str, int] = {}
    for _, answer in answered:
        for tier, count in answer.cached_by_tier.items():
            by_tier[tier] = by_tier.get(tier, 0) + count
    ended_s = max((sent_s + answer.latency_s for sent_s, answer in answered), default=0.0)
    return RoundSummary(
        average_ttft=mean(ttfts),
        cache_hit_rate=cached_tokens / max(1, prompt_tokens),
        request_count=len(answered),
        p90_ttft=percentile(ttfts, 0.9),
        failed_count=len(records) - len(answered),
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        cached_by_tier=by_tier,
        duration_s=max(0.0, ended_s - min((sent_s for sent_s, _ in answered), default=0.0)),
    )


def summarise_rounds(run: Run) -> list[RoundSummary]:
    count = 1 + max((one.round_idx for one in run.records), default=-1)
    return [summarise_round([one for one in run.records if one.round_idx == index]) for index in range(count)]


def output_hash(run: Run) -> str:
    """SHA-256 over all answers by client and round: equal for two runs whose requests got the same tokens (the same text,
    where the server gives no token ids)."""
    digest = hashlib.sha256()
    for one in sorted(run.records, key=lambda record: (record.client, record.round_idx)):
        output = None if one.answer is None else one.answer.output_ids or one.answer.text
        digest.update(json.dumps([one.client, one.round_idx, output]).encode() + b"\n")
    return digest.hexdigest()


def report_lines(summary: Summary, rounds: Sequence[RoundSummary]) -> list[str]:
    """What SGLang's script prints, to the letter."""
    lines = [
        "All requests completed",
        "Performance metrics summary:",
        f"  Total requests: {summary.total_requests} at {summary.request_rate} requests per second",
        f"  Average Prompt Length: {summary.average_prompt_len:.2f} tokens",
        f"  Average Output Length: {summary.average_output_len:.2f} tokens",
        f"  Average TTFT: {summary.average_ttft:.2f}",
        f"  P90 TTFT: {summary.p90_ttft:.2f}",
        f"  Median TTFT: {summary.median_ttft:.2f}",
        f"  Average latency: {summary.average_latency:.2f}",
        f"  P90 latency: {summary.p90_latency:.2f}",
        f"  Median latency: {summary.median_latency:.2f}",
        f"  Input token throughput: {summary.input_token_throughput:.2f} tokens per second",
        f"  Output token throughput: {summary.output_token_throughput:.2f} tokens per second",
        f"  Request Throughput: {summary.throughput:.2f} requests per second",
        f"  Cache Hit Rate: {summary.cache_hit_rate:.6f}",
        "Per-round metrics:",
    ]
    for index, one in enumerate(rounds):
        lines.append(
            f"  Round {index}: Average TTFT = {one.average_ttft:.2f}s, Cache Hit Rate = {one.cache_hit_rate:.6f} "
            f"({one.request_count} requests)"
        )
    return lines


def failure_lines(run: Run) -> list[str]:
    lines = [
        f"Error processing response for client {one.client} in round {one.round_idx}: {one.error}"
        for one in run.failures
    ]
    if lines:
        lines.append(
            f"Failed requests: {len(run.failures)} ({run.num_unsent} later turns of these clients were not asked)"
        )
    return lines


def json_line(run: Run, summary: Summary, rounds: Sequence[RoundSummary], *, tag: str, now: datetime) -> dict[str, Any]:
    """One line of the log file: SGLang's keys, then ours."""
    return {
        "timestamp": now.isoformat(),
        "tag": tag,
        "summary": asdict(summary),
        "round": {f"round_{index}": asdict(one) for index, one in enumerate(rounds)},
        "failed_requests": len(run.failures),
        "unsent_requests": run.num_unsent,
        "duration_s": run.duration_s,
        "output_hash": output_hash(run),
    }


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Raises `BenchError` naming --log-file."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise BenchError(f"--log-file {path}: {error.strerror}") from None
