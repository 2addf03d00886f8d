"""Pages survive the way from the device to host memory and back, byte for byte, and nothing beside them changes."""

import numpy as np
import pytest
import torch

from baton.engine.page_copies import PageCopier
from baton.kvcache.page_memory import PageMemory
from baton.kvcache.tiers import Copies

SEAL = 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_pages_come_back(dtype: torch.dtype) -> None:
    pool = torch.randn(6, 2, 2, 3, 4, 8).to(dtype)
    page_bytes = pool[0].numel() * dtype.itemsize
    with PageMemory.create(9, page_bytes + SEAL) as host:
        host.array[:] = 7
        copier = PageCopier(pool, host)
        before = pool.clone()
        # Page 1 is saved before page 4 overwrites it; page 8 is written and read in one go.
        copier.carry_out(Copies(saves=[(1, 8), (4, 0)], loads=[(0, 1), (8, 5)]))
        assert torch.equal(pool[1], before[4])
        assert torch.equal(pool[5], before[1])
        assert torch.equal(pool[[0, 2, 3, 4]], before[[0, 2, 3, 4]])
        assert np.all(host.array[:, page_bytes:] == 7), "the seal is the store's"
        assert np.all(host.array[1:8] == 7)


def test_host_pages_that_are_too_small_are_refused() -> None:
    with PageMemory.create(1, 10) as host, pytest.raises(ValueError, match="host pages of 10 bytes"):
        PageCopier(torch.zeros(2, 4, 8), host)
