"""The contract of the tiers below the device pool: what a cache with tiers asks of the rank's loop, and what it hears back.

Three tiers: device (L1, the pool the model writes), host (L2, whole pages in host memory), store (L3, outside this process).
The cache decides and keeps the books (`tiered_cache`); the loop carries out `Copies` between device and host, and a
`stores.worker` carries out `StoreAction`s on its own threads and answers with `StoreEvent`s. No clock, no I/O here.

Ownership of a host page: the cache's, except between an action that names it and that operation's last event, when it is the
worker's. Every operation gets exactly one last event, also after `Cancel` and when the store is broken; while a call into the
store hangs, it has that operation's pages in its hands, and `Late` is all there is to say.
"""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Copies:
    """Page copies to carry out before the next step: first every save, then every load. In this order a device page that was
    evicted is saved before anything overwrites it, and a host page is read after it was written. Saves are done when their
    `Write`s are given out, loads (a GPU may overlap them with the step) at the latest when the next copies are asked for."""

    saves: list[tuple[int, int]] = field(default_factory=list)
    """(device page, host page)"""
    loads: list[tuple[int, int]] = field(default_factory=list)
    """(host page, device page)"""

    def __bool__(self) -> bool:
        return bool(self.saves or self.loads)


@dataclass(frozen=True, slots=True)
class Query:
    """How many of `keys`, from the first on, does the store have? Answered by `Found`."""

    op: int
    keys: list[bytes]


@dataclass(frozen=True, slots=True)
class Read:
    """Fill host page i with the object of key i, in order. Answered by `PagesRead` after each batch; the one with `is_last`
    ends the operation."""

    op: int
    keys: list[bytes]
    host_pages: list[int]


@dataclass(frozen=True, slots=True)
class Write:
    """Put host page i under key i. Its contents are valid once the `Copies` of the same pass were carried out. Answered by
    `Written`."""

    op: int
    keys: list[bytes]
    host_pages: list[int]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop operation `op` where that saves work. Its last event still comes."""

    op: int


StoreAction = Query | Read | Write | Cancel


@dataclass(frozen=True, slots=True)
class Found:
    op: int
    num_pages: int
    """0 also when the store is down."""


@dataclass(frozen=True, slots=True)
class PagesRead:
    """Pages first, first + 1, ... of the operation were tried. A page that is not ok (absent, late, damaged, foreign) has
    undefined contents."""

    op: int
    first: int
    ok: list[bool]
    is_last: bool


@dataclass(frozen=True, slots=True)
class Written:
    op: int
    ok: list[bool]


@dataclass(frozen=True, slots=True)
class Late:
    """The store hangs over query or read `op`: nobody should wait for it. Its last event is still to come, perhaps never."""

    op: int


StoreEvent = Found | PagesRead | Written | Late
