"""The self-check of page ownership: every page is exactly one of free, evictable, protected, in use.

Sets of ids are compared, never counts (one leak and one double free would cancel), and lock counts are recomputed from
the live handles. Reads pool and tree, changes nothing.
"""

from collections import Counter
from collections.abc import Collection, Mapping

from baton.kvcache.page_pool import PagePool
from baton.kvcache.radix_tree import RadixTree


class IntegrityError(AssertionError):
    """Page ownership is broken; the message names the pages and their owners."""


def check_tree(tree: RadixTree) -> None:
    """Structure, sizes and lock counts of the tree. Raises `IntegrityError`."""
    expected_locks: Counter[int] = Counter()
    for handle in tree.handles:
        node = handle.node
        num_pages = 0
        while node.parent is not None:
            expected_locks[id(node)] += 1
            num_pages += len(node.pages)
            node = node.parent
        if node is not tree.root:
            raise IntegrityError(f"a handle of {handle.num_pages} pages points at a node that was evicted")
        if num_pages != handle.num_pages:
            raise IntegrityError(f"a handle of {handle.num_pages} pages covers {num_pages}")
    evictable = protected = 0
    for node in tree.nodes():
        if not node.pages or len(node.key) != len(node.pages) * tree.page_size:
            raise IntegrityError(f"a node has {len(node.key)} tokens and pages {node.pages}")
        if node.parent is None or node.parent.children.get(node.edge) is not node:
            raise IntegrityError(f"the node of pages {node.pages} is not its parent's child")
        if node.lock_count != expected_locks[id(node)]:
            raise IntegrityError(
                f"pages {node.pages} have lock count {node.lock_count}, live handles make {expected_locks[id(node)]}"
            )
        if not node.lock_count and not node.children and not node.queued:
            raise IntegrityError(f"pages {node.pages} could be evicted but are not queued")
        if node.lock_count:
            protected += len(node.pages)
        else:
            evictable += len(node.pages)
    if (evictable, protected) != (tree.num_evictable, tree.num_protected):
        raise IntegrityError(
            f"the tree holds {evictable} evictable and {protected} protected pages "
            f"but counts {tree.num_evictable} and {tree.num_protected}"
        )


def check_ownership(pool: PagePool, tree: RadixTree, in_use: Mapping[str, Collection[int]]) -> None:
    """`in_use`: the pages that each owner (a request, a transfer) holds outside the tree. Raises `IntegrityError`."""
    check_tree(tree)
    owners: dict[int, list[str]] = {}
    for page in pool.free_pages:
        owners.setdefault(page, []).append("free")
    for node in tree.nodes():
        for page in node.pages:
            owners.setdefault(page, []).append("protected" if node.lock_count else "evictable")
    for owner, pages in in_use.items():
        for page in pages:
            owners.setdefault(page, []).append(f"in use by {owner}")
    leaked = sorted(set(range(pool.num_pages)) - owners.keys())
    foreign = sorted(owners.keys() - set(range(pool.num_pages)))
    shared = {page: names for page, names in sorted(owners.items()) if len(names) > 1}
    problems = []
    if leaked:
        problems.append(f"leaked pages (no owner): {leaked}")
    if foreign:
        problems.append(f"pages outside the pool: {[(page, owners[page]) for page in foreign]}")
    if shared:
        problems.append(f"pages with several owners: {shared}")
    if problems:
        raise IntegrityError("; ".join(problems))
