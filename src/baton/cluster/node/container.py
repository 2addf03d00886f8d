"""One container of one pod over all its attempts: start, end, back-off, restart, probes, hooks.

Owns the container's record on disk (attempt number, last end, back-off), so that an agent that starts anew goes on where
the old one was. `pod_worker` says when to `step`; how processes are started is `runtime`'s and `supervised`'s affair.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from baton.cluster.node import lifecycle, logs, probes
from baton.cluster.node.backoff import Backoff, should_restart
from baton.cluster.node.environment import ContainerConfigError, Object
from baton.cluster.node.images import CatalogueError, ImageMapping
from baton.cluster.node.plan import PodContext, build
from baton.cluster.node.probes import Change, Prober, ProbeTarget
from baton.cluster.node.record import Record, definition_of, go_duration, terminated
from baton.cluster.node.runtime import PlanError, Runtime
from baton.cluster.node.slots import Slot
from baton.cluster.node.status import ContainerSnapshot, rfc3339
from baton.cluster.node.supervised import Exit, Launch, StartError, Supervised, read_launch

EventType = Literal["Normal", "Warning"]
MIN_PRE_STOP_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a container needs of its agent and its pod. `event(kind, reason, message)` is about the pod."""

    runtime: Runtime
    find_image: Callable[[str], ImageMapping]
    backoff: Backoff
    now: Callable[[], float]
    wake: Callable[[], None]
    event: Callable[[EventType, str, str], None]
    probe_scale: float = 1.0


