"""The cache and its store case by case: what is written, asked for, read, waited for, shared, cancelled, damaged."""

import pytest
from tests.fakes.tier_world import A, B, C, filled, keys_of, make, only, prefetch

from baton.kvcache.tiers import Cancel, Found, Late, PagesRead, Query, Read, Write

# -- the store: writes -------------------------------------------------------------------------------------------------


def test_everything_saved_goes_on_to_the_store_once() -> None:
    world = make(has_store=True)
    world.serve(A)
    world.settle()
    world.serve(A)
    world.settle()
    written = [key for action in world.log if isinstance(action, Write) for key in action.keys]
    assert written == keys_of(A)
    assert world.store.keys() == set(written)
    assert world.cache.counters.backed_up == 4


def test_a_write_in_flight_is_not_doubled_by_the_next_use() -> None:
    world = make(has_store=True)
    world.serve(A)
    world.serve(A)
    world.serve(A)
    assert sum(len(action.keys) for action in world.log if isinstance(action, Write)) == 4


def test_a_write_that_failed_is_tried_again_at_the_next_use() -> None:
    world = make(has_store=True)
    world.is_down = True
    world.serve(A)
    world.settle()
    assert world.cache.counters.writes_failed == 4 and not world.store
    world.is_down = False
    world.serve([*A, 1])
    world.settle()
    assert world.store.keys() == set(keys_of(A))


def test_a_store_that_hangs_never_takes_over_the_host_tier() -> None:
    world = make(device_pages=4, host_pages=8, has_store=True)
    for start in range(0, 1000, 10):
        world.serve([start + i for i in range(8)])
    counters = world.cache.counters
    assert len(world.operations) == 1, "a quarter of the tier is all that writes may hold"
    assert counters.saves_skipped == 0 and counters.writes_skipped > 0
    world.serve(A)
    world.serve(B)
    assert world.serve(A).by_source[1] > 0
    world.settle()
    world.cache.check_integrity({})


# -- the store: prefetch -----------------------------------------------------------------------------------------------


def test_a_prefetch_brings_what_the_store_has() -> None:
    world = filled()
    prefetch(world, "r", A)
    world.settle()
    assert world.serve(A).by_source == (0, 0, 6)
    world.serve(C)
    world.serve(B)
    # Counted as the store's once; now it is the host tier that saves the computing.
    assert world.serve(A).by_source == (0, 6, 0)
    counters = world.cache.counters
    assert (counters.prefetched, counters.store_hit_tokens, counters.reads_failed) == (3, 6, 0)


def test_the_store_is_asked_only_for_what_this_worker_lacks() -> None:
    world = filled()
    world.serve(A[:4])
    prefetch(world, "r", [*A, 1])
    assert world.operations[only(world, Query)].action.keys == keys_of(A)[2:]


@pytest.mark.parametrize(("threshold", "num_asked", "num_read"), [(6, 1, 1), (7, 0, 0)])
def test_for_few_tokens_the_store_is_not_asked(threshold: int, num_asked: int, num_read: int) -> None:
    world = filled(prefetch_threshold=threshold)
    prefetch(world, "r", A)
    world.settle()
    assert [isinstance(action, Query) for action in world.log].count(True) == num_asked
    assert [isinstance(action, Read) for action in world.log].count(True) == num_read


def test_fewer_tokens_than_the_threshold_are_not_read() -> None:
    world = filled(prefetch_threshold=6)
    del world.store[keys_of(A)[2]]
    prefetch(world, "r", A)
    world.settle()
    assert not any(isinstance(action, Read) for action in world.log)


@pytest.mark.parametrize("device_pages", [8, 4])
def test_what_was_computed_meanwhile_is_not_read(device_pages: int) -> None:
    """It is on the device, or only in the host tier by now."""
    world = filled(device_pages=device_pages, write_policy="write_back" if device_pages == 8 else "write_through")
    world.store.update(dict.fromkeys(keys_of(C), ("late", ())))
    prefetch(world, "r", C)
    query = only(world, Query)
    world.serve(C)
    world.serve(A[:6])
    world.deliver(query)
    world.move()
    assert not any(isinstance(action, Read) for action in world.log)


def test_best_effort_never_waits() -> None:
    world = filled()
    prefetch(world, "r", A)
    assert not world.cache.awaits_prefetch("r", 0.0)


def test_wait_complete_waits_for_the_last_page() -> None:
    world = filled(prefetch_policy="wait_complete")
    prefetch(world, "r", A)
    assert world.cache.awaits_prefetch("r", 1e9)
    world.deliver(only(world, Query))
    world.move()
    world.deliver(only(world, Read), 2)
    assert world.cache.awaits_prefetch("r", 1e9)
    world.deliver(only(world, Read))
    assert not world.cache.awaits_prefetch("r", 0.0)
    assert world.cache.next_deadline() is None


