"""The prefix tree: which pages hold the KV of which token prefix.

Owns tree nodes, their lock counts and the order of eviction. It moves page ids about but frees none itself: `evict`,
`insert` and `reset` return the pages that the caller now owns (`prefix_cache` puts them into the pool). Prefixes are
page-aligned: a page is shared only when all its tokens, and all tokens before it, are the same.

Matching costs O(matched tokens) in C-speed slice comparisons; eviction costs O(log nodes) per leaf. Time is a logical
counter, so that the same calls always evict the same pages.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

EvictionPolicy = Literal["lru", "lfu"]
EVICTION_POLICIES: tuple[EvictionPolicy, ...] = ("lru", "lfu")

# How a parent finds a child: by the tokens of the child's first page, below the root together with the extra key, which
# keeps tenants apart from their first page on.
_Edge = tuple[str | None, tuple[int, ...]] | tuple[int, ...]


class Node:
    """A run of whole pages behind its parent's. Invariant: len(key) == len(pages) * page_size, > 0 except for the root;
    a locked node's ancestors are locked."""

    __slots__ = ("children", "edge", "hit_count", "key", "last_access", "lock_count", "pages", "parent", "queued")

    def __init__(self, parent: "Node | None", edge: _Edge, key: list[int], pages: list[int]) -> None:
        self.parent = parent
        """None for the root, and for a node that was evicted."""
        self.edge = edge
        self.key = key
        self.pages = pages
        self.children: dict[_Edge, Node] = {}
        self.lock_count = 0
        self.last_access = 0
        self.hit_count = 0
        self.queued = False
        """An entry of the eviction heap points here; the entry may be out of date, `evict` finds out."""


class PrefixHandle:
    """A lock on the first `num_pages` pages of a prefix: while it lives, they are neither evicted nor replaced."""

    __slots__ = ("extra_key", "node", "num_pages")

    def __init__(self, node: Node, num_pages: int, extra_key: str | None) -> None:
        self.node = node
        self.num_pages = num_pages
        self.extra_key = extra_key


class Match(NamedTuple):
    node: Node
    pages: list[int]


class Inserted(NamedTuple):
    node: Node
    """The node that ends the inserted prefix."""
    pages: list[int]
    """The tree's pages for the whole prefix; where they differ from the caller's, the caller's is in `duplicates`."""
    duplicates: list[int]
    """Pages of the caller that the tree did not take, since it had the same tokens already. The caller frees them."""


