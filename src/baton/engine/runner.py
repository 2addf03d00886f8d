"""The model runner: `submit` a `ForwardBatch`, `collect` its `ForwardOutput`. It owns weights and the view of the KV pool, and nothing else.

It chooses how the model is computed (C kernels for bf16 on CPUs that can, torch elsewhere) and asks for logits only of
rows that are sampled or whose prompt log-probabilities are wanted. Not here: who is in the batch (scheduler/), how a token is
chosen (sampling/), who allocates the pool's memory and pages.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from baton.engine.attention.cpu import CpuAttention
from baton.engine.attention.torch_native import TorchAttention
from baton.engine.batch import ForwardBatch, ForwardOutput, PromptLogprobsRow
from baton.engine.errors import ModelError
from baton.engine.kernels.native import load_kernels
from baton.engine.models.decoder import Decoder, HiddenStates, TorchDecoder
from baton.engine.models.decoder_cpu import CpuDecoder
from baton.engine.models.shard import Shard, local_sizes
from baton.engine.models.spec import ModelConfig
from baton.engine.sampling.sampler import Sampler
from baton.protocol.rank import TokenLogprobs

logger = logging.getLogger(__name__)

ATTENTION_BACKENDS = ("auto", "cpu", "torch_native")
Logits = Callable[[NDArray[np.int64]], torch.Tensor]
"""Token rows of a step [R] to logits [R, V] float32."""
LOGPROB_ROWS = 64
"""Prompt rows whose logits are made at once: a whole prompt's would take gigabytes."""


def kv_page_bytes(config: ModelConfig, dtype: torch.dtype, page_size: int, shard: Shard | None = None) -> int:
    """Bytes of one KV page of this rank: (its layers, 2, its KV heads, page_size, head_dim) of `dtype`."""
    return math.prod(kv_page_shape(config, page_size, shard)) * dtype.itemsize


def kv_page_shape(config: ModelConfig, page_size: int, shard: Shard | None = None) -> tuple[int, int, int, int, int]:
    """(L, 2, K, S, D) of this rank."""
    sizes = local_sizes(config, shard or Shard())
    return len(sizes.layers), 2, sizes.num_kv_heads, page_size, config.head_dim


def kv_from_pages(
    pages: NDArray[np.uint8], config: ModelConfig, dtype: torch.dtype, page_size: int, shard: Shard | None = None
) -> torch.Tensor:
    """The KV tensor [num_pages, L, 2, K, S, D] over host memory [num_pages, page_bytes]; shares it, copies nothing."""
    shape = (len(pages), *kv_page_shape(config, page_size, shard))
    if pages.dtype != np.uint8 or pages.shape[1:] != (kv_page_bytes(config, dtype, page_size, shard),):
        raise ValueError(f"KV pages of shape {pages.shape} {pages.dtype} do not hold {shape[1:]} of {dtype}")
    return torch.from_numpy(pages).view(dtype).view(shape)


class Runner(Protocol):
    """What runs steps for the scheduler: this rank's model, or a group's."""

    depth: int
    """Steps that may be in flight, begun and not collected. 1: a step ends before the next one begins."""
    is_batch_invariant: bool
    attention_backend: str

    def submit(self, batch: ForwardBatch) -> None:
        """Begin a step. Not while `depth` steps are in flight."""

    def collect(self) -> ForwardOutput:
        """Wait for the oldest step in flight: its KV is written, its tokens are drawn. A step that drew none is collected too.

        A step that failed raises RuntimeError or MemoryError, from here or from `submit`, and is in flight no more; over
        several ranks it raises `GroupError` and nothing goes on.
        """


def run_step(runner: Runner, batch: ForwardBatch) -> ForwardOutput:
    """A step alone: nothing is in flight before or after it."""
    runner.submit(batch)
    return runner.collect()


