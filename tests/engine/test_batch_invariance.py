"""The kernels' promise: a token's logits are the same bits whatever is computed beside it and however its prompt was cut."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.batches import PagedSequences, Query
from tests.fakes.decoders import make_decoder, run_steps
from tests.fakes.models import hf_model
from transformers import PreTrainedModel

from baton.engine.kernels.native import load_kernels

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C kernels on this machine")

LENGTHS = (300, 1, 133, 64, 129)


@functools.cache
def model(family: str) -> PreTrainedModel:
    return hf_model(family, num_attention_heads=6, num_key_value_heads=2, hidden_size=96)


@functools.cache
def tokens() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]


@functools.cache
def reference(family: str) -> dict[int, torch.Tensor]:
    """Each sequence alone, in one prefill, on one thread, with pages of 16."""
    sequences = PagedSequences(tokens(), 16)
    decoder = make_decoder("kernels", model(family), sequences.num_pages, 16)
    return run_steps(decoder, sequences, [[Query(seq, 0, length)] for seq, length in enumerate(LENGTHS)])


def cut(draw: st.DrawFn, length: int) -> list[int]:
    """Borders of chunks; the tail is often decoded token by token."""
    borders = draw(st.sets(st.integers(1, length), max_size=3)) | {length}
    tail = draw(st.sampled_from((0, 0, 3)))
    return sorted(borders | set(range(max(1, length - tail), length)))


@st.composite
def schedules(draw: st.DrawFn) -> list[list[Query]]:
    """Steps that compute every token of every sequence once, in random company."""
    waiting = {seq: cut(draw, length) for seq, length in enumerate(LENGTHS)}
    done = dict.fromkeys(waiting, 0)
    steps: list[list[Query]] = []
    while waiting:
        chosen = draw(st.lists(st.sampled_from(sorted(waiting)), min_size=1, unique=True))
        steps.append([])
        for seq in chosen:
            stop = waiting[seq].pop(0)
            steps[-1].append(Query(seq, done[seq], stop))
            done[seq] = stop
            if not waiting[seq]:
                del waiting[seq]
    return steps


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps=schedules(), page_size=st.sampled_from((1, 3, 16, 64)), num_threads=st.integers(1, 3))
def test_logits_do_not_depend_on_the_batch(
    family: str, steps: list[list[Query]], page_size: int, num_threads: int
) -> None:
    sequences = PagedSequences(tokens(), page_size)
    decoder = make_decoder("kernels", model(family), sequences.num_pages, page_size, num_threads=num_threads)
    found = run_steps(decoder, sequences, steps)
    for seq, expected in reference(family).items():
        assert torch.equal(found[seq], expected), f"sequence {seq} differs"


def test_a_cached_prefix_gives_the_bits_of_a_computed_one() -> None:
    first = tokens()[0]
    second = first[:256] + tokens()[2]
    alone = PagedSequences([second], 16)
    expected = run_steps(
        make_decoder("kernels", model("qwen3"), alone.num_pages, 16), alone, [[Query(0, 0, len(second))]]
    )[0]
    shared = PagedSequences([first, second], 16, shared={1: (0, 16)})
    decoder = make_decoder("kernels", model("qwen3"), shared.num_pages, 16, num_threads=2)
    found = run_steps(decoder, shared, [[Query(0, 0, 300)], [Query(1, 256, len(second))]])[1]
    assert torch.equal(found, expected[256:])
