"""What a user of `baton bench multiturn` sees: the order of requests, the lines and figures, and an end in every case."""

import asyncio
import json
import re
import sys
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tests.bench.conftest import Bench
from tests.fakes.fake_sglang import Asked

from baton.bench.args import parse_multiturn_args
from baton.bench.multiturn import main, measure

NUM_CLIENTS, NUM_ROUNDS, LENGTH, OUTPUT = 5, 3, 16, 2
LINES = [
    r"Running with specified request rate\.\.\.",
    r"All requests completed",
    r"Performance metrics summary:",
    r"  Total requests: 15 at 100000\.0 requests per second",
    r"  Average Prompt Length: 34\.00 tokens",
    r"  Average Output Length: 2\.00 tokens",
    r"  Average TTFT: \d+\.\d\d",
    r"  P90 TTFT: \d+\.\d\d",
    r"  Median TTFT: \d+\.\d\d",
    r"  Average latency: \d+\.\d\d",
    r"  P90 latency: \d+\.\d\d",
    r"  Median latency: \d+\.\d\d",
    r"  Input token throughput: \d+\.\d\d tokens per second",
    r"  Output token throughput: \d+\.\d\d tokens per second",
    r"  Request Throughput: \d+\.\d\d requests per second",
    r"  Cache Hit Rate: 0\.\d{6}",
    r"Per-round metrics:",
    r"  Round 0: Average TTFT = \d+\.\d\ds, Cache Hit Rate = 0\.000000 \(5 requests\)",
    r"  Round 1: Average TTFT = \d+\.\d\ds, Cache Hit Rate = 0\.470588 \(5 requests\)",
    r"  Round 2: Average TTFT = \d+\.\d\ds, Cache Hit Rate = 0\.615385 \(5 requests\)",
]
SUMMARY_KEYS = [
    "total_requests", "request_rate", "average_prompt_len", "average_output_len", "average_ttft", "p90_ttft", "median_ttft",
    "average_latency", "p90_latency", "median_latency", "input_token_throughput", "output_token_throughput", "throughput",
    "cache_hit_rate",
]  # fmt: skip


def logged(bench: Bench) -> list[dict[str, Any]]:
    return [json.loads(line) for line in bench.log_file.read_text().splitlines()]


def round_of(asked: Asked) -> int:
    return len(asked.prompt) // (LENGTH + OUTPUT)


async def test_rounds_wait_for_all_clients_and_never_too_many_run(bench: Bench) -> None:
    assert await bench.run() == 0
    asked = bench.server.asked
    assert [round_of(one) for one in asked] == [0] * 5 + [1] * 5 + [2] * 5
    for one in asked:
        assert one.num_running <= 2
        assert one.num_answered >= NUM_CLIENTS * round_of(one)


async def test_without_a_barrier_nobody_waits(bench: Bench) -> None:
    args = bench.flags("--max-parallel", "1", "--ready-queue-policy", "fifo")
    args.remove("--enable-round-barrier")
    assert await asyncio.to_thread(main, args) == 0
    # fifo and one at a time: everyone's first turn, then everyone's second, in the clients' order
    asked = bench.server.asked
    assert [one.prompt[:LENGTH] for one in asked[5:10]] == [one.prompt for one in asked[:5]]


async def test_a_conversation_grows_by_answer_and_question(bench: Bench) -> None:
    await bench.run()
    by_start: dict[tuple[int, ...], list[list[int]]] = {}
    for one in bench.server.asked:
        by_start.setdefault(tuple(one.prompt[:LENGTH]), []).append(one.prompt)
    assert len(by_start) == NUM_CLIENTS
    for first, second, third in by_start.values():
        assert (len(first), len(second), len(third)) == (16, 34, 52)
        assert second[:16] == first and third[:34] == second
        question = second[18:]
        assert question == [(question[0] + step) % 256 for step in range(16)]


async def test_prompts_are_sglangs(bench: Bench) -> None:
    await bench.run("--seed", "7")
    np.random.seed(7)
    for _ in range(2):
        np.random.randint(16, 17, size=5)
    offsets = np.random.randint(0, 256, size=5)
    expected = [[int(offset + i + j) % 256 for j in range(16)] for i, offset in enumerate(offsets)]
    assert sorted(one.prompt for one in bench.server.asked[:5]) == sorted(expected)


