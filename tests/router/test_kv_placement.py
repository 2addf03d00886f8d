"""Placement by KV events: requests go to the worker that has most of the prompt, as long as it has it."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from tests.fakes.kv_publisher import KvPublisher
from tests.fakes.router_bed import Bed, bed, eventually

from baton.protocol.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from baton.router.config import KvSource
from baton.router.kv_index import Prompt
from baton.router.policies import CacheAware

PAGE = 4
PROMPT = list(range(100, 116))
"""Four blocks."""


def stored(token_ids: Sequence[int], first_hash: int, *, parent: int | None = None, **more: object) -> BlockStored:
    """Blocks named first_hash, first_hash + 1, ..."""
    hashes = list(range(first_hash, first_hash + len(token_ids) // PAGE))
    return BlockStored(hashes, parent, list(token_ids), PAGE, **more)  # type: ignore[arg-type]


class KvBed:
    """Two workers that publish; what a test asks of them."""

    def __init__(self, found: Bed, publishers: list[KvPublisher]) -> None:
        self.bed = found
        self.publishers = publishers

    @property
    def policy(self) -> CacheAware:
        policy = self.bed.router.core.registry.policies["regular"]
        assert isinstance(policy, CacheAware)
        return policy

    @property
    def urls(self) -> list[str]:
        return [worker.url for worker in self.bed.regular]

    async def place(self, token_ids: Sequence[int], **fields: object) -> int:
        """Which worker gets a request with this prompt."""
        reply = await self.bed.ask("/generate", {"input_ids": list(token_ids), **fields})
        assert reply.status == 200
        (place,) = [index for index, worker in enumerate(self.bed.regular) if worker.seen]
        for worker in self.bed.regular:
            worker.seen.clear()
        return place

    async def knows(self, worker: int, num_blocks: int) -> None:
        await eventually(lambda: self.num_blocks(worker) == num_blocks)

    def num_blocks(self, worker: int) -> int:
        index = self.policy.index
        return index.num_blocks(self.urls[worker]) if self.urls[worker] in index else -1


@asynccontextmanager
async def kv_bed(*, has_replay: bool = True, **settings: object) -> AsyncIterator[KvBed]:
    async with bed(regular=2, decode_policy="cache_aware", waits=False, **settings) as found:
        publishers = [KvPublisher(worker, has_replay=has_replay) for worker in found.regular]
        try:
            await found.ready()
            kv = KvBed(found, publishers)
            await eventually(lambda: all(url in kv.policy.index for url in kv.urls))
            yield kv
        finally:
            for publisher in publishers:
                await publisher.close()


async def test_the_longest_cached_prefix_wins_and_removal_is_believed():
    async with kv_bed() as kv:
        await kv.publishers[0].publish(stored(PROMPT[:8], 1))
        await kv.publishers[1].publish(stored(PROMPT, 1))
        await kv.knows(0, 2)
        await kv.knows(1, 4)
        assert await kv.place([*PROMPT, 1, 2, 3]) == 1
        await kv.publishers[1].publish(BlockRemoved([2, 3, 4]))
        await kv.knows(1, 1)
        assert await kv.place([*PROMPT, 1, 2, 3]) == 0, (
            "two blocks are more than one, though the text went to the other"
        )
        await kv.publishers[0].publish(AllBlocksCleared())
        await kv.knows(0, 0)
        assert await kv.place([*PROMPT[:8], 1, 2, 3]) == 1


async def test_blocks_are_found_through_their_parents_whatever_their_hashes():
    async with kv_bed() as kv:
        await kv.publishers[1].publish(stored(PROMPT[:8], -77), stored(PROMPT[8:], 500, parent=-76))
        await kv.publishers[0].publish(stored(PROMPT[8:], 900), stored([1, 2, 3, 4], 950, parent=12345))
        await kv.knows(1, 4)
        await kv.knows(0, 2)
        assert await kv.place(PROMPT) == 1
        assert await kv.place(PROMPT[8:]) == 0


async def test_tenants_do_not_mix():
    async with kv_bed() as kv:
        await kv.publishers[0].publish(stored(PROMPT[:8], 1))
        await kv.publishers[1].publish(stored(PROMPT, 1, extra_keys=[["salt"], None, None, None]))
        await kv.knows(0, 2)
        await kv.knows(1, 4)
        assert await kv.place(PROMPT, cache_salt="salt") == 1
        assert await kv.place(PROMPT) == 0


async def test_a_block_removed_from_the_device_but_kept_on_the_host_is_still_there():
    async with kv_bed() as kv:
        await kv.publishers[1].publish(stored(PROMPT, 1, medium="GPU"), stored(PROMPT, 1, medium="CPU_PINNED"))
        await kv.publishers[1].publish(BlockRemoved([1, 2, 3, 4], "GPU"))
        await kv.knows(1, 4)
        assert await kv.place(PROMPT) == 1
        await kv.publishers[1].publish(BlockRemoved([1, 2, 3, 4], "CPU_PINNED"))
        await kv.knows(1, 0)
        await kv.publishers[0].publish(stored(PROMPT, 1))
        await kv.knows(0, 4)
        assert await kv.place(PROMPT) == 0


async def test_a_restarted_worker_has_nothing():
    async with kv_bed() as kv:
        await kv.publishers[0].publish(stored(PROMPT, 1))
        await kv.publishers[1].publish(stored(PROMPT[:8], 1))
        await kv.knows(0, 4)
        await kv.knows(1, 2)
        ports = kv.publishers[0].ports
        await kv.publishers[0].close()
        await eventually(lambda: kv.num_blocks(0) == -1)
        assert await kv.place(PROMPT) == 1
        kv.publishers[0] = KvPublisher(kv.bed.regular[0], ports=ports)
        await kv.knows(0, 0)
        assert await kv.place(PROMPT) == 1


async def test_a_router_that_comes_later_hears_the_past_by_replay():
    async with kv_bed() as kv:
        publisher = kv.publishers[0]
        await publisher.publish(stored(PROMPT, 1))
        await kv.knows(0, 4)
        url = kv.urls[0]
        kv.policy.forget(url)  # as when health says that it came back
        await kv.knows(0, 4)
        assert publisher.num_replays == 2
        assert url not in kv.policy.partly_known


@pytest.mark.parametrize("has_replay", [True, False])
async def test_a_gap_is_filled_by_replay_or_else_empties_the_worker(has_replay):
    async with kv_bed(has_replay=has_replay) as kv:
        publisher = kv.publishers[0]
        await publisher.publish(stored(PROMPT[:8], 1))
        await kv.knows(0, 2)
        await publisher.publish(BlockRemoved([2]), is_lost=True)
        await publisher.publish(stored(PROMPT, 100))
        await kv.knows(0, 5 if has_replay else 4)
        assert (kv.urls[0] in kv.policy.partly_known) == (not has_replay)
        assert await kv.place(PROMPT) == 0
        metrics = (await kv.bed.get("/metrics")).body.decode()
        assert f'baton_router_kv_event_gaps_total{{worker="{kv.urls[0]}"}} 1' in metrics
        assert f'baton_router_kv_event_gaps_total{{worker="{kv.urls[1]}"}} 0' in metrics


async def test_garbage_makes_a_workers_blocks_unknown_and_hurts_nobody():
    async with kv_bed() as kv:
        publisher = kv.publishers[0]
        await publisher.publish(stored(PROMPT, 1))
        await kv.knows(0, 4)
        for payload in (b"", b"garbage", b"\x93" + b"\xff" * 1000, json.dumps({"ts": 1}).encode()):
            await publisher.send(payload)
        await kv.knows(0, 0)
        await publisher.publish(BlockStored([1], None, [1, 2, 3], PAGE))  # tokens that are no whole block
        await publisher.publish(BlockStored([1], None, [-1, 2**40, 3, 4], PAGE))  # tokens that are none
        for frames in ((b"",), (b"", b"short", b"x"), (b"", b"", b"", b"")):
            await publisher.send_frames(*frames)
        await publisher.publish(stored(PROMPT, 1))
        await kv.knows(0, 4)
        assert await kv.place(PROMPT) == 0
        kv.policy.index.check_integrity()


async def test_a_message_beyond_the_bound_cuts_only_its_sender_off(monkeypatch):
    monkeypatch.setattr("baton.router.kv_feed.MAX_MESSAGE_BYTES", 1000)
    async with kv_bed() as kv:
        await kv.publishers[0].publish(stored(PROMPT[:8], 1))
        await kv.publishers[1].publish(stored(PROMPT, 1))
        await kv.knows(0, 2)
        await kv.knows(1, 4)
        await kv.publishers[1].send(b"\x93" + bytes(5000), is_kept=False)
        await eventually(lambda: kv.num_blocks(1) != 4)
        assert await kv.place(PROMPT[:8]) == 0


async def test_requests_with_one_new_prefix_go_to_one_worker_before_its_events_tell():
    async with kv_bed() as kv:
        for index in (0, 1):
            await kv.publishers[index].publish(stored([9] * 8, 50))
            await kv.knows(index, 2)
        answer = asyncio.Event()
        for worker in kv.bed.regular:
            worker.pace = answer.wait
        asked = []
        for count in (1, 2, 3):
            asked.append(asyncio.create_task(kv.bed.ask("/generate", {"input_ids": PROMPT})))
            await eventually(lambda count=count: sum(len(worker.seen) for worker in kv.bed.regular) == count)
        assert sorted(len(worker.seen) for worker in kv.bed.regular) == [0, 3]
        answer.set()
        await asyncio.gather(*asked)
        await eventually(lambda: not kv.bed.router.core.exchanges)
        assert kv.policy.index.match(Prompt(PROMPT)) == {}, "a request that has ended leaves only what events tell"
        kv.policy.index.check_integrity()


async def test_a_worker_that_publishes_nothing_is_placed_by_text():
    async with bed(regular=2, decode_policy="cache_aware") as found:
        for _ in range(3):
            await found.ask("/generate", {"text": "the same long text again and again"})
        assert sorted(len(worker.seen) for worker in found.regular) == [0, 3]


async def test_endpoints_can_be_given_to_the_router():
    async with kv_bed() as kv:
        ports = kv.publishers[0].ports
        source = KvSource(f"tcp://127.0.0.1:{ports[0]}", f"tcp://127.0.0.1:{ports[1]}")
        await kv.publishers[0].publish(stored(PROMPT, 1))
        del kv.bed.regular[0].info["kv_events_config"]
        kv.bed.router.core.config.kv_sources[kv.urls[0]] = source
        kv.policy.forget(kv.urls[0])
        await kv.knows(0, 4)
