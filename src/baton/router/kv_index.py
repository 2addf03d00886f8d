"""Which worker holds which blocks of tokens, learned from KV events; and how much of a prompt each one can reuse.

Workers name blocks by hashes of their own (seeded by model and tenant), so nothing is recomputed: an event tells a block's
tokens and its parent, and from these the block gets the index's own name, a chain of 128-bit hashes over tokens that is the
same for all workers. A prompt is hashed once into the same names and looked up. A collision, even a made one, misplaces a
request; the worker never answers from this index. Pure: no sockets, no clock. Neighbours: `kv_feed` brings the events,
`policies.CacheAware` asks.

Bounded: at most `max_blocks` blocks a worker; further ones are not remembered (nor what follows them), so that what is
remembered stays whole from the start of each prompt. Invariants (`check_integrity`): a worker's bit is set on a block if and
only if one of its hashes names that block; no block has no bit.
"""

from array import array
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import xxhash

from baton.protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event

_digest = xxhash.xxh3_128_digest
MAX_BLOCK_SIZES = 4
"""Different block sizes at a time; a prompt is hashed once for each."""


class Prompt:
    """A prompt's tokens, and its blocks' names once they are asked for. `tenant`: cache_salt and the like, "" for none."""

    __slots__ = ("_names", "holds", "num_tokens", "tenant", "token_ids")

    def __init__(self, token_ids: Sequence[int], tenant: str = "") -> None:
        """Raises OverflowError for an id that is negative or above 32 bits, TypeError for one that is no number."""
        self.token_ids = array("I", token_ids).tobytes()
        self.num_tokens = len(token_ids)
        self.tenant = tenant
        self.holds: list[tuple[KvIndex, Hold]] = []
        """Where the request is going."""
        self._names: dict[int, list[bytes]] = {}

    def release(self) -> None:
        """The request is not (any more) on its way to a worker."""
        for index, hold in self.holds:
            index.release(hold)
        self.holds.clear()

    def names(self, block_size: int) -> list[bytes]:
        """Of the whole blocks, in order."""
        names = self._names.get(block_size)
        if names is None:
            names = self._names[block_size] = chain(_root(self.tenant), self.token_ids, block_size)
        return names


def chain(previous: bytes, token_ids: bytes, block_size: int) -> list[bytes]:
    """Names of the whole blocks of `token_ids` (4 bytes each) after the block called `previous`."""
    step = 4 * block_size
    names: list[bytes] = []
    for start in range(0, len(token_ids) - step + 1, step):
        previous = _digest(previous + token_ids[start : start + step])
        names.append(previous)
    return names


def _root(tenant: str) -> bytes:
    return _digest(tenant.encode()) if tenant else b""


class Hold(NamedTuple):
    """Blocks that a worker is about to have, because a request with them is on its way there."""

    worker: str
    keys: list[Hashable]


class _Held:
    """What one worker has."""

    __slots__ = ("bit", "media", "more", "names")

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.names: dict[Hashable, bytes] = {}
        """(the worker's hash, or (medium, hash) off the device, or a hold's id) -> block."""
        self.more: dict[bytes, int] = {}
        """Block -> how many of `names` beyond one name it: other tiers, other tenants, requests on their way."""
        self.media: set[str] = set()
        """Tiers below the device that it has told of."""