async def test_the_body_is_sglangs(bench: Bench) -> None:
    await bench.run("--lora-path", "mine")
    body = bench.server.asked[0].body
    assert body.pop("input_ids")
    assert body == {
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 2, "ignore_eos": True},
        "stream": True, "stream_options": {"include_usage": True}, "lora_path": "mine", "return_logprob": False,
        "logprob_start_len": -1,
    }  # fmt: skip


async def test_lines_and_keys_are_sglangs(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert await bench.run("--tag", "mine") == 0
    printed = capsys.readouterr().out.splitlines()
    for line, pattern in zip(printed, LINES, strict=False):
        assert re.fullmatch(pattern, line), line
    (line,) = logged(bench)
    assert line["tag"] == "mine" and line["timestamp"]
    assert list(line["summary"]) == SUMMARY_KEYS
    assert list(line["round"]) == ["round_0", "round_1", "round_2"]
    assert list(line["round"]["round_1"])[:3] == ["average_ttft", "cache_hit_rate", "request_count"]
    assert line["round"]["round_2"]["cached_by_tier"] == {"device": 32 * 5, "host": 0}
    assert line["summary"]["cache_hit_rate"] == pytest.approx(5 * (16 + 32) / (5 * (16 + 34 + 52)))


async def test_every_rate_is_tried_without_disable_auto_run(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    args = bench.flags("--num-clients", "1", "--num-rounds", "1")
    args.remove("--disable-auto-run")
    assert await asyncio.to_thread(main, args) == 0
    assert capsys.readouterr().out.startswith("Auto-running with different request rates...\n")
    rates = [line["summary"]["request_rate"] for line in logged(bench)]
    assert rates == [16, 14, 12, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert bench.server.calls.count("/flush_cache") == 13


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("status", "HTTP 503.*no room"),
        ("abort", "taken away"),
        ("error event", "page lost"),
        ("cut", "ended before"),
        ("hang", "timed out"),
    ],
)
async def test_a_failed_request_is_counted_named_and_waited_for_by_nobody(
    bench: Bench, capsys: pytest.CaptureFixture[str], fault: str, reason: str
) -> None:
    victims: list[Asked] = []

    def one_of_round_1(asked: Asked) -> str | None:
        if round_of(asked) == 1 and not victims:
            victims.append(asked)
            return fault
        return None

    bench.server.fault = one_of_round_1
    assert await bench.run("--request-timeout", "0.3" if fault == "hang" else "30") == 1
    printed = capsys.readouterr().out
    assert re.search(rf"Error processing response for client \d in round 1: .*{reason}", printed)
    assert "Failed requests: 1 (1 later turns of these clients were not asked)" in printed
    assert "  Total requests: 13 at" in printed
    assert [round_of(one) for one in bench.server.asked] == [0] * 5 + [1] * 5 + [2] * 4
    (line,) = logged(bench)
    assert (line["failed_requests"], line["unsent_requests"]) == (1, 1)
    assert [one["request_count"] for one in line["round"].values()] == [5, 4, 4]
    assert line["round"]["round_1"]["failed_count"] == 1


async def test_all_requests_may_fail(bench: Bench) -> None:
    bench.server.fault = lambda asked: "status"
    assert await bench.run() == 1
    assert logged(bench)[0]["summary"]["total_requests"] == 0


async def test_a_token_without_text_counts(bench: Bench) -> None:
    bench.server.text = ""
    assert await bench.run("--output-length", "1") == 0
    (line,) = logged(bench)
    assert line["summary"]["average_prompt_len"] == (16 + 33 + 50) / 3
    assert line["summary"]["cache_hit_rate"] == pytest.approx((16 + 32) / (16 + 33 + 50))
    assert line["summary"]["average_ttft"] > 0


async def test_the_order_of_completion_is_no_input(bench: Bench) -> None:
    args = parse_multiturn_args(bench.flags())
    plain = await measure(args, Console(quiet=True), request_rate=1e5)
    # the first of each round is answered after another
    bench.server.fault = lambda asked: (
        "late" if asked.num_answered % NUM_CLIENTS == 0 and asked.num_running == 1 else None
    )
    late = await measure(args, Console(quiet=True), request_rate=1e5)
    first, second = ([(one.client, one.round_idx) for one in result.run.records] for result in (plain, late))
    assert first == second
    assert plain.output_hash == late.output_hash and plain.run.histories == late.run.histories


async def test_other_answers_have_another_hash(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    for length in ("2", "2", "3"):
        await bench.run("--output-length", length, "--output-hash")
    printed = re.findall(r"Output hash: ([0-9a-f]{64})", capsys.readouterr().out)
    assert printed == [line["output_hash"] for line in logged(bench)]
    assert printed[0] == printed[1] != printed[2]


async def test_the_cache_is_flushed_before_a_run_and_between_rounds_if_wanted(bench: Bench) -> None:
    assert await bench.run("--flush-between-rounds") == 0
    assert [call for call in bench.server.calls if call != "/get_model_info"] == (
        ["/flush_cache"] + ["/generate"] * 5
    ) * 3
    assert logged(bench)[0]["summary"]["cache_hit_rate"] == 0


async def test_a_server_that_cannot_flush_is_not_measured(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.server.flush_status = 400
    assert await bench.run() == 1
    assert "/flush_cache answered 400" in capsys.readouterr().err
    assert not bench.server.asked


async def test_a_flush_between_rounds_that_fails_ends_the_run(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    def from_now_on(asked: Asked) -> None:
        bench.server.flush_status = 503

    bench.server.fault = from_now_on
    assert await bench.run("--flush-between-rounds") == 1
    assert "/flush_cache answered 503" in capsys.readouterr().err
    assert len(bench.server.asked) == NUM_CLIENTS


async def test_openai_format(bench: Bench) -> None:
    assert await bench.run("--api-format", "openai", "--output-length", "2") == 0
    last = bench.server.asked[-1].body
    assert last["model"] == "tiny" and last["max_tokens"] == 2
    assert [one["role"] for one in last["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    assert last["messages"][1]["content"] == "abab"
    (line,) = logged(bench)
    assert line["summary"]["total_requests"] == 15 and line["summary"]["average_output_len"] == 2
    assert line["round"]["round_2"]["cache_hit_rate"] > 0.5


async def test_text_format(bench: Bench) -> None:
    assert await bench.run("--prompt-format", "text") == 0
    texts = [one.body["text"] for one in bench.server.asked]
    for second in texts[5:10]:
        assert any(second.startswith(first + "ab") for first in texts[:5])


async def test_rounds_and_lengths_may_vary(bench: Bench) -> None:
    shape = ("--min-rounds", "1", "--max-rounds", "4", "--range-ratio", "0.5", "--sub-question-input-length", "8")
    assert await bench.run(*shape, "--num-clients", "20") == 0
    counts = [one["request_count"] for one in logged(bench)[0]["round"].values()]
    assert counts[0] == 20 > counts[1] > counts[2] > counts[3] > 0
    assert {len(one.prompt) for one in bench.server.asked[:20]} <= set(range(8, 17))
    assert len({len(one.prompt) for one in bench.server.asked[:20]}) > 1


async def test_prompts_from_a_data_set(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    talks = [{"conversations": [{"value": f"{index:03}"}, {"value": "answer"}]} for index in range(15)]
    path = bench.directory / "sharegpt.json"
    path.write_text(json.dumps([*talks, {"conversations": [{"value": "unanswered"}]}]))
    args = bench.flags("--dataset-path", str(path))
    args.remove("--disable-random-sample")
    assert await asyncio.to_thread(main, args) == 0
    prompt = bench.server.asked[0].prompt
    assert prompt == (prompt[:3] * 6)[:16]
    path.write_text(json.dumps(talks[:9]))
    assert await asyncio.to_thread(main, args) == 1
    assert f"--dataset-path {path}: 10 conversations are needed, it holds 9" in capsys.readouterr().err


def test_problems_are_told_at_once_by_flag(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--num-client", "x", "--request-rate", "0", "--flush-between-rounds", "--plot", "a.txt", "--warp", "9"]
    assert main(args) == 2
    told = capsys.readouterr().err
    for part in ("--num-client needs", "--request-rate must be above 0", "--flush-between-rounds needs",
                 "--plot must end in", "unknown flag --warp", "nothing is downloaded"):  # fmt: skip
        assert part in told


async def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--port", "1", "--disable-auto-run", "--disable-random-sample"]
    assert await asyncio.to_thread(main, args) == 1
    assert "http://localhost:1/get_model_info" in capsys.readouterr().err


async def test_plot(bench: Bench) -> None:
    pytest.importorskip("matplotlib")
    path = bench.directory / "rounds.svg"
    assert await bench.run("--plot", str(path), "--tag", "device only") == 0
    assert "device only" in path.read_text() and "mean TTFT, s" in path.read_text()


async def test_without_matplotlib_a_plot_is_refused_before_the_run(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert await bench.run("--plot", str(bench.directory / "rounds.svg")) == 1
    assert "pip install 'baton-llm[plot]'" in capsys.readouterr().err
    assert not bench.server.calls