def test_nobody_waits_for_a_store_that_hangs() -> None:
    world = filled(prefetch_policy="wait_complete")
    prefetch(world, "r", A)
    world.cache.on_store_event(Late(only(world, Query)), 0.0)
    assert not world.cache.awaits_prefetch("r", 0.0)
    world.deliver(only(world, Query))  # the hour after
    assert not world.cache.awaits_prefetch("r", 0.0)
    world.cache.end_prefetch("r")
    prefetch(world, "first", A)
    world.deliver(only(world, Query))
    world.move()
    prefetch(world, "second", A)
    world.deliver(only(world, Query))
    assert world.cache.awaits_prefetch("first", 0.0) and world.cache.awaits_prefetch("second", 0.0)
    read = only(world, Read)
    world.cache.on_store_event(Late(read), 0.0)
    assert not world.cache.awaits_prefetch("first", 0.0) and not world.cache.awaits_prefetch("second", 0.0)
    world.cache.end_prefetch("first")
    world.cache.check_integrity({})  # the pages stay in the store's hands
    world.move()
    world.deliver(read)
    world.cache.check_integrity({})
    assert world.serve(A).by_source == (0, 0, 6)


def test_timeout_waits_for_a_base_and_for_every_1024_tokens() -> None:
    world = filled(prefetch_policy="timeout", prefetch_timeout_base_s=2.0, prefetch_timeout_per_ki_token_s=512.0)
    prefetch(world, "r", A, now=10.0)
    deadline = 10.0 + 2.0 + 512.0 * 6 / 1024
    assert world.cache.awaits_prefetch("r", deadline - 0.01)
    assert world.cache.next_deadline() == deadline
    assert not world.cache.awaits_prefetch("r", deadline)
    # Nobody is held back now, so that nobody is woken for a time that has passed.
    assert world.cache.next_deadline() is None


def test_nobody_waits_for_a_store_that_does_not_have_it() -> None:
    world = filled(prefetch_policy="wait_complete")
    prefetch(world, "r", C)
    world.deliver(only(world, Query))
    assert not world.cache.awaits_prefetch("r", 0.0)


def test_what_is_used_after_the_store_was_emptied_is_written_again() -> None:
    world = make(has_store=True)
    world.serve(A)
    world.settle()
    world.store.clear()
    world.serve(A)
    world.settle()
    assert not world.store
    world.cache.on_store_cleared()
    world.serve(A)
    world.settle()
    assert world.store.keys() >= set(keys_of(A)[:3])


def test_requests_with_the_same_prefix_share_one_read() -> None:
    world = filled(prefetch_policy="wait_complete")
    prefetch(world, "first", A)
    prefetch(world, "second", [*A, 1, 2])
    for op in list(world.operations):
        world.deliver(op)
    world.move()
    (first, second) = (operation.action for operation in world.operations.values())
    assert (first.keys, second.keys) == (keys_of(A)[:3], keys_of(A)[3:])
    # One leaves, the other still wants it; when both have left, it is cancelled.
    world.cache.end_prefetch("first")
    world.move()
    assert not any(isinstance(action, Cancel) for action in world.log)
    world.deliver(second.op)
    assert world.cache.awaits_prefetch("second", 0.0)
    world.cache.end_prefetch("second")
    world.move()
    assert world.log[-1] == Cancel(first.op)


def test_a_cancelled_read_that_ends_late_does_not_unshare_the_next_one() -> None:
    world = filled(prefetch_policy="wait_complete")
    prefetch(world, "first", A)
    world.deliver(only(world, Query))
    world.cache.end_prefetch("first")
    prefetch(world, "second", A)
    cancelled = only(world, Read)
    world.deliver(only(world, Query))
    world.move()
    world.cache.on_store_event(PagesRead(cancelled, 0, [], True), 0.0)
    del world.operations[cancelled]
    prefetch(world, "third", A)
    world.deliver(only(world, Query))
    world.move()
    world.deliver(only(world, Read))
    assert not world.cache.awaits_prefetch("third", 0.0)
    assert world.serve(A).by_source == (0, 0, 6)


def test_pages_that_come_after_a_cancellation_are_kept() -> None:
    world = filled()
    prefetch(world, "r", A)
    world.deliver(only(world, Query))
    world.cache.end_prefetch("r")
    world.move()
    read = only(world, Read)
    world.cache.check_integrity({})
    world.deliver(read, 3)
    assert world.serve(A).by_source == (0, 0, 6)


def test_a_damaged_page_is_a_miss_and_ends_the_prefix() -> None:
    world = filled()
    prefetch(world, "r", A)
    world.deliver(only(world, Query))
    world.move()
    world.deliver(only(world, Read), is_ok=lambda key: key != keys_of(A)[1])
    assert world.serve(A).by_source == (0, 0, 2)
    assert world.cache.counters.reads_failed == 1


def test_a_dead_store_keeps_its_pages_and_nothing_else_suffers() -> None:
    world = filled(host_pages=12, max_read_share=0.34)
    prefetch(world, "r", A)
    world.deliver(only(world, Query))
    world.cache.end_prefetch("r")
    world.move()
    read = only(world, Read)
    for tokens in (B, C, B):
        world.serve(tokens)
    assert world.cache.counters.saves_skipped == 0
    prefetch(world, "s", A)
    world.deliver(only(world, Query))
    # Four pages may be read into, three are held by the first read.
    assert world.cache.counters.reads_skipped == 2
    world.cache.on_store_event(PagesRead(read, 0, [], True), 0.0)
    del world.operations[read]
    world.settle()
    world.cache.check_integrity({})
    world.cache._host.check({})


def test_an_answer_for_a_request_that_left_does_nothing() -> None:
    world = filled()
    prefetch(world, "r", A)
    query = only(world, Query)
    world.cache.end_prefetch("r")
    world.move()
    assert world.log[-1] == Cancel(query)
    world.cache.on_store_event(Found(query, 3), 0.0)
    assert world.cache.take_store_actions() == []
