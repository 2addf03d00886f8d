"""What an ideal cache would make of a workload: pages in LRU pools, request by request, exactly. An oracle for benchmarks.

Tiers are inclusive: each sees every use of every page and keeps what fits, as write-through tiers do that share one order
of use. Within a prefix the end goes first, since a page is worth nothing without those before it. Requests come one after
the other; what a real engine holds for several at once is not modelled. No I/O, no clock.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

UNBOUNDED = None


@dataclass(frozen=True, slots=True)
class Use:
    """One request. `pages`: keys of the whole pages of its prompt and answer, each key standing for all tokens up to its
    page's end."""

    pages: Sequence[int]
    prompt_len: int
    kv_len: int
    """Tokens whose KV exists at the end: prompt and answer without the answer's last token."""


class PageNames:
    """Numbers for prefixes of whole pages: equal prefixes get equal numbers."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._numbers: dict[tuple[int, tuple[int, ...]], int] = {}

    def of(self, token_ids: Sequence[int]) -> list[int]:
        names: list[int] = []
        for start in range(0, len(token_ids) - self.page_size + 1, self.page_size):
            page = (names[-1] if names else -1, tuple(token_ids[start : start + self.page_size]))
            names.append(self._numbers.setdefault(page, len(self._numbers)))
        return names

    def use(self, token_ids: Sequence[int], prompt_len: int) -> Use:
        """`token_ids`: prompt and answer."""
        kv_len = max(prompt_len, len(token_ids) - 1)
        return Use(self.of(token_ids[:kv_len]), prompt_len, kv_len)


class LruPool:
    """One tier of at most `capacity` pages (`UNBOUNDED`: all)."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        # Next to go first. A prefix is moved here end first, so an end always goes before what it stands on.
        self._pages: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def match(self, pages: Sequence[int]) -> int:
        """Pages at the start of `pages` that are here; they count as used now."""
        found = next((index for index, page in enumerate(pages) if page not in self._pages), len(pages))
        self._touch(pages[:found])
        return found

    def insert(self, pages: Sequence[int], num_taken: int | None = None) -> None:
        """Keep `pages`, which were `match`ed just before, so that what there is of them goes last. `num_taken`: pages that
        must be free for that, by default those that are not here."""
        if self.capacity is not None:
            if num_taken is None:
                num_taken = sum(page not in self._pages for page in pages)
            self._shrink(self.capacity - num_taken)
        self._touch(pages)
        if self.capacity is not None:
            self._shrink(self.capacity)

    def _shrink(self, limit: int) -> None:
        while len(self._pages) > max(0, limit):
            self._pages.popitem(last=False)

    def _touch(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):
            self._pages[page] = None
            self._pages.move_to_end(page)


def simulate(uses: Iterable[Use], capacities: Sequence[int | None], page_size: int) -> list[list[int]]:
    """For each request the tokens that come from each tier, fastest tier first; a page counts for the first that has it.

    At least one token of a prompt is always computed. A pool too small for one request alone keeps what fits of it.
    """
    pools = [LruPool(capacity) for capacity in capacities]
    results: list[list[int]] = []
    for use in uses:
        wanted = use.pages[: (use.prompt_len - 1) // page_size]
        found = [pool.match(wanted) for pool in pools]
        reached = [0, *accumulate(found, max)]
        tokens = [(after - before) * page_size for before, after in pairwise(reached)]
        for index, pool in enumerate(pools):
            # While a request runs, the model's own tier holds all it did not find there twice, and a page that is not full.
            pool.insert(use.pages, -(-use.kv_len // page_size) - found[0] if index == 0 else None)
        results.append(tokens)
    return results


def hit_rate(uses: Sequence[Use], tokens: Sequence[Sequence[int]]) -> float:
    """Cached by prompt tokens, over all requests and tiers."""
    return sum(map(sum, tokens)) / max(1, sum(use.prompt_len for use in uses))
