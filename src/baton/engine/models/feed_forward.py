"""The second half of a layer in torch: one gated feed-forward part, or a router and a mixture of them.

Each gives this rank's share of the result; the decoder sums over the ranks. Every rank routes every token alike and computes what its
own experts, or its own columns of them, add (`parameters`). Not here: norms and residuals (decoder), the same in C (kernels/).

Shape letters: T tokens, E hidden size, F feed-forward size of a part or of one expert, X experts, k experts of a token.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F

from baton.engine.models.shard import LocalSizes
from baton.engine.models.spec import ExpertsConfig


@dataclass(frozen=True, slots=True)
class DenseFeedForward:
    """down(silu(gate(x)) * up(x)). `gate_up`: [2F, E], `down`: [E, F]."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, E] -> [T, E]."""
        gate, up = F.linear(x, self.gate_up, self.gate_up_bias).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down, self.down_bias)


class ExpertFeedForward:
    """A token's result is the weighted sum over its k experts, formed in float32 in the order of their weights.

    `router`: [X, E]. Of this rank's experts, one below the other: `gate_up` [experts * 2F, E], `down` [experts * E, F].
    """

    def __init__(
        self,
        config: ExpertsConfig,
        sizes: LocalSizes,
        router: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
    ) -> None:
        self._config, self._router = config, router
        self._own = range(*sizes.experts)
        self._gate_up = gate_up.view(len(self._own), -1, gate_up.shape[1])
        self._down = down.view(len(self._own), -1, down.shape[1])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, E] -> [T, E]."""
        weights, chosen = self.route(x)
        # Pairs of token and expert, expert after expert: one product for each expert that has tokens.
        order = chosen.view(-1).argsort(stable=True)
        counts = torch.bincount(chosen.view(-1), minlength=self._config.num_experts).tolist()
        borders = list(accumulate(counts, initial=0))
        rows = x[order // self._config.num_experts_per_token]
        outputs = x.new_zeros(len(rows), x.shape[1])
        for expert, (first, last) in enumerate(pairwise(borders)):
            if first < last and expert in self._own:
                outputs[first:last] = self._expert(expert - self._own.start, rows[first:last])
        by_token = torch.empty_like(outputs)
        by_token[order] = outputs
        return (by_token.view(*chosen.shape, -1).float() * weights[:, :, None]).sum(dim=1).to(x.dtype)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, E] -> weights [T, k] float32, largest first, and experts [T, k]. The softmax is over all experts."""
        weights, chosen = F.linear(x, self._router).float().softmax(dim=-1).topk(self._config.num_experts_per_token)
        if self._config.normalises_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen

    def _expert(self, index: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(x, self._gate_up[index]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self._down[index])
