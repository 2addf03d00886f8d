"""The leader's runner: tells the other ranks what comes, then computes its own part with them."""

from baton.engine.batch import ForwardBatch, ForwardOutput
from baton.engine.distributed.control import GroupError
from baton.engine.distributed.group import LeaderGroup
from baton.engine.runner import ModelRunner, logit_rows


class LeadingRunner:
    """A `runner.Runner` over all ranks of a group."""

    def __init__(self, own: ModelRunner, group: LeaderGroup) -> None:
        self._own, self._group = own, group
        self.is_batch_invariant = own.is_batch_invariant
        self.attention_backend = own.attention_backend

    def forward(self, batch: ForwardBatch) -> ForwardOutput:
        """Raises `GroupError` for any failure: after half a step the ranks no longer agree, and only a new start helps."""
        self._group.send_step(batch, logit_rows(batch))
        try:
            return self._own.forward(batch)
        except (RuntimeError, MemoryError) as error:
            raise GroupError(f"the step failed on rank 0: {error}") from error
