"""How far a rolling update may go: a pure function of group states, step for step that of upstream's controller.

Two numbers steer an update. *partition*: groups from it on get the new revision; during an update it only falls.
*replicas*: how many groups there are now, more than wanted while surge groups help. The source of the algorithm is
`leaderworkerset_controller.go` of kubernetes-sigs/lws (rollingUpdateParameters); the test traces are its integration tests'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.api.lws import Spec
from baton.api.quantity import resolve_count

_MAX_STEPS = 8


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a rollout is. ``wanted`` is the number of groups the two others were computed for."""

    partition: int
    replicas: int
    wanted: int


@dataclass(frozen=True, slots=True)
class GroupState:
    """``ready``: all pods of the group are. ``updated``: all its pods are there and have the newest revision."""

    ready: bool
    updated: bool

    @property
    def done(self) -> bool:
        return self.ready and self.updated


@dataclass(frozen=True, slots=True)
class Limits:
    """``replicas`` groups are wanted; ``partition`` is the user's. ``surge <= replicas``."""

    replicas: int
    surge: int
    unavailable: int
    partition: int

    @classmethod
    def of(cls, spec: Spec) -> Limits:
        """From a valid spec. Where both bounds round to 0, one group at a time may be down."""
        update = spec.rollout_strategy.rolling_update_configuration
        surge = min(resolve_count(update.max_surge, spec.replicas, round_up=True), spec.replicas)
        unavailable = resolve_count(update.max_unavailable, spec.replicas, round_up=False)
        return cls(spec.replicas, surge, unavailable or int(not surge), update.partition)

    @property
    def burst(self) -> int:
        return self.replicas + self.surge

    def num_groups(self, num_unready: int) -> int:
        """How many groups there should be while ``num_unready`` of the wanted ones are not done: surge groups go
        as soon as what is left to do fits into the unavailable ones."""
        if num_unready > self.surge:
            return self.burst
        return self.replicas + max(0, num_unready - self.unavailable)


def advance(limits: Limits, before: Progress | None, is_new_revision: bool, states: Sequence[GroupState]) -> Progress:
    """Steps until nothing moves; ``states`` are those of groups 0.. (missing ones are neither ready nor updated)."""
    progress = step(limits, before, is_new_revision, states)
    for _ in range(_MAX_STEPS):
        further = step(limits, progress, False, states)
        if further == progress:
            break
        progress = further
    return progress


def step(limits: Limits, before: Progress | None, is_new_revision: bool, states: Sequence[GroupState]) -> Progress:
    """One step of the rollout. ``before`` None: there are no groups yet."""
    wanted = limits.replicas

    def result(partition: int, replicas: int) -> Progress:
        return Progress(max(partition, limits.partition), replicas, wanted)

    if before is None:
        return result(0, wanted)
    if is_new_revision:
        return result(min(wanted, before.replicas), wanted if before.replicas < wanted else limits.num_groups(wanted))
    if before.partition == 0 and before.replicas == wanted:
        return result(0, wanted)
    if before.replicas < wanted:
        return result(before.partition, wanted)
    num_unready = sum(index >= len(states) or not states[index].done for index in range(wanted))
    if before.wanted != wanted:  # scaled in the middle of an update
        return result(min(before.partition, limits.burst), limits.num_groups(num_unready))
    partition = min(_next_partition(limits, before, states), before.partition)
    return result(partition, limits.num_groups(num_unready))


def _next_partition(limits: Limits, before: Progress, states: Sequence[GroupState]) -> int:
    """The groups done without a gap from the last one down set the pace; groups that are not ready below use it up."""
    count = before.replicas
    present = [*states[:count], *[GroupState(False, False)] * (count - len(states))]
    num_done = next((number for number, state in enumerate(reversed(present)) if not state.done), count)
    pace = limits.unavailable + limits.surge - (limits.burst - count)
    base = max(0, count - num_done - pace)
    partition = base + sum(not state.ready for state in present[:base])
    for index in range(min(partition, count - 1), base - 1, -1):
        if present[index].ready and not present[index].updated:
            break
        partition = index
    return partition
