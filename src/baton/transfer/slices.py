"""Which part of every page a rank holds, and who sends which part of it to whom when workers are cut differently.

A page is (L, 2, K, S, D). A worker's ranks share it out: each holds a `Slice`, a range of layers of a range of kv heads; ranks that
share one pool are one rank here, with all of it. Plain arithmetic: both sides of a hand-over and their tests call `plan_links`.
Legend: L layers, K kv heads, H the bytes of one head of one layer's keys in a page (S tokens, D values each).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from baton.transfer.base import PageLayout
from baton.transfer.errors import TransferError

Range = tuple[int, int]
"""First and one-behind-last."""


class Slice(msgspec.Struct, frozen=True):
    layers: Range
    kv_heads: Range

    @property
    def is_empty(self) -> bool:
        return self.layers[0] >= self.layers[1] or self.kv_heads[0] >= self.kv_heads[1]

    @property
    def num_cells(self) -> int:
        """(layer, head) pairs."""
        return 0 if self.is_empty else (self.layers[1] - self.layers[0]) * (self.kv_heads[1] - self.kv_heads[0])

    def overlap(self, other: "Slice") -> "Slice":
        return Slice(_overlap(self.layers, other.layers), _overlap(self.kv_heads, other.kv_heads))


NOTHING = Slice((0, 0), (0, 0))


def whole_slice(layout: PageLayout) -> Slice:
    return Slice((0, layout.num_layers), (0, layout.num_kv_heads))


def slice_bytes(layout: PageLayout, part: Slice) -> int:
    """Bytes of a page that `part` takes."""
    return 2 * part.num_cells * _head_bytes(layout)


def part_of_pages(pages: NDArray[np.uint8], layout: PageLayout, owner: Slice, part: Slice) -> NDArray[np.uint8]:
    """`part` of every page of a pool whose pages hold `owner`: a view [num_pages, l, 2, k, H] of `pages` [num_pages, page_bytes].

    Raises ValueError where the owner does not have the part or the pages are of another size."""
    if owner.overlap(part) != part:
        raise ValueError(f"{part} is not within {owner}")
    (first_layer, end_layer), (first_head, end_head) = owner.layers, owner.kv_heads
    shape = (len(pages), end_layer - first_layer, 2, end_head - first_head, _head_bytes(layout))
    layers = slice(part.layers[0] - first_layer, part.layers[1] - first_layer)
    heads = slice(part.kv_heads[0] - first_head, part.kv_heads[1] - first_head)
    return pages.reshape(shape)[:, layers, :, heads]


@dataclass(frozen=True, slots=True)
class Link:
    """Rank `source` sends `part` of every page to rank `target`."""

    source: int
    target: int
    part: Slice


def plan_links(sources: Sequence[Slice], targets: Sequence[Slice]) -> list[Link]:
    """Who sends what so that every target has its slice, each byte of it from one source; ordered by target, then source.

    Replicas (ranks with equal slices) share the work to within a layer. Every source has a link, and 0 and 0 have one, if need be of
    `NOTHING`: each source is told of every room, and the first token travels between the leading ranks.
    """
    links = [
        link for holders in _replicas(sources) for takers in _replicas(targets)
        for link in _share(sources[holders[0]].overlap(targets[takers[0]]), holders, takers)
    ]  # fmt: skip
    linked = {(link.source, link.target) for link in links}
    sending = {link.source for link in links}
    idle = {(source, 0) for source in range(len(sources)) if source not in sending} | {(0, 0)}
    links += [Link(source, target, NOTHING) for source, target in idle - linked]
    return sorted(links, key=lambda link: (link.target, link.source))


def check_whole(slices: Sequence[Slice], layout: PageLayout) -> None:
    """Raises `TransferError` where the slices of a worker's ranks, replicas aside, are not exactly one page."""
    distinct = [one for one in set(slices) if not one.is_empty]
    within = whole_slice(layout)
    fits = all(one.overlap(within) == one for one in distinct)
    apart = all(one.overlap(other).is_empty for one in distinct for other in distinct if one is not other)
    if not fits or not apart or sum(one.num_cells for one in distinct) != within.num_cells:
        raise TransferError(
            f"the ranks do not hold {layout.num_layers} layers of {layout.num_kv_heads} kv heads between them: "
            + ", ".join(f"layers {one.layers} heads {one.kv_heads}" for one in slices)
        )


def _share(both: Slice, holders: list[int], takers: list[int]) -> list[Link]:
    """`both`: what holders and takers have in common. The layers of all takers, one taker after the other, are dealt out evenly."""
    (start, end), links = both.layers, []
    count = 0 if both.is_empty else end - start
    total = count * len(takers)
    for place, source in enumerate(holders):
        begins, ends = place * total // len(holders), (place + 1) * total // len(holders)
        for number, target in enumerate(takers):
            behind = start - number * count
            layers = _overlap((begins + behind, ends + behind), both.layers)
            if layers[0] < layers[1]:
                links.append(Link(source, target, Slice(layers, both.kv_heads)))
    return links


def _replicas(slices: Sequence[Slice]) -> list[list[int]]:
    """Ranks with equal slices, together."""
    groups: dict[Slice, list[int]] = {}
    for rank, one in enumerate(slices):
        groups.setdefault(one, []).append(rank)
    return list(groups.values())


def _overlap(one: Range, other: Range) -> Range:
    first = max(one[0], other[0])
    return first, max(first, min(one[1], other[1]))


def _head_bytes(layout: PageLayout) -> int:
    return layout.page_bytes // (2 * layout.num_layers * layout.num_kv_heads)
