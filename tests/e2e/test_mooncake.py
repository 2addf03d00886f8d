"""A real Mooncake whose store and master are restarted under a client: what was on its disk is there again."""

import signal
from pathlib import Path

import numpy as np
import pytest
from tests.fakes.mooncake_service import MooncakeService, needs_mooncake, until

from baton.kvcache.stores.base import StoreConfig, StoreError
from baton.kvcache.stores.mooncake import MooncakeStore

OBJECT_BYTES = 20_000
NUM_OBJECTS = 48


@needs_mooncake
def test_what_is_on_disk_survives_restarts_of_store_and_master(tmp_path: Path) -> None:
    service = MooncakeService(tmp_path)
    service.start_master()
    service.start_store()
    store = MooncakeStore(StoreConfig(object_bytes=OBJECT_BYTES, extra={"master_server_address": service.address}))
    memory = np.random.default_rng(4).integers(0, 256, (NUM_OBJECTS, OBJECT_BYTES), dtype=np.uint8)
    written = memory.copy()
    store.register(memory)
    names = [f"kept-{index}" for index in range(NUM_OBJECTS)]

    def all_read() -> bool:
        memory[:] = 0
        try:
            done = store.batch_get(names, list(memory))
        except StoreError:
            return False
        assert all((memory[index] == written[index]).all() for index, ok in enumerate(done) if ok), "never a wrong one"
        return all(done)

    try:
        assert all(store.batch_put(names, list(memory)))
        until(lambda: service.num_files() >= NUM_OBJECTS, "the objects are on disk")
        for name, number in (("store", signal.SIGTERM), ("store", signal.SIGKILL), ("master", signal.SIGKILL)):
            if name == "master":
                service.stop(name, number)
                with pytest.raises(StoreError):
                    store.batch_exists(names)
                with pytest.raises(StoreError, match="no master at"):
                    store.batch_put(names, list(memory))
                service.start_master()
            else:
                service.restart_store(number)
            until(all_read, f"everything is read again after the {name} was stopped")
        memory[:] = written[::-1]
        later = [f"later-{name}" for name in names]
        until(lambda: all(store.batch_put(later, list(memory))), "the store's memory is there again")
    finally:
        store.close()
        service.close()
