"""The memory of a KV pool can be shared by descriptor and never changes its size."""

import gc
import mmap
import os

import numpy as np
import pytest

from baton.kvcache.page_memory import PageMemory


def test_another_mapping_of_the_descriptor_sees_the_same_bytes() -> None:
    with PageMemory.create(3, 5000) as memory:
        assert memory.array.shape == (3, 5000)
        assert not memory.array.any()
        memory.array[2, 4999] = 17
        with mmap.mmap(memory.fd, 15_000) as other:
            assert other[14_999] == 17
            other[0] = 5
        assert memory.array[0, 0] == 5


def test_the_size_is_sealed() -> None:
    with PageMemory.create(2, 4096) as memory, pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 4096)


@pytest.mark.parametrize(("num_pages", "page_bytes"), [(0, 1), (1, 0), (-1, 5)])
def test_sizes_must_be_positive(num_pages: int, page_bytes: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PageMemory.create(num_pages, page_bytes)


def test_memory_outlives_close_for_those_who_still_look_at_it() -> None:
    memory = PageMemory.create(1, 4096)
    fd, view = memory.fd, memory.array[0]
    view[:] = 9
    memory.close()
    memory.close()
    gc.collect()
    assert (view == np.uint8(9)).all()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_nothing_is_taken_before_it_is_written() -> None:
    """A pool of 64 GiB of addresses costs no memory until pages are written."""
    with PageMemory.create(1 << 16, 1 << 20) as memory:
        memory.array[12_345] = 1
        assert os.fstat(memory.fd).st_blocks * 512 < 64 << 20
