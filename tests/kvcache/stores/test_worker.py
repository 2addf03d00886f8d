"""The worker on a store that works, fails, hangs and comes back: every operation has one last event, and nobody waits."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from tests.fakes.dict_store import DictStore

from baton.kvcache.page_memory import PageMemory
from baton.kvcache.stores.base import StoreConfig
from baton.kvcache.stores.objects import ObjectScheme, PageShape
from baton.kvcache.stores.seal import SEAL_BYTES
from baton.kvcache.stores.worker import StoreWorker, WorkerConfig
from baton.kvcache.tiers import Cancel, Found, Late, PagesRead, Query, Read, StoreEvent, Write, Written

SHAPE = PageShape(layers=range(2), kv_heads=range(3), page_size=4, head_dim=2, dtype="bfloat16", dtype_bytes=2)
NUM_PAGES = 16
LIMIT_S = 10.0
KEYS = [bytes([i]) * 32 for i in range(NUM_PAGES)]


class Bed:
    """A worker over a dict store, its host memory, and a clock that only the test moves."""

    def __init__(self, scheme: str = "default", **config: int | float) -> None:
        self.scheme = ObjectScheme(scheme, SHAPE)
        self.store = DictStore(StoreConfig(object_bytes=self.scheme.object_bytes))
        self.memory = PageMemory.create(NUM_PAGES, SHAPE.page_bytes + SEAL_BYTES)
        self.now = 0.0
        self._woken = threading.Event()
        self._events: list[StoreEvent] = []
        self.gates: list[tuple[threading.Event, threading.Event]] = []
        self.worker = StoreWorker(
            self.store,
            self.scheme,
            self.memory,
            self._woken.set,
            WorkerConfig(**{"max_batch_pages": 2, "first_retry_s": 1.0, **config}),  # type: ignore[arg-type]
            clock=lambda: self.now,
        )

    def fill(self, *pages: int) -> None:
        for page in pages:
            self.memory.array[page] = np.random.default_rng(page).integers(0, 256, self.memory.page_bytes)

    def payload(self, page: int) -> bytes:
        return self.memory.array[page, :-SEAL_BYTES].tobytes()

    def until(self, done: Callable[[list[StoreEvent]], bool]) -> list[StoreEvent]:
        """Poll until `done` holds for the events so far, then hand them over."""
        self._events += self.worker.poll()
        while not done(self._events):
            assert self._woken.wait(LIMIT_S), f"the worker says nothing; so far {self._events}"
            self._woken.clear()
            self._events += self.worker.poll()
        events, self._events = self._events, []
        return events

    def next(self, count: int = 1) -> list[StoreEvent]:
        return self.until(lambda events: len(events) >= count)

    def hang(self, what: str) -> tuple[threading.Event, threading.Event]:
        """The next call of this kind waits; (it has begun, let it go on)."""
        begun, go_on = threading.Event(), threading.Event()

        def before(name: str) -> None:
            if name == what and not begun.is_set():
                begun.set()
                assert go_on.wait(LIMIT_S)

        self.store.before = before
        self.gates.append((begun, go_on))
        return begun, go_on

    def close(self) -> None:
        self.store.before = lambda _: None
        for _, go_on in self.gates:
            go_on.set()
        self.worker.close()
        self.memory.close()


@pytest.fixture(params=["default", "unified"])
def bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    bed = Bed(request.param)
    yield bed
    bed.close()


def test_what_was_written_is_found_and_read_back(bed: Bed) -> None:
    bed.fill(0, 1, 2)
    wanted = [bed.payload(page) for page in (0, 1, 2)]
    bed.worker.do(Write(1, KEYS[:3], [0, 1, 2]))
    assert bed.next() == [Written(1, [True] * 3)]
    bed.worker.do(Query(2, KEYS[:5]))
    assert bed.next() == [Found(2, 3)]
    bed.worker.do(Read(3, KEYS[:3], [10, 11, 12]))
    assert bed.next(2) == [PagesRead(3, 0, [True, True], False), PagesRead(3, 2, [True], True)]
    assert [bed.payload(page) for page in (10, 11, 12)] == wanted
    stats = bed.worker.stats()
    assert (stats["up"], stats["hits"], stats["misses"], stats["pages_read"], stats["pages_written"]) == (1, 3, 2, 3, 3)


def test_all_memory_that_objects_lie_in_is_registered(bed: Bed) -> None:
    spans = [(memory.ctypes.data, memory.ctypes.data + memory.nbytes) for memory in bed.store.registered]
    used: list[int] = []
    bed.store.batch_put = lambda names, objects: [bool(used.append(o.ctypes.data)) or True for o in objects]  # type: ignore[method-assign,func-returns-value]
    bed.worker.do(Write(1, KEYS[:2], [0, 1]))
    bed.next()
    assert used and all(any(start <= address < end for start, end in spans) for address in used)


def test_a_read_ends_at_the_first_hole(bed: Bed) -> None:
    bed.fill(0, 1, 2, 3, 4, 5)
    bed.worker.do(Write(1, [KEYS[0], *KEYS[2:6]], [0, 2, 3, 4, 5]))
    bed.next()
    bed.worker.do(Read(2, KEYS[:6], [10, 11, 12, 13, 14, 15]))
    assert bed.next() == [PagesRead(2, 0, [True, False, False, False, False, False], True)]


@pytest.mark.parametrize("damage", ["flip", "swap"])
def test_damaged_and_swapped_objects_are_misses(bed: Bed, damage: str) -> None:
    bed.fill(0, 1)
    bed.worker.do(Write(1, KEYS[:2], [0, 1]))
    bed.next()
    objects = bed.store.objects
    first, second = bed.scheme.names(KEYS[0])[0], bed.scheme.names(KEYS[1])[0]
    if damage == "flip":
        objects[first] = bytes([objects[first][0] ^ 1]) + objects[first][1:]
    else:
        objects[first] = objects[second]
    bed.worker.do(Read(2, KEYS[:1], [5]))
    assert bed.next() == [PagesRead(2, 0, [False], True)]
    assert bed.worker.stats()["damaged"] == 1
    # A damaged object does not stay: a good one can take its place.
    bed.worker.do(Write(3, KEYS[:1], [0]))
    bed.worker.do(Write(4, KEYS[1:2], [1]))
    bed.next(2)
    bed.worker.do(Read(5, KEYS[:2], [5, 6]))
    assert bed.next() == [PagesRead(5, 0, [True, True], True)]


def test_a_hung_call_is_noticed_and_only_its_own_operation_waits(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    bed.fill(0)
    bed.worker.do(Write(1, KEYS[:1], [0]))
    bed.next()
    begun, go_on = bed.hang("get")
    bed.worker.do(Read(2, KEYS[:1], [5]))
    assert begun.wait(LIMIT_S)
    bed.worker.do(Query(3, KEYS[:1]))
    bed.worker.do(Read(4, KEYS[:1], [6]))
    assert bed.worker.poll() == []
    bed.now = 2.1
    assert bed.worker.poll() == [Late(2), Found(3, 0), PagesRead(4, 0, [False], True)]
    bed.worker.do(Query(5, KEYS[:1]))
    assert bed.worker.poll() == [Found(5, 0)]
    assert bed.worker.stats()["up"] == 0 and bed.worker.stats()["timeouts"] == 1
    assert [record.message for record in caplog.records if "store down for reads" in record.message]

    go_on.set()
    assert bed.next() == [PagesRead(2, 0, [True], True)]
    bed.now = 10.0
    recover(bed)


def recover(bed: Bed) -> None:
    """The probe that is due passes on the lane's thread, and then the first real call."""
    pause = threading.Event()
    for op in range(100, 100 + int(LIMIT_S * 500)):
        bed.worker.do(Query(op, KEYS[:1]))
        if bed.next() == [Found(op, 1)]:
            assert bed.worker.stats()["up"] == 1
            return
        pause.wait(0.002)
    raise AssertionError("the store is not used again")


