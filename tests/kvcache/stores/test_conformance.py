"""The stores that need no service, against `fakes.store_conformance`."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.fakes.dict_store import DictStore
from tests.fakes.store_conformance import CHECKS, OBJECT_BYTES, MakeStore

from baton.kvcache.stores.base import Store, StoreConfig
from baton.kvcache.stores.file import FileStore


def file_stores(path: Path) -> MakeStore:
    config = StoreConfig(object_bytes=OBJECT_BYTES, extra={"path": str(path), "capacity": "1mb"})
    return lambda: FileStore(config)


def dict_stores(path: Path) -> MakeStore:
    shared: dict[str, bytes] = {}

    def make() -> Store:
        return DictStore(StoreConfig(object_bytes=OBJECT_BYTES), shared)

    return make


@pytest.mark.parametrize("make", [file_stores, dict_stores])
@pytest.mark.parametrize("check", CHECKS)
def test_store(check: Callable[[MakeStore], None], make: Callable[[Path], MakeStore], tmp_path: Path) -> None:
    check(make(tmp_path))
