"""Asks each worker whether it is healthy, one task per worker; wakes at once when a request saw something odd.

A worker that has never been healthy is asked every `retry_interval_s` (the router starts before its workers), a healthy
one every `interval_s`. A worker that has stopped answering is stuck, and so are its requests that have had nothing from it
since: they are told, and go elsewhere. Failing tries mark a worker only through `Core.on_connect_failure`; all else is decided here.
"""

import asyncio
import logging

from baton.router.attempt import Attempt
from baton.router.core import Core
from baton.router.dialects import identify, settle_protocol
from baton.router.workers import Worker

_SILENT = " does not answer"
log = logging.getLogger("baton.router")


class HealthChecker:
    """Owns one watching task per worker from `watch` until `forget`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._tasks: dict[Worker, asyncio.Task[None]] = {}
        self._wakes: dict[Worker, asyncio.Event] = {}
        core.wake = self.wake

    def watch(self, worker: Worker) -> None:
        if not self._core.config.health.enabled:
            worker.healthy = True
            worker.problem = ""
            return
        self._wakes[worker] = asyncio.Event()
        self._tasks[worker] = self._core.loop.create_task(self._watch(worker), name=f"health of {worker.url}")

    def wake(self, worker: Worker) -> None:
        if (event := self._wakes.get(worker)) is not None:
            event.set()

    async def forget(self, worker: Worker) -> None:
        self._wakes.pop(worker, None)
        if (task := self._tasks.pop(worker, None)) is not None:
            task.cancel()
            await asyncio.wait([task])

    async def stop(self) -> None:
        for worker in list(self._tasks):
            await self.forget(worker)

    async def _watch(self, worker: Worker) -> None:
        config = self._core.config.health
        failures = successes = 0
        was_healthy = False  # a worker's first good answer is enough; one that failed later must prove itself
        wake = self._wakes[worker]
        seen: dict[Attempt, int] = {}
        while True:
            wake.clear()
            problem, is_certain = await self._problem(worker)
            if problem:
                failures, successes = failures + 1, 0
                if failures == 1:
                    seen = self._core.progress_on(worker)
                if is_certain or not worker.healthy or failures >= config.failure_threshold:
                    self._mark(worker, False, problem)
                    if failures >= config.failure_threshold and problem.endswith(_SILENT):
                        self._release(worker, seen)
            else:
                failures, successes = 0, successes + 1
                if not worker.healthy and (not was_healthy or successes >= config.success_threshold):
                    was_healthy = True
                    self._mark(worker, True, "")
            is_steady = worker.healthy and not failures
            delay_s = config.interval_s if is_steady else min(config.retry_interval_s, config.interval_s)
            try:
                async with asyncio.timeout(delay_s):
                    await wake.wait()
            except TimeoutError:
                pass

    async def _problem(self, worker: Worker) -> tuple[str, bool]:
        """What is wrong (empty: healthy), and whether one such answer is enough to know: nobody listens."""
        config = self._core.config.health
        try:
            answer = await self._core.call(worker, b"GET", config.endpoint.encode(), config.timeout_s)
            if answer.status == 200 and not worker.healthy:
                worker.software = await identify(self._core, worker)
                misfit = settle_protocol(self._core, worker) if self._core.config.pd else ""
                if misfit and misfit != worker.problem:
                    log.error("worker is refused worker=%s role=%s reason=%r", worker.url, worker.role, misfit)
                return misfit, True
        except TimeoutError:
            return f"{config.endpoint}{_SILENT}", False
        except OSError as error:
            return str(error) or type(error).__name__, isinstance(error, ConnectionRefusedError)
        return ("" if answer.status == 200 else f"{config.endpoint} answered {answer.status}"), False

    def _release(self, worker: Worker, seen: "dict[Attempt, int]") -> None:
        """End the tries that have had nothing from `worker` since its first unanswered check (`seen`)."""
        for attempt, reads in self._core.progress_on(worker).items():
            if seen.get(attempt) == reads:
                attempt.give_up_on(worker, "the worker does not answer")

    def _mark(self, worker: Worker, healthy: bool, problem: str) -> None:
        was, worker.healthy, worker.problem = worker.healthy, healthy, problem
        if was == healthy:
            return
        if healthy:
            found = worker.software
            log.info(
                "worker is healthy worker=%s role=%s dialect=%s version=%r",
                worker.url, worker.role, found.dialect, found.version,
            )  # fmt: skip
            if was is False:  # most likely restarted: its caches are empty, its past failures are past
                worker.breaker.reset()
                self._core.registry.policies[worker.role].forget(worker.url)
        elif was:
            log.warning("worker is not healthy worker=%s role=%s reason=%r", worker.url, worker.role, problem)
        else:
            log.info("worker is not ready yet worker=%s role=%s reason=%r", worker.url, worker.role, problem)
