"""The leader's runner: tells the other ranks what comes, then computes its own part with them."""

from collections.abc import Iterator
from contextlib import contextmanager

from baton.engine.batch import ForwardBatch, ForwardOutput
from baton.engine.distributed.control import GroupError
from baton.engine.distributed.group import LeaderGroup
from baton.engine.runner import ModelRunner, logit_rows


class LeadingRunner:
    """A `runner.Runner` over all ranks of a group. `GroupError` for any failure: after half a step the ranks no longer agree,
    and only a new start helps."""

    def __init__(self, own: ModelRunner, group: LeaderGroup) -> None:
        self._own, self._group = own, group
        self.depth = own.depth
        self.is_batch_invariant = own.is_batch_invariant
        self.attention_backend = own.attention_backend

    def submit(self, batch: ForwardBatch) -> None:
        self._group.send_step(batch, logit_rows(batch))
        with _as_group_error():
            self._own.submit(batch)

    def collect(self) -> ForwardOutput:
        with _as_group_error():
            return self._own.collect()


@contextmanager
def _as_group_error() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise GroupError(f"the step failed on rank 0: {error}") from error
