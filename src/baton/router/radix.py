"""An approximate picture of which worker has which prompt prefix cached: one radix tree over request bytes.

"Approximate": workers are never asked; a prefix sent to a worker counts as cached there until it is evicted here.
Pure data: no clock (recency is a counter), no I/O. Bounded: at most `max_size` bytes are remembered per worker.

Invariants (`check_integrity`): an edge is never empty and siblings differ in their first byte; a worker on a node is on
all of its ancestors; `size[w]` is the sum of the edges that carry w; every node but the root has a worker.
"""

import heapq


class _Node:
    __slots__ = ("children", "edge", "last_used", "parent")

    def __init__(self, edge: bytes, parent: "_Node | None") -> None:
        self.edge = edge
        self.parent = parent
        self.children: dict[int, _Node] = {}
        self.last_used: dict[str, int] = {}
        """worker -> when (counter) its text last passed here; the workers of this node."""


def _common_len(edge: bytes, text: bytes, start: int) -> int:
    """How many leading bytes of `edge` stand in `text` at `start`. Binary search over C comparisons."""
    high = min(len(edge), len(text) - start)
    if text.startswith(edge[:high], start):
        return high
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        if text.startswith(edge[low:middle], start + low):
            low = middle
        else:
            high = middle
    return low


class PrefixTree:
    """`match` finds the worker with the longest known prefix, `insert` records that one has got a text."""

    def __init__(self, max_size: int) -> None:
        self._root = _Node(b"", None)
        self._max_size = max_size
        self._tick = 0
        self.size: dict[str, int] = {}
        """worker -> bytes remembered for it."""

    def match(self, text: bytes) -> dict[str, int]:
        """worker -> length of the longest prefix of `text` it is thought to have; only lengths > 0."""
        matched: dict[str, int] = {}
        node, position, end = self._root, 0, len(text)
        while position < end:
            child = node.children.get(text[position])
            if child is None:
                break
            edge = child.edge
            if text.startswith(edge, position):
                position += len(edge)
            else:
                position += _common_len(edge, text, position)
                end = position
            for worker in child.last_used:
                matched[worker] = position
            node = child
        return matched

    def insert(self, text: bytes, worker: str) -> None:
        """Remember that `worker` now has `text`; evicts the least recently used texts of this worker over the bound."""
        self._tick = tick = self._tick + 1
        if len(text) > self._max_size:
            text = text[: self._max_size]
        node, position, end, added = self._root, 0, len(text), 0
        while position < end:
            child = node.children.get(text[position])
            if child is None:
                child = _Node(text[position:], node)
                node.children[text[position]] = child
            elif not text.startswith(child.edge, position):
                child = self._split(child, _common_len(child.edge, text, position))
            if worker not in child.last_used:
                added += len(child.edge)
            child.last_used[worker] = tick
            position += len(child.edge)
            node = child
        self.size[worker] = size = self.size.get(worker, 0) + added
        if size > self._max_size:
            self.evict(worker, self._max_size * 9 // 10)

    @staticmethod
    def _split(child: _Node, at: int) -> _Node:
        """Cut `child`'s edge at `at`; the new upper node has its workers, so no size changes."""
        parent = child.parent
        assert parent is not None
        assert 0 < at < len(child.edge)
        upper = _Node(child.edge[:at], parent)
        upper.last_used = dict(child.last_used)
        upper.children[child.edge[at]] = child
        parent.children[upper.edge[0]] = upper
        child.edge = child.edge[at:]
        child.parent = upper
        return upper

    def evict(self, worker: str, target_size: int) -> None:
        """Forget least recently used leaves of `worker` until it has at most `target_size` bytes."""
        if self.size.get(worker, 0) <= target_size:
            return
        heap = [(node.last_used[worker], id(node), node) for node in self._leaves(worker)]
        heapq.heapify(heap)
        while heap and self.size[worker] > target_size:
            _, _, node = heapq.heappop(heap)
            parent = self._drop(node, worker)
            if parent is not self._root and not any(worker in child.last_used for child in parent.children.values()):
                heapq.heappush(heap, (parent.last_used[worker], id(parent), parent))

    def evict_all(self, target_size: int) -> None:
        for worker in list(self.size):
            self.evict(worker, target_size)

    def remove(self, worker: str) -> None:
        """Forget everything about `worker` (it left, or it restarted with an empty cache)."""
        self.evict(worker, 0)
        self.size.pop(worker, None)

    def _leaves(self, worker: str) -> list[_Node]:
        """Nodes of `worker` none of whose children it is on."""
        leaves: list[_Node] = []
        stack = [self._root]
        while stack:
            node = stack.pop()
            below = [child for child in node.children.values() if worker in child.last_used]
            if below:
                stack += below
            elif node is not self._root:
                leaves.append(node)
        return leaves

    def _drop(self, node: _Node, worker: str) -> _Node:
        parent = node.parent
        assert parent is not None
        del node.last_used[worker]
        self.size[worker] -= len(node.edge)
        if not node.last_used:  # then no descendant has a worker either
            del parent.children[node.edge[0]]
        return parent

    def check_integrity(self) -> None:
        """Raise AssertionError if an invariant of the module docstring does not hold."""
        sizes: dict[str, int] = {}
        stack = [self._root]
        while stack:
            node = stack.pop()
            for first, child in node.children.items():
                assert child.edge, "empty edge"
                assert child.edge[0] == first, "child under the wrong byte"
                assert child.parent is node, "wrong parent"
                assert child.last_used, "node without a worker"
                assert node is self._root or child.last_used.keys() <= node.last_used.keys(), "worker skips a node"
                for worker in child.last_used:
                    sizes[worker] = sizes.get(worker, 0) + len(child.edge)
                stack.append(child)
        assert sizes == {worker: size for worker, size in self.size.items() if size}, "sizes do not add up"
        assert all(size <= self._max_size for size in self.size.values()), "over the bound"
