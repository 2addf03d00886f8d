"""Carries out page copies between the device pool and the host tier.

Copies happen between two steps and are ordered with them: on a CPU they are plain memory copies, on a GPU they go into the stream
that also computes. They are not overlapped with the forward pass layer by layer (SGLang's LayerDoneCounter): a page is loaded
about a hundred times faster than it is computed (docs/tiers.md has the figures), so there is next to nothing to hide.
"""

import torch

from baton.kvcache.page_memory import PageMemory
from baton.kvcache.tiers import Copies


class PageCopier:
    """`device_pages`: the KV pool [num_pages, ...], contiguous. `host`: pages of at least as many bytes; the bytes behind a device
    page's own stay untouched."""

    def __init__(self, device_pages: torch.Tensor, host: PageMemory) -> None:
        self._device_pages = device_pages.view(device_pages.shape[0], -1).view(torch.uint8)
        page_bytes = self._device_pages.shape[1]
        if host.page_bytes < page_bytes:
            raise ValueError(f"host pages of {host.page_bytes} bytes do not hold device pages of {page_bytes}")
        self._host_pages = torch.from_numpy(host.array)[:, :page_bytes]
        self._pinned = pin(host) if device_pages.is_cuda else False

    def carry_out(self, copies: Copies) -> None:
        """First the saves, then the loads. Returns when they are done: host pages may be read and reused by the store's threads."""
        for device_page, host_page in copies.saves:
            self._host_pages[host_page].copy_(self._device_pages[device_page], non_blocking=self._pinned)
        for host_page, device_page in copies.loads:
            self._device_pages[device_page].copy_(self._host_pages[host_page], non_blocking=self._pinned)
        if self._pinned:
            torch.cuda.current_stream().synchronize()


def pin(host: PageMemory) -> bool:
    """Lock the host tier's memory for the GPU's copy engine; False where the driver refuses (copies are slower then)."""
    array = host.array
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    return bool(runtime.cudaHostRegister(array.ctypes.data, array.nbytes, 0) == 0)