class KvIndex:
    """`apply` events, `match` prompts. Workers are known by URL."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._workers: dict[str, _Held] = {}
        self._blocks: dict[bytes, int] = {}
        """Block -> the bits of the workers that have it."""
        self._block_sizes: dict[int, None] = {}
        self._num_holds = 0
        self.num_refused = 0
        """Blocks that were not remembered because the worker had `max_blocks`."""

    def add(self, worker: str) -> None:
        """From now on the index speaks for `worker`; it has nothing yet."""
        self.remove(worker)
        used = 0
        for held in self._workers.values():
            used |= held.bit
        self._workers[worker] = _Held(~used & (used + 1))  # the lowest bit that is free

    def remove(self, worker: str) -> None:
        """The index no longer speaks for `worker`."""
        self.clear(worker)
        self._workers.pop(worker, None)
        if not self._workers:
            self._block_sizes.clear()

    def clear(self, worker: str) -> None:
        """`worker`, if the index speaks for it, has nothing (any more)."""
        held = self._workers.get(worker)
        if held is None:
            return
        for name in set(held.names.values()):
            self._unset(held, name)
        held.names.clear()
        held.more.clear()

    def __bool__(self) -> bool:
        """Whether it speaks for anybody."""
        return bool(self._workers)

    def __contains__(self, worker: object) -> bool:
        return worker in self._workers

    def num_blocks(self, worker: str) -> int:
        return len(self._workers[worker].names)

    # Events

    def apply(self, worker: str, event: Event) -> None:
        """Events of a worker that was not added mean nothing. Raises ValueError or OverflowError for an event that contradicts
        itself; the index stays whole."""
        held = self._workers.get(worker)
        if held is None:
            return
        if isinstance(event, AllBlocksCleared):
            self.clear(worker)
        elif event.group_idx:  # other groups of layers of a hybrid model repeat group 0
            return
        elif isinstance(event, BlockRemoved):
            for block_hash in event.block_hashes:
                self._forget(held, _key(event.medium, block_hash))
        else:
            self._store(held, event)

    def _store(self, held: _Held, event: BlockStored) -> None:
        size, hashes = event.block_size, event.block_hashes
        if size < 1 or len(event.token_ids) != size * len(hashes):
            raise ValueError(f"{len(event.token_ids)} tokens are not {len(hashes)} blocks of {size}")
        if size not in self._block_sizes:
            if len(self._block_sizes) >= MAX_BLOCK_SIZES:
                raise ValueError(f"block size {size} is one too many beside {list(self._block_sizes)}")
            self._block_sizes[size] = None
        if event.medium is not None and not _is_device(event.medium) and len(held.media) < 8:
            held.media.add(event.medium)
        if event.parent_block_hash is None:
            parent: bytes | None = _root(_tenant_of(event))
        else:
            parent = self._find(held, event.parent_block_hash)
        if parent is None:  # what it follows was never heard of
            return
        names = chain(parent, array("I", event.token_ids).tobytes(), size)
        for block_hash, name in zip(hashes, names, strict=True):
            key = _key(event.medium, block_hash)
            if key in held.names:
                continue
            if len(held.names) >= self._max_blocks:
                self.num_refused += 1
                return
            self._remember(held, key, name)

    @staticmethod
    def _find(held: _Held, block_hash: int | bytes) -> bytes | None:
        name = held.names.get(block_hash)
        if name is None and held.media:
            name = next((held.names[m, block_hash] for m in held.media if (m, block_hash) in held.names), None)
        return name

    def _remember(self, held: _Held, key: Hashable, name: bytes) -> None:
        held.names[key] = name
        bits = self._blocks.get(name, 0)
        if bits & held.bit:
            held.more[name] = held.more.get(name, 0) + 1
        else:
            self._blocks[name] = bits | held.bit

    def _forget(self, held: _Held, key: Hashable) -> None:
        name = held.names.pop(key, None)
        if name is None:
            return
        more = held.more.get(name)
        if more is None:
            self._unset(held, name)
        elif more == 1:
            del held.more[name]
        else:
            held.more[name] = more - 1

    def _unset(self, held: _Held, name: bytes) -> None:
        bits = self._blocks[name] & ~held.bit
        if bits:
            self._blocks[name] = bits
        else:
            del self._blocks[name]

    # Prompts

    def match(self, prompt: Prompt) -> dict[str, int]:
        """worker -> how many of the prompt's first tokens it has; only numbers > 0."""
        found: dict[str, int] = {}
        for size in self._block_sizes:
            alive, names = -1, prompt.names(size)
            for count, name in enumerate(names):
                bits = alive & self._blocks.get(name, 0)
                if bits != alive:
                    if count:
                        self._note(found, alive & ~bits, count * size)
                    alive = bits
                    if not alive:
                        break
            if alive and names:
                self._note(found, alive, len(names) * size)
        return found

    def _note(self, found: dict[str, int], bits: int, num_tokens: int) -> None:
        for worker, held in self._workers.items():
            if held.bit & bits and found.get(worker, 0) < num_tokens:
                found[worker] = num_tokens

    def hold(self, worker: str, prompt: Prompt) -> Hold:
        """Until `release`, `worker` counts as having the prompt: the next request with this prefix need not wait for events."""
        held = self._workers[worker]
        self._num_holds += 1
        hold = Hold(worker, [])
        for size in self._block_sizes:
            for name in prompt.names(size):
                if len(held.names) >= self._max_blocks:
                    return hold
                key = (self._num_holds, len(hold.keys))
                self._remember(held, key, name)
                hold.keys.append(key)
        return hold

    def release(self, hold: Hold) -> None:
        held = self._workers.get(hold.worker)
        if held is not None:
            for key in hold.keys:
                self._forget(held, key)

    def check_integrity(self) -> None:
        """Raise AssertionError if an invariant of the module docstring does not hold."""
        expected: dict[bytes, int] = {}
        for worker, held in self._workers.items():
            counts: dict[bytes, int] = {}
            for name in held.names.values():
                counts[name] = counts.get(name, 0) + 1
                expected[name] = expected.get(name, 0) | held.bit
            assert held.more == {name: n - 1 for name, n in counts.items() if n > 1}, f"counts of {worker}"
            assert len(held.names) <= self._max_blocks, f"{worker} is over the bound"
        assert self._blocks == expected, "bits do not match what workers have"
        bits = [held.bit for held in self._workers.values()]
        assert len(set(bits)) == len(bits), "two workers share a bit"


def _is_device(medium: str) -> bool:
    return medium == "GPU"


def _key(medium: str | None, block_hash: int | bytes) -> Hashable:
    return block_hash if medium is None or _is_device(medium) else (medium, block_hash)


def _tenant_of(event: BlockStored) -> str:
    """cache_salt and LoRA of the first block; entries that are no text (images, say) make a tenant of their own."""
    keys = event.extra_keys[0] if event.extra_keys else None
    parts = [part if isinstance(part, str) else repr(part) for part in keys or ()]
    if event.lora_name is not None and event.lora_name not in parts:
        parts.append(event.lora_name)
    if event.lora_id is not None and event.lora_name is None:
        parts.append(f"lora {event.lora_id}")
    return "".join(parts)
