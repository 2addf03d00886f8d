"""The leader's runners: they tell the other ranks what comes, then compute this rank's own part with them."""

from collections.abc import Iterator
from contextlib import contextmanager

from baton.engine.batch import ForwardBatch, ForwardOutput
from baton.engine.distributed.control import GroupError
from baton.engine.distributed.group import LeaderGroup
from baton.engine.distributed.messages import EndStep
from baton.engine.distributed.pipeline import StagePart, stage_part
from baton.engine.load import LoadedModel
from baton.engine.runner import ModelRunner, Runner, logit_rows


def open_runner(model: LoadedModel, group: LeaderGroup) -> Runner:
    """What computes on all ranks of the group that this rank leads."""
    part = stage_part(model)
    return LeadingRunner(model.runner, group) if part is None else PipelineRunner(model.runner, part, group)


class LeadingRunner:
    """A `runner.Runner` over all ranks of a group without stages. `GroupError` for any failure: after half a step the ranks no
    longer agree, and only a new start helps."""

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


class PipelineRunner:
    """A `runner.Runner` over all stages: a step in flight in each of them. `GroupError` for any failure."""

    def __init__(self, own: ModelRunner, part: StagePart, group: LeaderGroup) -> None:
        self._own, self._part, self._group = own, part, group
        self.depth = part.stage.size
        self.is_batch_invariant = own.is_batch_invariant
        self.attention_backend = own.attention_backend

    def submit(self, batch: ForwardBatch) -> None:
        rows = logit_rows(batch)
        self._group.send_step(batch, rows)
        with _as_group_error():
            self._part.begin(batch, rows)

    def collect(self) -> ForwardOutput:
        self._group.send(EndStep(), self._group.topology.stage_ranks[1:])
        with _as_group_error():
            return self._own.draw(*self._part.end())


@contextmanager
def _as_group_error() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise GroupError(f"the step failed on rank 0: {error}") from error
