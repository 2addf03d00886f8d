"""The one background thread of a transfer: its event loop, its copy executor and its way back to the rank's loop.

What runs on it is the business of `prefill` and `decode`; nothing else of this room starts a thread.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from baton.transfer.base import Event, Wake

log = logging.getLogger(__name__)
T = TypeVar("T")

_CLOSE_TIMEOUT_S = 10.0


class TransferThread:
    """Daemon thread: a worker that must exit is never held up by a peer."""

    def __init__(self, name: str, copy_threads: int, wake: Wake) -> None:
        self.loop = asyncio.new_event_loop()
        self._copies = ThreadPoolExecutor(copy_threads, thread_name_prefix=f"{name}-copy")
        self._events: deque[Event] = deque()
        self._wake = wake
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # From the rank's loop

    def post(self, call: Callable[[], None]) -> None:
        """Run `call` on the thread, in the order of posting. After `close` nothing is run."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(call)

    def ask(self, call: Callable[[], T]) -> T:
        """Run `call` on the thread and wait for what it returns or raises (set-up and tests only: this blocks)."""

        async def run() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(_CLOSE_TIMEOUT_S)

    def take_events(self) -> list[Event]:
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def close(self, stop: Callable[[], None]) -> None:
        """Run `stop` on the thread, end its tasks and wait for it. Safe to call twice."""
        if self.loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._stop(stop), self.loop)
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log.error("transfer thread did not stop", extra={"thread_name": self._thread.name})

    # On the thread

    def emit(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a task that this thread owns; `close` cancels it. `work` handles its own failures."""
        task = self.loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def copy(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Run `work` (copying, summing: no Python state but its arguments) on a copy thread. In order of submission."""
        return self.loop.run_in_executor(self._copies, work)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("transfer task failed", exc_info=error, extra={"task": task.get_name()})

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()

    async def _stop(self, stop: Callable[[], None]) -> None:
        stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Copies end within one page. Their results come back as callbacks of callbacks, which run before we stop.
        self._copies.shutdown(wait=True)
        for _ in range(3):
            await asyncio.sleep(0)
        self.loop.stop()
