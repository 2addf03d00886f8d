"""What every `stores.base.Store` must do: `for check in CHECKS: check(make)`, with `make` opening a store that is empty at first.

All stores that `make` opens are the same one, as workers of one deployment see it. A back end that cannot clear, or that finishes
puts later, has a `make` that waits for it.
"""

from collections.abc import Callable

import numpy as np

from baton.kvcache.stores.base import Object, Store

OBJECT_BYTES = 5000
MakeStore = Callable[[], Store]


def make_objects(count: int, seed: int = 0) -> list[Object]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, OBJECT_BYTES), dtype=np.uint8))


def empty_objects(count: int, store: Store, object_bytes: int = OBJECT_BYTES) -> list[Object]:
    memory = np.zeros((count, object_bytes), dtype=np.uint8)
    store.register(memory.reshape(-1))
    return list(memory)


def registered(objects: list[Object], store: Store) -> list[Object]:
    memory = np.stack(objects)
    store.register(memory.reshape(-1))
    return list(memory)


def what_was_put_comes_back(make: MakeStore) -> None:
    store, objects = make(), make_objects(5)
    assert store.batch_put(list("abcde"), registered(objects, store)) == [True] * 5
    targets = empty_objects(5, store)
    assert store.batch_get(list("edcba"), targets) == [True] * 5
    for target, wanted in zip(targets, reversed(objects), strict=True):
        assert np.array_equal(target, wanted)
    store.close()


def absent_objects_are_false_and_leave_the_others(make: MakeStore) -> None:
    store, objects = make(), make_objects(2)
    store.batch_put(["a", "c"], registered(objects, store))
    targets = empty_objects(3, store)
    assert store.batch_get(["a", "b", "c"], targets) == [True, False, True]
    assert np.array_equal(targets[0], objects[0]) and np.array_equal(targets[2], objects[1])
    store.close()


def existence_counts_from_the_first_without_a_gap(make: MakeStore) -> None:
    store = make()
    store.batch_put(["a", "b", "d"], registered(make_objects(3), store))
    assert [store.batch_exists(list(names)) for names in ("abcd", "abd", "ca", "d", "")] == [2, 3, 0, 1, 0]
    store.close()


def a_second_put_is_true(make: MakeStore) -> None:
    store = make()
    objects = registered(make_objects(3), store)
    store.batch_put(["a"], objects[:1])
    assert store.batch_put(["b", "a", "b"], [objects[1], objects[0], objects[1]]) == [True] * 3
    assert store.batch_exists(["a", "b"]) == 2
    store.close()


def the_callers_memory_is_its_own_again_after_a_put(make: MakeStore) -> None:
    store = make()
    (source,) = registered(make_objects(1), store)
    wanted = source.copy()
    store.batch_put(["a"], [source])
    source[:] = 7
    (target,) = empty_objects(1, store)
    assert store.batch_get(["a"], [target]) == [True] and np.array_equal(target, wanted)
    store.close()


def an_object_of_another_size_is_not_there(make: MakeStore) -> None:
    store = make()
    store.batch_put(["a"], registered(make_objects(1), store))
    for size in (OBJECT_BYTES - 1, OBJECT_BYTES + 1):
        assert store.batch_get(["a"], empty_objects(1, store, size)) == [False]
    store.close()


def workers_share_objects(make: MakeStore) -> None:
    first, second = make(), make()
    objects = make_objects(1)
    first.batch_put(["a"], registered(objects, first))
    (target,) = empty_objects(1, second)
    assert second.batch_get(["a"], [target]) == [True] and np.array_equal(target, objects[0])
    first.close()
    second.close()


def clear_forgets_everything_and_the_store_goes_on(make: MakeStore) -> None:
    store = make()
    objects = registered(make_objects(2), store)
    store.batch_put(["a", "b"], objects)
    store.clear()
    assert store.batch_exists(["a"]) == 0 and store.batch_get(["a"], empty_objects(1, store)) == [False]
    assert store.batch_put(["b"], objects[1:]) == [True] and store.batch_exists(["b", "a"]) == 1
    store.close()


def stats_are_numbers(make: MakeStore) -> None:
    store = make()
    assert all(isinstance(name, str) and isinstance(value, int | float) for name, value in store.stats().items())
    store.close()


CHECKS = (
    what_was_put_comes_back,
    absent_objects_are_false_and_leave_the_others,
    existence_counts_from_the_first_without_a_gap,
    a_second_put_is_true,
    the_callers_memory_is_its_own_again_after_a_put,
    an_object_of_another_size_is_not_there,
    workers_share_objects,
    clear_forgets_everything_and_the_store_goes_on,
    stats_are_numbers,
)
