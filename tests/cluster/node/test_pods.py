"""Pods as real processes, in both isolations: what a user of kubectl would see."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.fakes.node_bed import NodeBed, node_bed, pod

from baton.cluster.node import isolation

_PROGRAM, _PROBLEM = isolation.probe()


@pytest.fixture(params=["bubblewrap", "plain"])
async def bed(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[NodeBed]:
    if request.param == "bubblewrap" and _PROBLEM is not None:
        pytest.skip(_PROBLEM)
    async for one in node_bed(tmp_path / "home", request.param):
        yield one


async def test_a_command_that_ends_well_leaves_a_succeeded_pod(bed: NodeBed) -> None:
    await bed.create(pod("once", "sh", "-c", "echo hello; exit 0", restartPolicy="Never"))
    await bed.until_phase("once", "Succeeded")
    assert bed.container("once")["state"]["terminated"]["reason"] == "Completed"
    assert await bed.log("once") == "hello\n"
    reasons = [reason for reason, _ in bed.api.events()]
    assert [one for one in reasons if one in ("Pulled", "Created", "Started")] == ["Pulled", "Created", "Started"]
