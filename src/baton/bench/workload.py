"""What the clients of a multi-turn benchmark say: prompts and lengths, drawn as SGLang's bench_multiturn draws them.

Same seed, same vocabulary: the same token ids as SGLang's `sample_random_requests`. There, which later question a client
gets depends on the order of completion; here question and turn belong together beforehand (one of the orders that could
have been), so that two runs ask the same and their answers can be compared. Not here: sending (`runner`).
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from baton.bench.args import MultiturnArgs
from baton.bench.errors import BenchError


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Question:
    token_ids: list[int]
    output_len: int


@dataclass(frozen=True)
class Workload:
    """`questions[client][round]`; a client's list is as long as its conversation."""

    questions: list[list[Question]]

    @property
    def num_requests(self) -> int:
        return sum(map(len, self.questions))

    @property
    def num_rounds(self) -> int:
        return max(map(len, self.questions))

    def clients_in(self, round_idx: int) -> int:
        return sum(len(one) > round_idx for one in self.questions)


def make_workload(args: MultiturnArgs, encoder: Encoder, vocab_size: int) -> Workload:
    """Raises `BenchError` for a data set that does not serve."""
    order = random.Random(args.seed)
    numbers = np.random.RandomState(args.seed)
    low, high = args.rounds_range
    rounds = [low if low == high else order.randint(low, high) for _ in range(args.num_clients)]
    first = _sample(args, args.request_length, args.num_clients, encoder, vocab_size, numbers, order)
    later_len = args.sub_question_input_length or args.request_length
    later = _sample(args, later_len, max(1, sum(rounds) - len(rounds)), encoder, vocab_size, numbers, order)
    questions = [[question] for question in first]
    for round_idx in range(1, high):
        for client, count in enumerate(rounds):
            if count > round_idx:
                questions[client].append(later.pop())
    return Workload(questions)


def _sample(
    args: MultiturnArgs,
    input_len: int,
    count: int,
    encoder: Encoder,
    vocab_size: int,
    numbers: np.random.RandomState,
    order: random.Random,
) -> list[Question]:
    input_lens = _lengths(input_len, args.range_ratio, count, numbers)
    output_lens = _lengths(args.output_length, args.range_ratio, count, numbers)
    if args.disable_random_sample:
        offsets = numbers.randint(0, vocab_size, size=count).tolist()
        prompts = [
            [(offset + index + position) % vocab_size for position in range(length)]
            for index, (offset, length) in enumerate(zip(offsets, input_lens, strict=True))
        ]
    else:
        prompts = _from_dataset(Path(args.dataset_path), input_lens, encoder, order)
    return [Question(ids, output_len) for ids, output_len in zip(prompts, output_lens, strict=True)]


def _lengths(full: int, ratio: float, count: int, numbers: np.random.RandomState) -> list[int]:
    return [int(one) for one in numbers.randint(max(int(full * ratio), 1), full + 1, size=count)]


def _from_dataset(path: Path, lengths: Sequence[int], encoder: Encoder, order: random.Random) -> list[list[int]]:
    """First turns of conversations, each repeated or cut to its length."""
    turns = _first_turns(path)
    order.shuffle(turns)
    prompts: list[list[int]] = []
    for text in turns:
        if len(prompts) == len(lengths):
            break
        length, token_ids = lengths[len(prompts)], encoder.encode(text)
        if token_ids:
            prompts.append((token_ids * -(-length // len(token_ids)))[:length])
    if len(prompts) < len(lengths):
        raise BenchError(f"--dataset-path {path}: {len(lengths)} conversations are needed, it holds {len(prompts)}")
    return prompts


def _first_turns(path: Path) -> list[str]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"--dataset-path {path}: {error}") from None
    if not isinstance(entries, list):
        raise BenchError(f"--dataset-path {path}: must hold a JSON list of conversations")
    texts: list[str] = []
    for entry in entries:
        turns = entry.get("conversations", entry.get("conversation")) if isinstance(entry, dict) else None
        # A conversation without an answer is no conversation (SGLang's rule).
        if isinstance(turns, list) and len(turns) >= 2 and isinstance(turns[0], dict):
            text = turns[0].get("value")
            if isinstance(text, str) and text:
                texts.append(text)
    return texts