def test_failures_in_a_row_take_it_down_and_it_comes_back(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    bed.fill(0)
    bed.worker.do(Write(1, KEYS[:1], [0]))
    bed.next()

    def fail(_: str) -> None:
        raise ConnectionError("the store is not there")

    bed.store.before = fail
    for op in range(3):
        bed.worker.do(Query(op, KEYS[:1]))
        assert bed.next() == [Found(op, 0)]
    num_calls = len(bed.store.calls)
    bed.worker.do(Query(9, KEYS[:1]))
    assert bed.worker.poll() == [Found(9, 0)] and len(bed.store.calls) == num_calls
    assert [r.message for r in caplog.records if "ConnectionError: the store is not there" in r.message]
    bed.store.before = lambda _: None
    bed.now = 1.5
    recover(bed)
    assert sum("store down" in r.message for r in caplog.records) == 1
    assert sum("store up again" in r.message for r in caplog.records) == 1


def test_cancel_ends_a_queued_operation_at_once_and_a_running_one_after_its_batch(bed: Bed) -> None:
    bed.fill(*range(6))
    bed.worker.do(Write(1, KEYS[:6], list(range(6))))
    bed.next()
    begun, go_on = bed.hang("get")
    bed.worker.do(Read(2, KEYS[:6], [6, 7, 8, 9, 10, 11]))
    bed.worker.do(Read(3, KEYS[:1], [12]))
    assert begun.wait(LIMIT_S)
    bed.worker.do(Cancel(3))
    assert bed.worker.poll() == [PagesRead(3, 0, [False], True)]
    bed.worker.do(Cancel(2))
    go_on.set()
    assert bed.next(2) == [PagesRead(2, 0, [True, True], False), PagesRead(2, 2, [False] * 4, True)]


def test_queries_overtake_bulk_reads(bed: Bed) -> None:
    bed.fill(*range(6))
    bed.worker.do(Write(1, KEYS[:6], list(range(6))))
    bed.next()
    begun, go_on = bed.hang("get")
    bed.worker.do(Read(2, KEYS[:6], [6, 7, 8, 9, 10, 11]))
    assert begun.wait(LIMIT_S)
    bed.worker.do(Query(3, KEYS[:2]))
    go_on.set()
    kinds = [type(event).__name__ for event in bed.next(4)]
    assert kinds == ["PagesRead", "Found", "PagesRead", "PagesRead"]


def test_a_full_store_refuses_and_stays_up(bed: Bed) -> None:
    bed.store.is_full = True
    for op in range(5):
        bed.worker.do(Write(op, KEYS[:2], [0, 1]))
        assert bed.next() == [Written(op, [False, False])]
    assert bed.worker.stats()["up"] == 1 and bed.worker.stats()["refused"] == 10


def test_more_than_the_queue_holds_is_answered_at_once() -> None:
    bed = Bed(max_queued_pages=4)
    begun, go_on = bed.hang("put")
    bed.worker.do(Write(1, KEYS[:3], [0, 1, 2]))
    assert begun.wait(LIMIT_S)
    bed.worker.do(Write(2, KEYS[:2], [3, 4]))
    assert bed.worker.poll() == [Written(2, [False, False])]
    go_on.set()
    assert bed.next() == [Written(1, [True] * 3)]
    bed.close()


@pytest.mark.parametrize("answer", [[], [True, True], None, 7])
def test_answers_of_the_wrong_shape_take_it_down(bed: Bed, answer: Any) -> None:
    bed.store.batch_get = lambda names, targets: answer  # type: ignore[method-assign]
    for op in range(3):
        assert bed.worker.stats()["up"] == 1
        bed.worker.do(Query(9, []))  # good answers of another kind do not make up for it
        assert bed.next() == [Found(9, 0)]
        bed.worker.do(Read(op, KEYS[:1], [5]))
        assert bed.next() == [PagesRead(op, 0, [False], True)]
    assert bed.worker.stats()["errors"] == 3 and bed.worker.stats()["up"] == 0


@pytest.mark.parametrize("answer", [0.5, None, -1, 4, "1"])
def test_a_count_that_is_none_is_nothing_found(bed: Bed, answer: Any) -> None:
    bed.store.batch_exists = lambda names: answer  # type: ignore[method-assign]
    bed.worker.do(Query(1, KEYS[:1]))
    assert bed.next() == [Found(1, 0)]
    assert bed.worker.stats()["errors"] == 1


def test_a_store_that_exits_ends_its_call_and_not_the_thread(bed: Bed) -> None:
    def leave(_: str) -> None:
        sys.exit(1)

    bed.store.before = leave
    for op in range(2):
        bed.worker.do(Read(op, KEYS[:1], [5]))
        assert bed.next() == [PagesRead(op, 0, [False], True)]


@pytest.mark.parametrize("numbers", [{"one": "text"}, {"one": None}, None])
def test_numbers_that_are_none_cost_nothing_but_themselves(bed: Bed, numbers: Any) -> None:
    bed.store.stats = lambda: numbers  # type: ignore[method-assign]
    bed.fill(0)
    bed.worker.do(Write(1, KEYS[:1], [0]))
    assert bed.next() == [Written(1, [True])]
    stats = bed.worker.stats()
    assert stats["up"] == 1 and not any(name.startswith("store_") for name in stats)


def test_names_that_metrics_cannot_have_are_left_out(bed: Bed) -> None:
    bed.store.stats = lambda: {"used-bytes": 1, "free_bytes": 2}  # type: ignore[method-assign]
    bed.worker.do(Query(1, KEYS[:1]))
    bed.next()
    assert [name for name in bed.worker.stats() if name.startswith("store_")] == ["store_free_bytes"]


def test_clear_empties_the_store(bed: Bed) -> None:
    bed.worker.do(Write(1, KEYS[:2], [0, 1]))
    bed.next()
    assert bed.worker.clear().result(LIMIT_S)
    assert not bed.store.objects


def test_close_answers_everything_and_leaves_a_hanging_store_alone() -> None:
    bed = Bed()
    begun, go_on = bed.hang("get")
    bed.worker.do(Read(1, KEYS[:4], [0, 1, 2, 3]))
    bed.worker.do(Read(2, KEYS[:1], [4]))
    assert begun.wait(LIMIT_S)
    bed.worker.close(timeout_s=0.01)
    assert bed.worker.poll() == [PagesRead(2, 0, [False], True)]
    assert not bed.store.closed.is_set()
    go_on.set()
    assert bed.next() == [PagesRead(1, 0, [False] * 4, True)]
    bed.memory.close()


def test_close_can_finish_the_writes_that_are_queued() -> None:
    bed = Bed()
    begun, go_on = bed.hang("put")
    for op in range(3):
        bed.worker.do(Write(op, KEYS[4 * op : 4 * op + 4], [0, 1, 2, 3]))
    assert begun.wait(LIMIT_S)
    go_on.set()
    bed.worker.close(drain_s=LIMIT_S)
    assert bed.worker.poll() == [Written(op, [True] * 4) for op in range(3)]
    assert len(bed.store.objects) == 12 and bed.store.closed.is_set()
    bed.memory.close()


def test_stats_carry_the_stores_own(bed: Bed) -> None:
    assert bed.worker.stats()["store_num_objects"] == 0
    assert isinstance(bed.worker.clear(), Future)
