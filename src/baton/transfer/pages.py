"""A pool of pages as the transfer sees it, and the two things done to a page off the event loop: sum it, copy it. Which part of it: `slices`.

xxh3 (64 bit) guards every page from the prefill's memory to the decode's. It is no defence against a forger (who could
send a valid sum), but finds damage, a torn page, or a source page that was reused too early.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray


class Pages(Protocol):
    """`kvcache.page_memory.PageMemory` is one."""

    num_pages: int
    page_bytes: int
    fd: int
    array: NDArray[np.uint8]
    """[num_pages, page_bytes], C-contiguous."""


Stopped = Callable[[], bool]
"""True as soon as the room has been given up: checked before each page, so work stops within one page."""


def checksum(page: NDArray[np.uint8], scratch: NDArray[np.uint8] | None = None) -> int:
    """Of the bytes of `page` in order, whatever its shape. A part that lies scattered is gathered first: into `scratch`, uint8
    [part_bytes], where it is given (fresh memory for each page would cost more than the gathering)."""
    return int(xxhash.xxh3_64_intdigest(_packed(page, scratch).data))


def scratch_for(pages: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """To gather pages of `pages` [num_pages, ...] in, one after the other; None: each lies in one piece."""
    return None if pages[0].flags.c_contiguous else np.empty(pages[0].size, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class SummedPage:
    checksum: int
    body: NDArray[np.uint8]
    """uint8 [part_bytes]: the page's own memory, or a gathered copy where the part lies scattered in it."""


def checksum_pages(pages: NDArray[np.uint8], page_ids: Sequence[int], stopped: Stopped) -> list[int] | None:
    """Sums of `page_ids` of `pages` [num_pages, ...] in order; None when stopped on the way."""
    scratch, sums = scratch_for(pages), []
    for page_id in page_ids:
        if stopped():
            return None
        sums.append(checksum(pages[page_id], scratch))
    return sums


def sum_pages(pages: NDArray[np.uint8], page_ids: Sequence[int], stopped: Stopped) -> list[SummedPage] | None:
    """As `checksum_pages`, with what is to be sent."""
    summed = []
    for page_id in page_ids:
        if stopped():
            return None
        body = _packed(pages[page_id], None)
        summed.append(SummedPage(checksum(body), body))
    return summed


def _packed(page: NDArray[np.uint8], scratch: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    """uint8 [part_bytes]"""
    if page.flags.c_contiguous:
        return page.reshape(-1)
    packed = np.empty(page.size, dtype=np.uint8) if scratch is None else scratch
    np.copyto(packed.reshape(page.shape), page)
    return packed


def copy_pages(
    source: NDArray[np.uint8],
    source_ids: Sequence[int],
    target: NDArray[np.uint8],
    target_ids: Sequence[int],
    checksums: Sequence[int],
    stopped: Stopped,
) -> bool:
    """Copy page by page and verify what arrived; False at the first page that is not what its sum says. Both are [num_pages, ...]
    with pages of the same shape."""
    scratch = scratch_for(target)
    for source_id, target_id, expected in zip(source_ids, target_ids, checksums, strict=True):
        if stopped():
            return True
        page = target[target_id]
        # copyto lets other threads run while it copies; the page is still in this core's cache when it is summed.
        np.copyto(page, source[source_id])
        if checksum(page, scratch) != expected:
            return False
    return True
