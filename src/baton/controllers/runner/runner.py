"""Feeds reconcilers: change -> key -> queue -> observe -> reconcile -> apply -> again when needed.

Used by the embedded cluster and by `baton operator` alike. One switch (:meth:`Runner._outcome`) decides what a pass
means for the queue; no reconciler sees it. All tasks live in the task group of :meth:`Runner.run`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from baton.api.resources import Object, Resource
from baton.cluster_client import Change, Client, ClientError, EventRecorder
from baton.controllers.plan import Action, Bind, Controller, Create, Note, Plan, Trigger
from baton.controllers.runner.apply import Applier, Failure
from baton.controllers.runner.metrics import RunnerMetrics
from baton.controllers.runner.queue import KeyQueue
from baton.controllers.runner.world import CacheWorld

log = logging.getLogger(__name__)
_NUM_QUEUED_EVENTS = 2048


def utc_now() -> datetime:
    return datetime.now(UTC)


class Runner:
    """``num_workers`` passes at once per controller; ``namespace`` None means all of them."""

    def __init__(
        self,
        client: Client,
        controllers: Sequence[Controller[Any]],
        *,
        namespace: str | None = None,
        num_workers: int = 4,
        component: str = "baton",
        now: Callable[[], datetime] = utc_now,
        metrics: RunnerMetrics | None = None,
    ) -> None:
        self.metrics = metrics or RunnerMetrics()
        self.world = CacheWorld(client, controllers, namespace)
        self._controllers = tuple(controllers)
        self._queues = {controller.name: KeyQueue() for controller in controllers}
        self._applier = Applier(client, self.world.caches)
        self._recorder = EventRecorder(client, component)
        self._events: asyncio.Queue[tuple[Object, Note]] = asyncio.Queue(_NUM_QUEUED_EVENTS)
        self._num_workers = num_workers
        self._now = now
        self._ids = itertools.count(1)
        self._is_running = False

    @property
    def is_synced(self) -> bool:
        """True once every cache has its first list and the workers have started."""
        return self._is_running

    @property
    def is_idle(self) -> bool:
        return all(queue.is_idle for queue in self._queues.values())

    async def run(self) -> None:
        """Until cancelled. A bug in a reconciler is logged and retried with back-off; it does not end the runner."""
        async with asyncio.TaskGroup() as tasks:
            for resource, cache in self.world.caches.items():
                cache.subscribe(self._changed(resource))
                tasks.create_task(cache.run(), name=f"watch {resource.full_name}")
            tasks.create_task(self._write_events(), name="events")
            await self.world.synced()
            self._enqueue_everything()
            self._is_running = True
            log.info("controllers run", extra={"controllers": [controller.name for controller in self._controllers]})
            for controller in self._controllers:
                for number in range(self._num_workers):
                    tasks.create_task(self._work(controller), name=f"{controller.name} {number}")

    def _changed(self, resource: Resource) -> Callable[[Change], None]:
        interested = [(c, t) for c in self._controllers for t in c.triggers if t.resource == resource]
        previous: dict[str, Object] = {}

        def handler(change: Change) -> None:
            # A change may concern the keys of the old state too (a label that selected a pod is gone).
            obj = change.object
            if obj is None:
                return
            uid = obj["metadata"]["uid"]
            before = previous.pop(uid, None)
            if change.type != "DELETED":
                previous[uid] = obj
            if self._is_running:
                for controller, trigger in interested:
                    self._enqueue(controller, trigger, obj)
                    if before is not None and before["metadata"].get("labels") != obj["metadata"].get("labels"):
                        self._enqueue(controller, trigger, before)

        return handler

    def _enqueue_everything(self) -> None:
        for controller in self._controllers:
            for trigger in controller.triggers:
                for obj in self.world.all(trigger.resource):
                    self._enqueue(controller, trigger, obj)

    def _enqueue(self, controller: Controller[Any], trigger: Trigger, obj: Object) -> None:
        queue = self._queues[controller.name]
        for key in trigger.keys(obj, self.world):
            queue.add_gathered(key, controller.gather_s)
        self.metrics.waiting.labels(controller.name).set(len(queue))

    async def _work(self, controller: Controller[Any]) -> None:
        queue = self._queues[controller.name]
        while True:
            key = await queue.get()
            started = time.perf_counter()
            try:
                await self._outcome(controller, queue, key)
            finally:
                queue.done(key)
                self.metrics.waiting.labels(controller.name).set(len(queue))
                self.metrics.seconds.labels(controller.name).observe(time.perf_counter() - started)

    async def _outcome(self, controller: Controller[Any], queue: KeyQueue, key: str) -> None:
        """One pass, and what it means for the queue: done, later, or back-off."""
        context = {"controller": controller.name, "key": key, "reconcile_id": next(self._ids)}
        try:
            plan, failures = await self._pass(controller, key, context)
        except ClientError as error:
            outcome, delay_s = "retry", queue.add_after_failure(key)
            log.warning("pass failed", extra=context | {"error": str(error), "retry_after_s": round(delay_s, 3)})
        except Exception:  # a bug of ours: one object must not stop the others; logged with its traceback
            outcome, delay_s = "error", queue.add_after_failure(key)
            log.exception("reconciler is broken", extra=context | {"retry_after_s": round(delay_s, 3)})
        else:
            outcome = "refused" if failures else "ok"
            if failures:
                queue.add_after_failure(key)
            else:
                queue.forget_failures(key)
                if plan.requeue_after_s is not None:
                    queue.add_after(key, max(plan.requeue_after_s, 0.0))
        self.metrics.reconciles.labels(controller.name, outcome).inc()

    async def _pass(self, controller: Controller[Any], key: str, context: dict[str, Any]) -> tuple[Plan, list[Failure]]:
        observed = controller.observe(self.world, key)
        if observed is None:
            return Plan(), []
        plan = controller.reconcile(observed, self._now())
        if plan.actions:
            log.info("applying", extra=context | {"actions": [_describe(action) for action in plan.actions]})
        failures = await self._applier.apply(plan.actions)
        failed = {id(failure.action) for failure in failures}
        for action in plan.actions:
            if id(action) not in failed:
                kind = "Pod" if isinstance(action, Bind) else action.resource.kind
                self.metrics.actions.labels(controller.name, type(action).__name__.lower(), kind).inc()
        primary = controller.primary(observed)
        status = plan.status
        if primary is not None:
            if failures and controller.rejected is not None:
                planned = status if status is not None else primary.get("status") or {}
                reasons = [(failure.action, failure.message) for failure in failures]
                marked = controller.rejected(primary, planned, reasons, self._now())
                status = None if marked == primary.get("status") else marked
            if status is not None:
                await self._applier.write_status(controller.resource, primary, status)
        self._note(plan, failures, primary, context)
        return plan, failures

    def _note(self, plan: Plan, failures: list[Failure], primary: Object | None, context: dict[str, Any]) -> None:
        notes = [] if failures else list(plan.notes)
        for failure in failures:
            log.warning("refused", extra=context | {"action": _describe(failure.action), "error": failure.message})
            notes.append(
                Note(
                    "Warning",
                    f"Failed{type(failure.action).__name__}",
                    f"{_describe(failure.action)}: {failure.message}",
                )
            )
        for note in notes:
            about = note.about or primary
            if about is None:
                continue
            try:
                self._events.put_nowait((about, note))
            except asyncio.QueueFull:
                log.warning("event dropped: too many wait to be written", extra=context | {"reason": note.reason})

    async def _write_events(self) -> None:
        while True:
            about, note = await self._events.get()
            await self._recorder.record(about, note.type, note.reason, note.message)


def _describe(action: Action) -> str:
    if isinstance(action, Create):
        meta = action.obj["metadata"]
        return f"create {action.resource.kind} {meta.get('name') or meta.get('generateName')}"
    if isinstance(action, Bind):
        return f"bind Pod {action.name} to {action.node}"
    verb = type(action).__name__.lower()
    return f"{verb} {action.resource.kind} {action.name}" + (f" ({action.why})" if action.why else "")