class RadixTree:
    def __init__(self, page_size: int, policy: EvictionPolicy = "lru") -> None:
        if page_size <= 0:
            raise ValueError(f"page_size must be positive, got {page_size}")
        if policy not in EVICTION_POLICIES:
            raise ValueError(f"eviction policy must be one of {', '.join(EVICTION_POLICIES)}, got {policy!r}")
        self.page_size = page_size
        self.policy = policy
        self.root = Node(None, (), [], [])
        self.handles: set[PrefixHandle] = set()
        # Invariant: num_evictable + num_protected == pages of all nodes; protected are those with lock_count > 0.
        self.num_evictable = 0
        self.num_protected = 0
        self._clock = 0
        self._next_entry = 0
        # Invariant: every unlocked leaf has exactly one entry (queued), whose priority is at most the node's current one.
        self._heap: list[tuple[int, int, int, Node]] = []

    def match_len(self, token_ids: list[int], extra_key: str | None, max_tokens: int) -> int:
        """Tokens of the longest cached prefix, at most `max_tokens`. Changes nothing, not even access times."""
        return self.find(token_ids, extra_key, max_tokens)[0]

    def find(self, token_ids: list[int], extra_key: str | None, max_tokens: int) -> tuple[int, int | None]:
        """As `match_len`, and the page that ends the prefix (None: there is none)."""
        node, num_tokens, last_page = self.root, 0, None
        while True:
            child = self._child(node, token_ids, num_tokens, extra_key, max_tokens)
            if child is None:
                return num_tokens, last_page
            common = self._common_pages(child, token_ids, num_tokens, max_tokens)
            num_tokens += common * self.page_size
            last_page = child.pages[common - 1]
            if common < len(child.pages):
                return num_tokens, last_page
            node = child

    def match(self, token_ids: list[int], extra_key: str | None, max_tokens: int) -> Match:
        """The longest cached prefix of whole pages, at most `max_tokens` tokens. A match that ends inside a node splits
        it; every node on the way counts as used now."""
        pages: list[int] = []
        node, num_tokens = self.root, 0
        self._clock += 1
        while True:
            child = self._child(node, token_ids, num_tokens, extra_key, max_tokens)
            if child is None:
                return Match(node, pages)
            common = self._common_pages(child, token_ids, num_tokens, max_tokens)
            if common < len(child.pages):
                child = self._split(child, common)
            child.last_access = self._clock
            child.hit_count += 1
            pages += child.pages
            num_tokens += common * self.page_size
            node = child

    def insert(self, token_ids: list[int], pages: Sequence[int], extra_key: str | None) -> Inserted:
        """Hand over `pages`, which hold the KV of the first len(pages) * page_size of `token_ids`."""
        size = len(pages) * self.page_size
        assert size <= len(token_ids), f"{len(pages)} pages need {size} tokens, got {len(token_ids)}"
        node, present = self.match(token_ids, extra_key, size)
        start = len(present)
        duplicates = [mine for mine, theirs in zip(pages, present, strict=False) if mine != theirs]
        if start < len(pages):
            first = start * self.page_size
            edge = self._edge(node, token_ids, first, extra_key)
            leaf = Node(node, edge, list(token_ids[first:size]), list(pages[start:]))
            leaf.last_access = self._clock
            node.children[edge] = leaf
            self.num_evictable += len(leaf.pages)
            self._queue_if_evictable(leaf)
            present += leaf.pages
            node = leaf
        return Inserted(node, present, duplicates)

    def lock(self, node: Node, num_pages: int, extra_key: str | None) -> PrefixHandle:
        """Protect everything from the root to the end of `node` until `unlock`."""
        handle = PrefixHandle(node, num_pages, extra_key)
        self.handles.add(handle)
        while node.parent is not None:
            if node.lock_count == 0:
                self.num_evictable -= len(node.pages)
                self.num_protected += len(node.pages)
            node.lock_count += 1
            node = node.parent
        return handle

    def unlock(self, handle: PrefixHandle) -> None:
        """End a lock. Once only: a handle that is not live is our bug (AssertionError)."""
        assert handle in self.handles, "prefix handle unlocked twice, or of another tree"
        self.handles.remove(handle)
        node = handle.node
        while node.parent is not None:
            node.lock_count -= 1
            if node.lock_count == 0:
                self.num_protected -= len(node.pages)
                self.num_evictable += len(node.pages)
                self._queue_if_evictable(node)
            node = node.parent

    def evict(self, num_pages: int) -> list[int]:
        """Remove up to `num_pages` pages that nobody has locked, least valuable leaves first and each from its end, and
        return them. Fewer only if the tree has fewer evictable pages."""
        freed: list[int] = []
        while len(freed) < num_pages and self._heap:
            used, accessed, _, node = heapq.heappop(self._heap)
            node.queued = False
            if node.parent is None or node.children or node.lock_count:
                continue  # evicted, no leaf any more, or locked: whoever changes that queues it again
            if (used, accessed) != self._priority(node):
                self._queue_if_evictable(node)
                continue
            kept = max(0, len(node.pages) - (num_pages - len(freed)))
            freed += node.pages[kept:]
            self.num_evictable -= len(node.pages) - kept
            if kept:
                del node.pages[kept:]
                del node.key[kept * self.page_size :]
                self._queue_if_evictable(node)
                break
            parent, node.parent = node.parent, None
            del parent.children[node.edge]
            self._queue_if_evictable(parent)
        return freed

    def reset(self) -> list[int]:
        """Forget everything and return all pages. Live handles are our bug (AssertionError)."""
        assert not self.handles, f"{len(self.handles)} prefix handles are still live"
        pages = [page for node in self.nodes() for page in node.pages]
        self.root = Node(None, (), [], [])
        self._heap.clear()
        self.num_evictable = 0
        return pages

    def nodes(self) -> Iterator[Node]:
        """Every node but the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            yield node

    def _edge(self, node: Node, token_ids: list[int], start: int, extra_key: str | None) -> _Edge:
        page = tuple(token_ids[start : start + self.page_size])
        return (extra_key, page) if node is self.root else page

    def _child(
        self, node: Node, token_ids: list[int], start: int, extra_key: str | None, max_tokens: int
    ) -> Node | None:
        if start + self.page_size > min(max_tokens, len(token_ids)):
            return None
        return node.children.get(self._edge(node, token_ids, start, extra_key))

    def _common_pages(self, node: Node, token_ids: list[int], start: int, max_tokens: int) -> int:
        """Pages at the start of `node` (at least 1: its edge matched) whose tokens are token_ids[start:]."""
        size = self.page_size
        limit = min(len(node.pages), (min(max_tokens, len(token_ids)) - start) // size)
        key = node.key
        if key[: limit * size] == token_ids[start : start + limit * size]:
            return limit
        low, high = 1, limit - 1  # the first `low` pages are equal, the first `high` + 1 are not
        while low < high:
            middle = (low + high + 1) // 2
            if key[low * size : middle * size] == token_ids[start + low * size : start + middle * size]:
                low = middle
            else:
                high = middle - 1
        return low

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cut `node` after `num_pages` pages; return the new upper half. Handles point at the lower half and still cover
        the whole, so both halves have the same lock count."""
        parent = node.parent
        assert parent is not None
        size = num_pages * self.page_size
        head = Node(parent, node.edge, node.key[:size], node.pages[:num_pages])
        head.lock_count, head.last_access, head.hit_count = node.lock_count, node.last_access, node.hit_count
        parent.children[node.edge] = head
        node.edge = tuple(node.key[size : size + self.page_size])
        node.key, node.pages, node.parent = node.key[size:], node.pages[num_pages:], head
        head.children[node.edge] = node
        return head

    def _priority(self, node: Node) -> tuple[int, int]:
        return (0 if self.policy == "lru" else node.hit_count, node.last_access)

    def _queue_if_evictable(self, node: Node) -> None:
        if node.queued or node.children or node.lock_count or node.parent is None:
            return
        node.queued = True
        self._next_entry += 1
        heapq.heappush(self._heap, (*self._priority(node), self._next_entry, node))
