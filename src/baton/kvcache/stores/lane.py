"""One direction of a store: a thread that makes one call at a time, its bounded queue, its breaker.

The thread waits for work and for nothing else; time passes only through `check`, which the worker calls now and then. A call
that hangs keeps its own job (the back end has that job's pages in its hands), which is told to be late; everything behind it is
answered at once.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from baton.kvcache.stores.breaker import Breaker
from baton.kvcache.stores.jobs import Bench, ClearJob, Job, QueryJob, ReadJob, exists
from baton.kvcache.tiers import Late, StoreEvent

logger = logging.getLogger(__name__)

_PROBE_NAME = "baton-probe"


class _CallError(Exception):
    """A call into the store raised; it is counted and told already."""


class _ClosingError(Exception):
    """The lane's thread is to end."""


class Lane:
    def __init__(
        self,
        name: str,
        bench: Bench,
        breaker: Breaker,
        emit: Callable[[StoreEvent], None],
        clock: Callable[[], float],
        call_timeout_s: float,
        max_queued_pages: int,
    ) -> None:
        self.name, self.bench, self.breaker = name, bench, breaker
        self._emit, self._clock = emit, clock
        self._call_timeout_s, self._max_queued_pages = call_timeout_s, max_queued_pages
        self._ready = threading.Condition()
        """Guards everything below."""
        self._urgent: deque[Job] = deque()
        self._queue: deque[Job] = deque()
        self._queued_pages = 0
        # Invariant: a job is in one of the two queues, or it is `_running`, or its last event was emitted.
        self._running: Job | None = None
        self._called_at: float | None = None
        """When the call that is under way began."""
        self._called = ""
        """Its kind."""
        self._told_late = False
        """The call under way has been counted as a time-out."""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"store-{name}", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        with self._ready:
            self._check()
            full = self._queued_pages + job.num_pages > self._max_queued_pages
            if self._closing or self.breaker.is_down or self._is_late() or full:
                self.bench.counters.rejected += 1
                self._answer(job.give_up())
                return
            (self._urgent if isinstance(job, QueryJob | ClearJob) else self._queue).append(job)
            self._queued_pages += job.num_pages
            self._ready.notify_all()

    def cancel(self, op: int) -> None:
        with self._ready:
            if self._running is not None and self._running.op == op:
                self._running.cancelled = True
            for queue in (self._urgent, self._queue):
                for job in [job for job in queue if job.op == op]:
                    queue.remove(job)
                    self._end(job)

    def check(self) -> bool:
        """Notice a call past its deadline and a probe that is due. True while there is something to watch."""
        with self._ready:
            self._check()
            return self._queued_pages > 0 or self.breaker.is_down

    @property
    def is_up(self) -> bool:
        return not self.breaker.is_down

    def close(self, drain_s: float, timeout_s: float) -> bool:
        """Finish what is queued for up to `drain_s`, answer the rest, and end the thread. False if a call still hangs after
        `timeout_s`."""
        with self._ready:
            self._ready.wait_for(lambda: self._queued_pages == 0, drain_s)
            self._closing = True
            self._flush()
            self._ready.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- under the lock

    def _check(self) -> None:
        if self._is_late() and not self._told_late:
            self._told_late = True
            self.bench.counters.timeouts += 1
            if isinstance(self._running, QueryJob | ReadJob):
                self._answer(Late(self._running.op))
            self._down_if(
                self.breaker.open(self._clock(), self._called), f"a call has not returned in {self._call_timeout_s:g} s"
            )
        if self._probe_due():
            self._ready.notify_all()

    def _is_late(self) -> bool:
        return self._called_at is not None and self._clock() - self._called_at > self._call_timeout_s

    def _probe_due(self) -> bool:
        return self.breaker.is_down and self._called_at is None and self._clock() >= self.breaker.retry_at

    def _down_if(self, just_now: bool, why: str) -> None:
        if self.breaker.is_down:
            self._flush()
        if just_now:
            logger.warning(
                "store down for %s: %s. Requests go on without it; it is probed until it answers (next in %.1f s). "
                "Check the store and --hicache-storage-backend-extra-config.",
                self.name,
                why,
                self.breaker.retry_at - self._clock(),
            )

    def _flush(self) -> None:
        for queue in (self._urgent, self._queue):
            while queue:
                self.bench.counters.rejected += 1
                self._end(queue.popleft())

    def _end(self, job: Job) -> None:
        self._queued_pages -= job.num_pages
        self._answer(job.give_up())

    def _answer(self, event: StoreEvent | None) -> None:
        if event is not None:
            self._emit(event)

    def _failed(self, why: str) -> None:
        self._down_if(self.breaker.failed(self._clock(), self._called), why)

    def _wait_for_work(self) -> Job | None:
        """The next job, which stays in the account of its queue until it ends; None for a probe."""
        while True:
            if self._closing:
                raise _ClosingError
            for queue in (self._urgent, self._queue):
                if queue:
                    return queue.popleft()
            if self._probe_due():
                return None
            self._ready.wait()

    # -- the lane's thread

    def _run(self) -> None:
        while True:
            try:
                with self._ready:
                    self._running = job = self._wait_for_work()
            except _ClosingError:
                return
            if job is None:
                self._probe()
            else:
                self._step(job)

    def _step(self, job: Job) -> None:
        event, ended, failed = None, False, False
        try:
            event, ended = job.step(self._call)
        except _CallError:
            failed = True
        with self._ready:
            self._running = None
            self._answer(event)
            if ended:
                self._queued_pages -= job.num_pages
            elif failed or self._closing or job.cancelled or self.breaker.is_down:
                self._end(job)
            else:
                (self._urgent if isinstance(job, QueryJob) else self._queue).appendleft(job)
            if self._queued_pages == 0:
                self._ready.notify_all()

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._ready:
            called_at = self._called_at = self._clock()
            self._called = what
            self._told_late = False
        failure: BaseException | None = None
        result = None
        try:
            result = function(*arguments)
        except BaseException as error:  # Whatever it raises, sys.exit() too, means "not well"; the breaker tells.
            failure = error
        self.bench.numbers.refresh()
        with self._ready:
            self._called_at = None
            took_s = self._clock() - called_at
            self.bench.counters.seconds[what] += took_s
            self._judge(failure, took_s)
        if failure is not None:
            raise _CallError from failure
        return result

    def _judge(self, failure: BaseException | None, took_s: float) -> None:
        if failure is not None:
            self.bench.counters.errors += 1
        if self._told_late:
            return
        if failure is not None:
            self._failed(f"{type(failure).__name__}: {failure}")
        elif took_s > self._call_timeout_s:
            self.bench.counters.timeouts += 1
            self._failed(f"a call took {took_s:.1f} s")
        elif self.breaker.succeeded(self._called):
            logger.warning("store up again for %s", self.name)

    def _probe(self) -> None:
        with contextlib.suppress(_CallError):
            self._call("query", exists, self.bench.store, [_PROBE_NAME])
            with self._ready:
                if not self._told_late:
                    self.breaker.probed()
