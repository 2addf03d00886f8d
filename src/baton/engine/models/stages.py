"""Pipeline stages: which layers each has, and how they are dealt out.

A stage is a consecutive range of layers. The first has the embedding, the final norm and the head too: the last one sends back
to it the rows whose logits are wanted, which are a hundredth of the logits. Not here: the ranks of a stage (`shard`), how hidden
states travel (distributed/).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from baton.engine.errors import ModelError
from baton.engine.models.spec import ModelConfig
from baton.engine.weights.names import expected_tensors

PARTITIONS = ("SGLANG_PP_LAYER_PARTITION", "VLLM_PP_LAYER_PARTITION")
"""Environment variables, the first one that is set counts: layers of each stage, "10,10,12"."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Stage `index`. `borders`: the layer at which each stage begins, and the number of layers."""

    index: int
    borders: tuple[int, ...]

    @property
    def size(self) -> int:
        """Of the pipeline."""
        return len(self.borders) - 1

    @property
    def layers(self) -> range:
        return range(self.borders[self.index], self.borders[self.index + 1])

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.size - 1


def plan_stages(
    config: ModelConfig, num_stages: int, environ: Mapping[str, str], num_asked: int | None = None
) -> tuple[int, ...]:
    """`Stage.borders`: as PARTITIONS says, or so that the largest stage reads as few bytes of weights as possible.

    `num_asked`: --pp-size where fewer stages run, a divisor of it: each then has the layers of several that were asked for. Raises `ModelError` for more stages than layers, and for a partition that does not fit.
    """
    if num_stages > config.num_layers:
        raise ModelError(f"--pp-size {num_stages}: the model has {config.num_layers} layers, and a stage at least one.")
    given = next((name for name in PARTITIONS if environ.get(name)), None)
    if given is not None and num_stages > 1:
        counts = _parse(given, environ[given], num_asked or num_stages, config.num_layers)
        merged = len(counts) // num_stages
        return _borders([sum(counts[first : first + merged]) for first in range(0, len(counts), merged)])
    costs = _layer_costs(config)
    head = config.vocab_size * config.hidden_size
    low, high = max(costs), sum(costs) + head
    while low < high:  # the smallest bound that the stages can keep
        bound = (low + high) // 2
        if _fill(costs, head, num_stages, bound) is None:
            low = bound + 1
        else:
            high = bound
    filled = _fill(costs, head, num_stages, low)
    assert filled is not None, "a stage may be as large as the model"
    return _borders(filled)


def _borders(counts: list[int]) -> tuple[int, ...]:
    borders = [0]
    for count in counts:
        borders.append(borders[-1] + count)
    return tuple(borders)


def _parse(name: str, text: str, num_stages: int, num_layers: int) -> list[int]:
    """Layers of each stage."""
    parts = [part.strip() for part in text.split(",")]
    counts = [int(part) if part.isdecimal() else 0 for part in parts]
    if len(counts) != num_stages or sum(counts) != num_layers or min(counts) < 1:
        raise ModelError(
            f"{name} must be {num_stages} numbers of at least 1, one for each of --pp-size stages, with a sum of {num_layers}, "
            f"the model's layers; got {text!r}."
        )
    return counts


def _layer_costs(config: ModelConfig) -> list[int]:
    """Numbers in the weights of each layer."""
    costs = [0] * config.num_layers
    for name, shape in expected_tensors(config).items():
        if name.startswith("model.layers."):
            costs[int(name.split(".")[2])] += math.prod(shape)
    return costs


def _fill(costs: list[int], head: int, num_stages: int, bound: int) -> list[int] | None:
    """Layers of each stage where none, the head in the first, is above `bound`; None: there is no such way.

    From the last stage on, each takes what it may, and leaves a layer for each stage before it.
    """
    counts: list[int] = []
    end = len(costs)
    for stages_before in reversed(range(num_stages)):
        room = bound - (0 if stages_before else head)
        count = 0
        while end - count > stages_before and (room := room - costs[end - count - 1]) >= 0:
            count += 1
        if count == 0:
            return None
        counts.append(count)
        end -= count
    return None if end else counts[::-1]
