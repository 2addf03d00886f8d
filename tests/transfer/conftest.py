from collections.abc import Iterator

import pytest
from tests.fakes.transfer_pair import bootstrap_server


@pytest.fixture(scope="package")
def bootstrap_port() -> Iterator[int]:
    """One bootstrap server for all tests here: each prefill that opens replaces the entry of the one before."""
    with bootstrap_server() as port:
        yield port
