"""`baton operator` as a process's coroutine: leads, works, answers health, gives the lease back."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import typer
import yaml
from tests.controllers.builders import group, role
from tests.controllers.conftest import Bench
from tests.fakes.ports import free_port
from typer.testing import CliRunner

from baton.api.resources import LEASES, ROLE_BASED_GROUPS
from baton.cli.operator import operator
from baton.controllers.runner.operator import OperatorOptions, run_operator


async def get(port: int, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as answer:
        return answer.status, await answer.text()


async def test_the_operator_runs_groups_from_outside_and_releases_its_lease(bench: Bench) -> None:
    """The bench's own runner has the same controllers; here it plays the rest of the cluster, which does no harm."""
    port = free_port()
    options = OperatorOptions(listen_port=port, install_crds=True)
    work = asyncio.create_task(run_operator(bench.config, options))
    while not work.done():
        try:
            if (await get(port, "/readyz"))[0] == 200 and "baton_leader 1.0" in (await get(port, "/metrics"))[1]:
                break
        except aiohttp.ClientError:
            await asyncio.sleep(0)
    lease = await bench.client.get(LEASES, "baton-operator", "default")
    assert lease["spec"]["holderIdentity"].endswith(f"_{os.getpid()}")
    await bench.client.create(ROLE_BASED_GROUPS, group(role("a", 2)), "default")
    await bench.until(lambda: bench.is_settled("g"))
    assert (await get(port, "/healthz")) == (200, "ok\n")
    while 'baton_reconciles_total{controller="rolebasedgroup",outcome="ok"}' not in (await get(port, "/metrics"))[1]:
        await bench.runner_turn()
    os.kill(os.getpid(), signal.SIGTERM)
    await work
    lease = await bench.client.get(LEASES, "baton-operator", "default")
    assert lease["spec"]["holderIdentity"] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kubeconfig", "nowhere"], "nowhere: no such file"),
        (["--listen", "8081"], "--listen"),
        (["--log-level", "loud"], "--log-level"),
    ],
)
def test_bad_flags_are_named(arguments: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(operator)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code != 0
    assert message in result.output


def test_an_unusable_kubeconfig_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump({"current-context": "x"}))
    app = typer.Typer()
    app.command()(operator)
    result = CliRunner().invoke(app, ["--kubeconfig", str(path)])
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "no entry 'x' in contexts" in result.output
