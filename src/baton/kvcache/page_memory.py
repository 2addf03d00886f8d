"""The bytes of a CPU worker's KV pool: one anonymous shared mapping that another process can map by its descriptor.

Owns the memory only. Who may use which page is the page pool's business; how pages travel is `transfer`'s. The engine
wraps `array` as a tensor, so a page is written by the model and read by a transfer without any copy in between.
"""

import contextlib
import fcntl
import mmap
import os
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

# Linux numbers; the fcntl module knows F_ADD_SEALS but not every build of it knows the names of the seals.
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW = 0x1, 0x2, 0x4


class PageMemory:
    """`num_pages` pages of `page_bytes` bytes. Zero until written; memory is taken from the system page by page as touched."""

    def __init__(self, fd: int, mapping: mmap.mmap, num_pages: int, page_bytes: int) -> None:
        self.fd = fd
        """Descriptor of the memory file, close-on-exec; valid until `close`."""
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.array: NDArray[np.uint8] = np.frombuffer(mapping, dtype=np.uint8).reshape(num_pages, page_bytes)
        """uint8 [num_pages, page_bytes], writable, C-contiguous."""
        self._mapping = mapping

    @classmethod
    def create(cls, num_pages: int, page_bytes: int) -> "PageMemory":
        """Raises ValueError for sizes below 1 and OSError when the system refuses the mapping."""
        if num_pages < 1 or page_bytes < 1:
            raise ValueError(f"num_pages and page_bytes must be at least 1, got {num_pages} and {page_bytes}")
        size = num_pages * page_bytes
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            # The size never changes again, so a peer that maps the file cannot be killed by SIGBUS after a truncation.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
            mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(fd)
            raise
        advise_huge_pages(mapping)
        return cls(fd, mapping, num_pages, page_bytes)

    @classmethod
    def attach(cls, fd: int, num_pages: int, page_bytes: int) -> "PageMemory":
        """The memory that another process created; takes `fd` over. Raises ValueError when it has another size."""
        size = num_pages * page_bytes
        try:
            if os.fstat(fd).st_size != size:
                raise ValueError(
                    f"page memory of {os.fstat(fd).st_size} bytes is not {num_pages} pages of {page_bytes}"
                )
            mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(fd)
            raise
        advise_huge_pages(mapping)
        return cls(fd, mapping, num_pages, page_bytes)

    def close(self) -> None:
        """Give the descriptor back; the mapping goes with the last array or tensor that still looks at it."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        del self.array
        # A tensor made from `array` may outlive us; then the mapping is unmapped when that tensor is collected.
        with contextlib.suppress(BufferError):
            self._mapping.close()

    def __enter__(self) -> "PageMemory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def advise_huge_pages(mapping: mmap.mmap) -> None:
    """Ask for huge pages. Fewer TLB misses when whole pages are copied; where the system does not allow it, no harm."""
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
