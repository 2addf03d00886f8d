"""Fixtures of the end-to-end tests: the demo model, an aggregated worker, and a 2P1D service, one each per session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.service import Process, Service, running

from baton.engine.weights.demo import prepare_demo_model

GUARD_S = 600
"""Ends a test that hangs; none comes near it, even on a machine several times slower."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/e2e/" in str(item.path):
            item.add_marker(pytest.mark.e2e)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(GUARD_S))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return prepare_demo_model()


@pytest.fixture(scope="session")
def aggregated(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with running(demo_model, tmp_path_factory.mktemp("aggregated")) as service:
        worker = service.worker("worker")
        service.wait_ready()
        yield worker


@pytest.fixture(scope="session")
def disaggregated(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(demo_model, tmp_path_factory.mktemp("disaggregated")) as service:
        service.worker("prefill-0", "prefill")
        service.worker("prefill-1", "prefill")
        service.worker("decode-0", "decode")
        service.wait_ready()
        service.router()
        service.wait_ready()
        yield service
