"""The two services of the Dynamo-style manifests run from the catalogue with the machine's own programs."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.fakes.node_bed import NODE, NodeBed, eventually, node_bed

from baton.cluster.node import isolation

MANIFESTS = Path(__file__).parents[4] / "shared" / "manifests"
pytestmark = pytest.mark.e2e


@pytest.fixture(params=["bubblewrap", "plain"])
async def bed(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[NodeBed]:
    problem = isolation.probe()[1]
    if request.param == "bubblewrap" and problem is not None:
        pytest.skip(problem)
    async for one in node_bed(tmp_path / "home", request.param):
        yield one


def template(name: str) -> dict[str, Any]:
    path = MANIFESTS / f"{name}.yaml"
    if not path.exists():
        pytest.skip(f"no {path}")
    documents = list(yaml.safe_load_all(path.read_text()))
    found = next(one["spec"]["template"] for one in documents if one["kind"] in ("StatefulSet", "Deployment"))
    meta = {"name": f"{name}-0", "namespace": "default", "labels": found["metadata"]["labels"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {**found["spec"], "nodeName": NODE}}


@pytest.mark.parametrize(
    ("name", "program", "port", "path", "answer"),
    [("etcd", "etcd", 2379, "/health", b'"health":"true"'), ("nats", "nats-server", 8222, "/healthz", b'"ok"')],
)
async def test_it_answers_on_the_pods_address(
    bed: NodeBed, name: str, program: str, port: int, path: str, answer: bytes
) -> None:
    if shutil.which(program, path="/usr/sbin:/usr/bin:/usr/local/bin") is None:
        pytest.skip(f"{program} is not installed")
    await bed.create(template(name))
    address = (await bed.until_ready(f"{name}-0"))["podIP"]

    async def answers() -> bool:
        try:
            reader, writer = await asyncio.open_connection(address, port)
        except OSError:
            return False
        writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        said = await reader.read()
        writer.close()
        return answer in said

    await eventually(answers, 30)
    assert bed.container(f"{name}-0", name)["restartCount"] == 0
