"""The ranks of one worker that have a KV pool each, as its transfer knows them. Ranks that share a pool are one."""

import secrets
from dataclasses import dataclass

from baton.transfer.base import PageLayout
from baton.transfer.config import TransferConfigError
from baton.transfer.pages import Pages
from baton.transfer.slices import Slice, slice_bytes, whole_slice


@dataclass(frozen=True, slots=True)
class WorkerRanks:
    rank: int
    """Ours."""
    slices: tuple[Slice, ...]
    """What each rank holds of a page."""
    worker: str
    """The same on all ranks, and on those of no other worker."""

    @classmethod
    def alone(cls, layout: PageLayout) -> "WorkerRanks":
        return cls(0, (whole_slice(layout),), secrets.token_hex(8))


def check_page_bytes(memory: Pages, layout: PageLayout, own: Slice) -> None:
    """Raises `TransferConfigError` for memory that does not hold `own` of each page."""
    if (wanted := slice_bytes(layout, own)) != memory.page_bytes:
        raise TransferConfigError(f"layout.page_bytes is {wanted}, the memory has {memory.page_bytes}")