class Container:
    """`process` is the latest attempt: None before the first, else running or ended."""

    def __init__(self, spec: Object, slot: Slot, policy: str, around: Surroundings, *, is_init: bool = False) -> None:
        self.spec = spec
        self.name = str(spec["name"])
        self.policy = policy
        self.is_init = is_init
        self.process: Supervised | None = None
        self.is_ready = False
        self._slot, self._around = slot, around
        self._dir = slot.container_dir(self.name)
        self._record = Record.load(self._dir)
        self._waiting = ("PodInitializing" if not is_init else "", "")
        self._launch: Launch | None = None
        self._prober: Prober | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._restart_at_once = False
        self._told_backoff = False
        self._handled_end = False

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.exit is None

    @property
    def is_started(self) -> bool:
        """Running, its postStart hook over and its startup probe (if any) passed."""
        return self.is_running and self._record.was_started

    @property
    def exit(self) -> Exit | None:
        return None if self.process is None else self.process.exit

    @property
    def is_done(self) -> bool:
        """Ended for good under its restart policy."""
        end = self.exit
        return end is not None and not self._restart_at_once and not should_restart(self.policy, end.code)

    @property
    def restart_count(self) -> int:
        return max(0, self._record.attempt - 1)

    def mark(self, attempt: int) -> str:
        return f"{self._slot.uid}/{self.name}/{attempt}"

    def log_file(self, *, previous: bool = False) -> Path:
        return self._slot.log_path(self.name, self._record.attempt - (1 if previous else 0))

    @property
    def has_previous(self) -> bool:
        return self._record.attempt > 1

    def enter(self, command: list[str]) -> Launch:
        """The launch of another process in this container. Raises `ContainerConfigError` when it does not run."""
        if self._launch is None or not self.is_running:
            raise ContainerConfigError(f"container {self.name} is not running")
        return self._around.runtime.enter(self._launch, command)

    # -- life ----------------------------------------------------------------------------------------------------

    def adopt(self, *, was_ready: bool = False) -> None:
        """Take over what an earlier agent started for this container, if anything.

        What was ready when that agent died stays so until a probe says otherwise: nobody's traffic need move.
        """
        if self._record.attempt == 0:
            return
        directory = self._dir / str(self._record.attempt)
        if not (directory / "launch.json").exists():
            self._record.attempt -= 1  # killed between the record and the start: that attempt never was
            if self._record.attempt == 0:
                return
            directory = self._dir / str(self._record.attempt)
        self.process = Supervised.adopt(directory, self.mark(self._record.attempt))
        self._launch = read_launch(directory)
        self.process.on_end = self._around.wake
        if self.process.exit is not None and (self.process.exit.is_lost or (directory / "stop.json").exists()):
            self._record.wait_s = 0.0  # the cluster or the machine was stopped: not the container's failure
        if self.is_running:
            self._start_probes()
            self.is_ready = self.is_ready or (was_ready and self._record.was_started)

    async def step(self, context: PodContext) -> float | None:
        """Do what is due. Seconds until something is due again; None: nothing before a wake-up."""
        if self._stopping is not None:
            return None
        if self.process is None:
            await self._start(context)
            return None
        if self.process.exit is None:
            if self._record.definition != definition_of(self.spec):
                self._around.event("Normal", "Killing", f"Container {self.name} definition changed, will be restarted")
                self._restart_at_once = True
                self.stop(lifecycle.grace_s(context.pod))
            return None
        return await self._after_end(self.process.exit, context)

    async def _after_end(self, end: Exit, context: PodContext) -> float | None:
        if not self._handled_end:
            await self._on_end(end)
        restarts = should_restart(self.policy, end.code)
        changed = restarts and self._record.definition != definition_of(self.spec)
        if self._restart_at_once or changed:
            self._record.wait_s = 0.0
            await self._start(context)
            return None
        if not restarts:
            return None
        left_s = end.finished_at + self._record.wait_s - self._around.now()
        if left_s > 0:
            wait = f"{go_duration(self._record.wait_s)}"
            where = f"{self._slot.name}_{self._slot.namespace}({self._slot.uid})"
            self._waiting = (
                "CrashLoopBackOff", f"back-off {wait} restarting failed container={self.name} pod={where}"
            )  # fmt: skip
            if not self._told_backoff:
                self._told_backoff = True
                self._around.event(
                    "Warning", "BackOff", f"Back-off restarting failed container {self.name} in pod {where}"
                )
            return left_s
        await self._start(context)
        return None

    async def _on_end(self, end: Exit) -> None:
        self._handled_end = True
        self._told_backoff = False
        self.is_ready = False
        self._record.was_started = False
        await self._end_probes()
        if end.error is not None:
            self._around.event("Warning", "Failed", f'Error: failed to start container "{self.name}": {end.error}')
        self._record.wait_s = self._around.backoff.after_run(self._record.wait_s, end.finished_at - end.started_at)
        self._record.save(self._dir)

    async def _start(self, context: PodContext) -> None:
        """The next attempt. A container that cannot be configured waits and is tried again at the next step."""
        image = self._image(context)
        if image is None:
            return
        where = f"spec.{'initContainers' if self.is_init else 'containers'}.{self.name}"
        try:
            probes.check(self.spec, where)
            lifecycle.check(self.spec, where)
            plan = build(context, self.spec, image)
            _empty(plan.scratch)
            plan.shm.mkdir(parents=True, exist_ok=True, mode=0o777)
            launch = await asyncio.to_thread(self._around.runtime.launch, plan)
        except (ContainerConfigError, PlanError) as problem:
            self._cannot_start("CreateContainerConfigError", str(problem))
            return
        except OSError as error:
            self._cannot_start("CreateContainerError", str(error))
            return
        await self._begin(context, image, launch)

    def _image(self, context: PodContext) -> ImageMapping | None:
        name = str(self.spec.get("image") or "")
        try:
            found = self._around.find_image(name)
        except CatalogueError as error:
            self._cannot_start("InvalidImageName", str(error))
            return None
        kind: EventType = "Warning" if found.is_unknown else "Normal"
        said = f'Image "{name}" is not pulled: it stands for {found.image_id}'
        if found.is_unknown:
            said = f'Image "{name}" is in no entry of the image catalogue: runs with this machine\'s programs'
        self._around.event(kind, "Pulled", said)
        return found.resolve(context.slot.address)

    async def _begin(self, context: PodContext, image: ImageMapping, launch: Launch) -> None:
        if self.exit is not None:
            self._record.previous = terminated(self.exit, self._tail())
        self._record.attempt += 1
        self._record.definition = definition_of(self.spec)
        self._record.image, self._record.image_id = str(self.spec.get("image") or ""), image.image_id
        if self.exit is not None and not self._restart_at_once:
            self._record.wait_s = self._around.backoff.after_restart(self._record.wait_s)
        self._record.was_started = False
        self._record.save(self._dir)
        self._forget_old()
        if launch.error is not None and image.hint:
            launch = replace(launch, error=f"{launch.error} ({image.hint})")
        attempt = self._record.attempt
        log = self._slot.log_path(self.name, attempt)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._launch, self._handled_end, self._restart_at_once = launch, False, False
        try:
            self.process = await Supervised.start(self._dir / str(attempt), launch, log, self.mark(attempt))
        except StartError as error:
            self.process = None
            self._cannot_start("CreateContainerError", str(error))
            return
        self.process.on_end = self._around.wake
        self._around.event("Normal", "Created", f"Created container: {self.name}")
        if self.process.exit is not None and self.process.exit.error is not None:
            self._around.wake()
            return
        self._around.event("Normal", "Started", f"Started container {self.name}")
        self._waiting = ("", "")
        await self._post_start(context)
        if self.is_running:
            self._start_probes()
        self._around.wake()

    async def _post_start(self, context: PodContext) -> None:
        problem = await lifecycle.run(self.spec, "postStart", self._target(), lifecycle.POST_START_TIMEOUT_S)
        if problem is not None:
            self._around.event("Warning", "FailedPostStartHook", f"PostStartHook failed: {problem}")
            self.stop(lifecycle.grace_s(context.pod))

    def _cannot_start(self, reason: str, message: str) -> None:
        if self._waiting != (reason, message):
            self._around.event("Warning", "Failed", f"Error: {message}")
        self._waiting = (reason, message)

    # -- end -----------------------------------------------------------------------------------------------------

    def stop(self, grace_s: float) -> None:
        """Begin to end the running attempt: preStop hook, SIGTERM, SIGKILL after the grace. Safe to call again."""
        process = self.process
        if process is None or process.exit is not None:
            return
        if self._stopping is not None:
            process.stop(grace_s)  # shortens the grace that runs already
            return
        self._stopping = asyncio.create_task(
            self._stop(process, grace_s), name=f"stop {self.mark(self._record.attempt)}"
        )

    async def _stop(self, process: Supervised, grace_s: float) -> None:
        try:
            loop = asyncio.get_running_loop()
            began = loop.time()
            if grace_s > 0 and (self.spec.get("lifecycle") or {}).get("preStop"):
                problem = await lifecycle.run(self.spec, "preStop", self._target(), grace_s)
                if problem is not None:
                    self._around.event("Warning", "FailedPreStopHook", f"PreStopHook failed: {problem}")
                grace_s = max(MIN_PRE_STOP_GRACE_S, grace_s - (loop.time() - began))
            process.stop(grace_s)
            await process.ended.wait()
        finally:
            self._stopping = None
            self._around.wake()

    async def ended(self) -> None:
        """Wait until nothing of this container runs."""
        if self.process is not None:
            await self.process.ended.wait()
            if self.process.exit is not None and not self._handled_end:
                await self._on_end(self.process.exit)

    async def release(self) -> None:
        """The agent ends: leave the process alone, stop watching it."""
        await self._end_probes()
        if self._stopping is not None:
            self._stopping.cancel()
            await asyncio.gather(self._stopping, return_exceptions=True)
        if self.process is not None:
            self.process.release()

    # -- probes --------------------------------------------------------------------------------------------------

    def _target(self) -> ProbeTarget:
        ports = {str(one["name"]): int(one["containerPort"]) for one in self.spec.get("ports") or [] if one.get("name")}
        return ProbeTarget(self._slot.address, ports, self.enter, self._around.probe_scale)

    def _start_probes(self) -> None:
        if not self.spec.get("startupProbe"):
            self._record.was_started = True
        self.is_ready = self._record.was_started and not self.spec.get("readinessProbe")
        self._record.save(self._dir)
        self._prober = Prober(self.spec, self._target(), self._on_probe)

    async def _end_probes(self) -> None:
        if self._prober is not None:
            prober, self._prober = self._prober, None
            await prober.close()

    def _on_probe(self, change: Change) -> None:
        if change.is_ok is None:
            self._around.event("Warning", "Unhealthy", change.message)
            return
        if change.kind == "readiness":
            self.is_ready = change.is_ok
        elif change.kind == "startup" and change.is_ok:
            self._record.was_started = True
            self.is_ready = not self.spec.get("readinessProbe")
            self._record.save(self._dir)
        elif not change.is_ok:
            text = f"Container {self.name} failed {change.kind} probe, will be restarted"
            self._around.event("Normal", "Killing", text)
            self.stop(30.0 if change.grace_s is None else change.grace_s)
        self._around.wake()

    # -- what others see -----------------------------------------------------------------------------------------

    def wait_for(self, reason: str, message: str = "") -> None:
        """Say what a container that has not started waits for."""
        if self.process is None:
            self._waiting = (reason, message)

    def snapshot(self) -> ContainerSnapshot:
        state: dict[str, Any]
        last = self._record.previous
        end = self.exit
        if self.process is None:
            state = {"waiting": _without_empty(reason=self._waiting[0] or "PodInitializing", message=self._waiting[1])}
        elif end is None:
            state = {"running": {"startedAt": rfc3339(self.process.started_at)}}
        elif self.is_done or self._waiting[0] == "":
            state = {"terminated": terminated(end, self._tail())}
        else:
            state = {"waiting": _without_empty(reason=self._waiting[0], message=self._waiting[1])}
            last = terminated(end, self._tail())
        return ContainerSnapshot(
            name=self.name,
            image=self._record.image or str(self.spec.get("image") or ""),
            image_id=self._record.image_id,
            container_id=f"baton://{self.mark(self._record.attempt)}" if self._record.attempt else "",
            state=state,
            last_state={"terminated": last} if last else {},
            is_ready=self.is_ready and self.is_running,
            is_started=self.is_started,
            restart_count=self.restart_count,
            has_run=self.process is not None,
            exit_code=None if end is None else end.code,
            is_done=self.is_done,
        )

    def _tail(self) -> str:
        end = self.exit
        return "" if end is None or end.code == 0 else end.error or logs.last_lines(self.log_file())

    def _forget_old(self) -> None:
        """Keep the previous attempt and its log, as a kubelet does; remove older ones."""
        for number in range(self._record.attempt - 2, 0, -1):
            directory = self._dir / str(number)
            if not directory.exists():
                return
            shutil.rmtree(directory, ignore_errors=True)
            for path in logs.files_of(self._slot.log_path(self.name, number)):
                path.unlink(missing_ok=True)


def _without_empty(**values: str) -> dict[str, str]:
    return {key: value for key, value in values.items() if value}


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, mode=0o700)