class ModelRunner:
    """One model on one rank.

    `kv`: [num_pages, L, 2, K, S, D] of `dtype` on `device` (see `kv_from_pages`). `num_positions`: the longest sequence in
    tokens. `attention_backend`: one of ATTENTION_BACKENDS; "cpu" raises `ModelError` where the kernels cannot run.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        dtype: torch.dtype,
        device: torch.device,
        kv: torch.Tensor,
        num_positions: int | None = None,
        attention_backend: str = "auto",
        shard: Shard | None = None,
        num_threads: int | None = None,
    ) -> None:
        shard = shard or Shard()
        positions = num_positions or config.max_position_embeddings
        self.depth = 1
        self._begun: tuple[ForwardBatch, HiddenStates] | None = None
        self._sampler = Sampler()
        kernels = (
            load_kernels()
            if computes_in_c(attention_backend, config, dtype, device, shard.size, shard.ep_size)
            else None
        )
        self.is_batch_invariant = kernels is not None
        """Each token's logits are the same bits whatever is computed beside it and however its prompt was cut."""
        self.attention_backend = "cpu" if kernels is not None else TorchAttention.name
        self.decoder: Decoder
        if kernels is not None:
            self.decoder = CpuDecoder(
                config,
                weights,
                kernels=kernels,
                kv=kv,
                num_positions=positions,
                num_threads=num_threads or torch.get_num_threads(),
                shard=shard,
            )
        else:
            self.decoder = TorchDecoder(
                config,
                weights,
                attention=TorchAttention(kv),
                num_positions=positions,
                dtype=dtype,
                device=device,
                shard=shard,
            )

    def submit(self, batch: ForwardBatch) -> None:
        """Compute the batch's new tokens and write their KV."""
        assert self._begun is None, "collect the last step first"
        self._begun = batch, self.decoder.forward(batch)

    def collect(self) -> ForwardOutput:
        """Draw one token for each of the batch's `samples`."""
        assert self._begun is not None, "no step is in flight"
        (batch, hidden), self._begun = self._begun, None
        return self.draw(batch, hidden.logits)

    def draw(self, batch: ForwardBatch, logits: Logits) -> ForwardOutput:
        """What a step gives out; `logits` is called with `logit_rows(batch)`, one after the other."""
        rows = iter(logit_rows(batch))
        prompt_logprobs = [self._prompt_logprobs(logits, row, rows) for row in batch.prompt_logprobs]
        if not batch.samples:
            return ForwardOutput([], [], prompt_logprobs)
        token_ids, logprobs = self._sampler.sample(logits(next(rows)), batch.samples)
        return ForwardOutput(token_ids, logprobs, prompt_logprobs)

    def follow(self, batch: ForwardBatch, rows: Iterable[NDArray[np.int64]]) -> None:
        """This rank's part of a step that another rank leads; `rows`: that rank's `logit_rows`."""
        hidden = self.decoder.forward(batch)
        for one in rows:
            hidden.logits(one)

    def _prompt_logprobs(
        self, logits: Logits, row: PromptLogprobsRow, rows: Iterator[NDArray[np.int64]]
    ) -> list[TokenLogprobs]:
        done: list[TokenLogprobs] = []
        for offset in range(0, len(row.token_ids), LOGPROB_ROWS):
            token_ids = row.token_ids[offset : offset + LOGPROB_ROWS]
            part = PromptLogprobsRow(
                row.seq_idx, row.first_position + offset, token_ids, row.top_logprobs_num, row.token_ids_logprob
            )
            done.extend(self._sampler.prompt_logprobs(logits(next(rows)), part))
        return done


def logit_rows(batch: ForwardBatch) -> list[NDArray[np.int64]]:
    """Token rows of each call for logits that a step makes, in order: prompt log-probabilities, then the sampled rows."""
    ends = np.cumsum(batch.query_lens, dtype=np.int64)
    calls: list[NDArray[np.int64]] = []
    for row in batch.prompt_logprobs:
        start = int(ends[row.seq_idx] - batch.query_lens[row.seq_idx])
        first_query_position = int(batch.context_lens[row.seq_idx] - batch.query_lens[row.seq_idx])
        first_row = start + row.first_position - 1 - first_query_position
        assert first_row >= start, "the row before the first wanted position is in this step's query"
        for offset in range(0, len(row.token_ids), LOGPROB_ROWS):
            count = min(LOGPROB_ROWS, len(row.token_ids) - offset)
            calls.append(np.arange(first_row + offset, first_row + offset + count, dtype=np.int64))
    if batch.samples:
        calls.append(ends[[sample.seq_idx for sample in batch.samples]] - 1)
    return calls


def computes_in_c(
    attention_backend: str, config: ModelConfig, dtype: torch.dtype, device: torch.device, num_ranks: int, ep_size: int
) -> bool:
    """Whether a model is computed by the C kernels. Raises `ModelError` where they were asked for and cannot."""
    if not _wants_kernels(attention_backend, config, dtype, device, num_ranks, ep_size):
        return False
    if load_kernels() is not None:
        return True
    if attention_backend == "cpu":
        raise ModelError("--attention-backend cpu: the C kernels are not available on this machine.")
    return False


def _wants_kernels(
    attention_backend: str, config: ModelConfig, dtype: torch.dtype, device: torch.device, num_ranks: int, ep_size: int
) -> bool:
    if attention_backend not in ATTENTION_BACKENDS:
        known = ", ".join(ATTENTION_BACKENDS)
        raise ModelError(f"--attention-backend {attention_backend} is unknown; known: {known}.")
    if attention_backend == "torch_native":
        return False
    if ep_size not in (1, num_ranks):
        if attention_backend == "cpu":
            raise ModelError(f"--attention-backend cpu needs an --ep-size of 1 or {num_ranks}, got {ep_size}.")
        return False
    widths = [config.hidden_size, config.intermediate_size]
    if config.experts is not None:
        widths.append(config.experts.intermediate_size)
    even = all(width % 2 == 0 for width in widths)
    if even and CpuAttention.supports(dtype, device, config.head_dim):
        return True
    if attention_backend == "cpu":
        raise ModelError(
            "--attention-backend cpu needs --dtype bfloat16, --device cpu, an even hidden and feed-forward size and an "
            f"even head size of at most 512; got {dtype}, {device}, {config.hidden_size}, {config.intermediate_size}, "
            f"{config.head_dim}."
        )
    return False
