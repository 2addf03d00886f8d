"""The rollout algorithm: upstream's own traces and vectors, and what must hold of any step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.controllers.builders import leader_worker_set

from baton.api import lws
from baton.controllers.lws.rollout import GroupState, Limits, Progress, advance, step

TRACES: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "rollouts.yaml").read_text())
ABSENT = GroupState(ready=False, updated=False)


class Rollout:
    """Groups that do nothing but what the trace says, as in upstream's tests (leaders are not really made again)."""

    def __init__(self, trace: dict[str, Any]) -> None:
        self.trace = trace
        self.groups, self.partition = trace["groups"], trace.get("partition", 0)
        self.progress = advance(self.limits, None, False, [])
        self.states = [GroupState(True, True)] * self.groups

    @property
    def limits(self) -> Limits:
        surge = min(self.trace.get("surge", 0), self.groups)
        return Limits(self.groups, surge, self.trace.get("unavailable", 1), self.partition)

    def do(self, action: Any) -> None:
        is_new = False
        for verb, value in ({action: {}} if isinstance(action, str) else action).items():
            if verb == "update":
                is_new = True
                self.groups = value.get("groups", self.groups)
                self.states = [GroupState(state.ready, False) for state in self.states]
            elif verb in ("groups", "partition"):
                setattr(self, verb, value)
            else:
                for index in range(len(self.states)) if value == "all" else value:
                    self.states[index] = GroupState(verb == "done", verb == "done" or self.states[index].updated)
        self.advance(is_new)
        if action == {"done": "all"} and len(self.states) > self.groups:
            self.do({"done": "all"})  # groups that came with this step

    def advance(self, is_new: bool) -> None:
        self.progress = advance(self.limits, self.progress, is_new, self.states)
        count = self.progress.replicas
        self.states = [*self.states[:count], *[ABSENT] * (count - len(self.states))]

    @property
    def counts(self) -> list[int]:
        return [sum(state.ready for state in self.states), sum(state.updated for state in self.states)]


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: f"line {trace['line']}")
def test_upstream_trace(trace: dict[str, Any]) -> None:
    rollout = Rollout(trace)
    for number, expected in enumerate(trace["steps"]):
        rollout.do(expected["do"])
        where = f"step {number}: {expected['do']}"
        assert [rollout.progress.replicas, rollout.progress.partition] == expected["then"], where
        assert rollout.counts == expected.get("counts", rollout.counts), where


@pytest.mark.parametrize(
    ("groups", "surge", "unavailable", "unready", "expected"),
    [(1, 1, 0, 1, 2), (4, 2, 1, 2, 5), (2, 2, 1, 2, 3), (1, 1, 0, 0, 1), (1, 1, 1, 1, 1), (3, 0, 0, 1, 3)],
)
def test_upstream_vectors_of_how_many_groups(
    groups: int, surge: int, unavailable: int, unready: int, expected: int
) -> None:
    assert Limits(groups, surge, unavailable, 0).num_groups(unready) == expected


@pytest.mark.parametrize(
    ("limits", "before", "is_new", "expected"),
    [
        (Limits(3, 1, 0, 0), Progress(0, 2, 3), False, (0, 3)),
        (Limits(3, 1, 0, 0), Progress(0, 2, 2), True, (2, 3)),
        (Limits(2, 2, 1, 0), Progress(0, 2, 2), True, (2, 3)),
        (Limits(3, 0, 1, 5), None, False, (5, 3)),
        (Limits(0, 0, 1, 0), Progress(0, 3, 3), False, (0, 0)),
    ],
)
def test_upstream_vectors_of_one_step(
    limits: Limits, before: Progress | None, is_new: bool, expected: tuple[int, int]
) -> None:
    found = step(limits, before, is_new, [GroupState(True, not is_new)] * 3)
    assert (found.partition, found.replicas) == expected


def test_a_group_in_the_middle_that_is_done_already_does_not_stop_an_update() -> None:
    old, broken, done, starting = (
        GroupState(*each) for each in ((True, False), (False, False), (True, True), (False, True))
    )
    found = step(Limits(4, 0, 2, 0), Progress(4, 4, 4), False, [old, broken, done, starting])
    assert found.partition == 2


@pytest.mark.parametrize(
    ("rolling", "replicas", "expected"),
    [
        ({}, 4, Limits(4, 0, 1, 0)),
        ({"maxUnavailable": "30%", "maxSurge": "30%"}, 4, Limits(4, 2, 1, 0)),
        ({"maxUnavailable": 9, "maxSurge": 9, "partition": 9}, 2, Limits(2, 2, 9, 9)),
        ({"maxUnavailable": "10%"}, 4, Limits(4, 0, 1, 0)),  # rounds to 0, and 0 would stand still
    ],
)
def test_bounds_are_rounded_down_and_up(rolling: dict[str, Any], replicas: int, expected: Limits) -> None:
    assert Limits.of(lws.LeaderWorkerSet.parse(leader_worker_set(replicas, rolling=rolling)).spec) == expected


states = st.lists(st.builds(GroupState, st.booleans(), st.booleans()), max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    limits=st.builds(
        Limits, st.integers(0, 6), st.integers(0, 3), st.integers(0, 3), st.sampled_from([0, 0, 2, 9])
    ).filter(lambda found: found.surge <= found.replicas and (found.surge or found.unavailable)),
    partition=st.integers(0, 8),
    replicas=st.integers(0, 9),
    found=states,
)
def test_the_partition_never_grows_and_groups_stay_within_the_surge(
    limits: Limits, partition: int, replicas: int, found: list[GroupState]
) -> None:
    after = advance(limits, Progress(partition, replicas, limits.replicas), False, found)
    assert after.partition <= max(partition, limits.partition)
    assert limits.replicas <= after.replicas <= limits.burst or after.replicas == replicas == limits.replicas
    assert advance(limits, after, False, found) == after, "advancing again changes nothing"
