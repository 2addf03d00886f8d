"""One rank's part of the steps of a pipeline.

A step goes round the ring: every stage runs its layers on what the one before left, the last one returns the rows whose logits
are wanted, and the first one ends the step with them. All ranks of a stage begin and end steps in the same order, which is that
of the leader's messages: a `Step` begins one, `EndStep` ends the oldest (on the first stage; elsewhere a step ends by itself).
Not here: who leads (`runner`), the connections (`ring`).
"""

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

from baton.engine.batch import ForwardBatch
from baton.engine.distributed.ring import Ring
from baton.engine.load import LoadedModel
from baton.engine.models.decoder import Decoder
from baton.engine.models.stages import Stage
from baton.engine.runner import Logits


class StagePart:
    """One rank's part of every step. Invariant: `_begun` are the steps that other stages still work on, oldest first."""

    def __init__(self, decoder: Decoder, stage: Stage, ring: Ring, device: torch.device) -> None:
        self.stage = stage
        self._decoder, self._ring, self._device = decoder, ring, device
        self._begun: deque[tuple[ForwardBatch, list[NDArray[np.int64]]]] = deque()

    def begin(self, batch: ForwardBatch, rows: list[NDArray[np.int64]]) -> None:
        """Run the stage's layers and hand on what they leave. `rows`: token rows of each call for logits, in order.

        Raises `GroupError` when a neighbour is gone.
        """
        states = self._decoder.forward(batch, None if self.stage.is_first else self._receive())
        self._ring.send(states.left(np.concatenate([np.empty(0, np.int64), *rows]) if self.stage.is_last else None))
        if self.stage.is_first:
            self._begun.append((batch, rows))

    def end(self) -> tuple[ForwardBatch, Logits]:
        """Of the first stage: wait for the oldest step; the logits of its `rows`, call by call. Raises `GroupError`."""
        batch, rows = self._begun.popleft()
        parts = iter(torch.split(self._receive(), [len(one) for one in rows]))
        return batch, lambda _rows: self._decoder.head(batch, next(parts))

    def follow_end(self) -> None:
        """`end` on a rank that does not draw: its part of the logits."""
        _, rows = self._begun[0]
        _, logits = self.end()
        for one in rows:
            logits(one)

    def _receive(self) -> torch.Tensor:
        return self._ring.receive(self._decoder.hidden_size, self._decoder.hidden_dtype, self._device)


def stage_part(model: LoadedModel) -> StagePart | None:
    """None: there is one stage."""
    stage, ring = model.shard.stage, model.ring
    if stage is None or ring is None:
        return None
    return StagePart(model.runner.decoder, stage, ring, model.device)
