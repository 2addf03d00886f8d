"""One pod on this node, from its slot to its end: a level-based loop that compares the pod with what runs.

Each wake-up (the pod changed, a container ended, a probe turned, time passed) runs `_sync` once: it looks at everything
anew, so no event can be missed, only be early. What a container does by itself is `container`'s; how the status reads is
`status`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.cluster.node import lifecycle, status, volumes
from baton.cluster.node.backoff import Backoff
from baton.cluster.node.container import Container, EventType, Surroundings
from baton.cluster.node.images import Catalogue
from baton.cluster.node.objects import Objects
from baton.cluster.node.plan import PodContext
from baton.cluster.node.runtime import Runtime
from baton.cluster.node.slots import AddressError, Slot, SlotStore
from baton.cluster.node.status import PodSnapshot
from baton.cluster.node.volumes import VolumeError
from baton.cluster_client import Client, ClientError, EventRecorder, NotFound, Object
from baton.cluster_client.resources import PODS

log = logging.getLogger(__name__)
RETRY_S = 2.0
"""After a problem that no event may announce the end of: a directory that appears, a server that answers again."""
TERMINAL = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class NodeServices:
    """What all pods of the agent share."""

    client: Client
    objects: Objects
    slots: SlotStore
    catalogue: Catalogue
    runtime: Runtime
    backoff: Backoff
    now: Callable[[], float]
    directories: Mapping[str, Path]
    default_volume: Callable[[], Path] | None
    allocatable: Callable[[str], Mapping[str, str]]
    write_hosts: Callable[[Object, Slot], None]
    probe_scale: float = 1.0


class PodWorker:
    """The pod `pod`; `run` returns when nothing of it is left."""

    def __init__(self, pod: Object, shared: NodeServices, slot: Slot | None = None) -> None:
        self.pod = pod
        self.uid = str(pod["metadata"]["uid"])
        self.slot = slot
        self.containers: dict[str, Container] = {}
        self._shared = shared
        self._wake = asyncio.Event()
        self._is_gone = False
        self._is_stopping = False
        self._was_told_to_stop = False
        self._adopt = slot is not None
        self._init: list[Container] = []
        self._main: list[Container] = []
        self._context: PodContext | None = None
        self._volume_problem = ""
        self._started_at = shared.now()
        recorder = EventRecorder(shared.client, "kubelet", host=str(pod["spec"].get("nodeName") or ""))
        self._recorder = recorder
        self._events: asyncio.Queue[tuple[EventType, str, str]] = asyncio.Queue()

    # -- from the agent ------------------------------------------------------------------------------------------

    def update(self, pod: Object) -> None:
        self.pod = pod
        self._wake.set()

    def wake(self) -> None:
        """Something the pod refers to changed."""
        self._wake.set()

    def gone(self) -> None:
        """The pod is no longer in the API: end it at once."""
        self._is_gone = True
        self._wake.set()

    async def run(self) -> None:
        """Until the pod is gone. Cancelling leaves its processes running, for the next agent."""
        events = asyncio.create_task(self._write_events(), name=f"events of {self._name}")
        try:
            while True:
                self._wake.clear()
                delay_s = await self._sync_safely()
                if delay_s is _FINISHED:
                    break
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), delay_s)
            await self._events.join()
        finally:
            events.cancel()
            for container in self.containers.values():
                await container.release()

    @property
    def _name(self) -> str:
        return f"{self.pod['metadata']['namespace']}/{self.pod['metadata']['name']}"

    # -- the loop ------------------------------------------------------------------------------------------------

    async def _sync_safely(self) -> float | None:
        try:
            return await self._sync()
        except ClientError as error:
            log.warning("pod not synchronised", extra={"pod": self._name, "error": str(error)})
        except Exception as error:  # one pod's trouble must not end the agent; it is logged, told, and tried again
            log.exception("pod failed to synchronise", extra={"pod": self._name})
            self._event("Warning", "FailedSync", f"Error syncing pod: {error}")
        return RETRY_S

    async def _sync(self) -> float | None:
        if self._is_gone:
            await self._finish(0.0)
            return _FINISHED
        if self.pod["metadata"].get("deletionTimestamp"):
            return await self._terminate()
        if (self.pod.get("status") or {}).get("phase") in TERMINAL and not self.containers and self.slot is None:
            return None
        if not self._open_slot():
            await self._publish()
            return RETRY_S
        assert self.slot is not None
        self._refresh_containers()
        context = self._prepare()
        if context is None:
            await self._publish()
            return RETRY_S
        delay_s = await self._step_all(context)
        await self._publish()
        return delay_s

    def _open_slot(self) -> bool:
        if self.slot is None:
            meta = self.pod["metadata"]
            try:
                self.slot = self._shared.slots.open(
                    self.uid, meta["namespace"], meta["name"], str(self.pod["spec"].get("nodeName") or "")
                )
            except (AddressError, OSError) as error:
                self._event("Warning", "FailedCreatePodSandBox", f"Failed to create pod sandbox: {error}")
                return False
        if not self.containers:
            self._make_containers(self.slot)
            self._say_what_is_ignored()
        self._shared.write_hosts(self.pod, self.slot)
        return True

    def _make_containers(self, slot: Slot) -> None:
        spec = self.pod["spec"]
        policy = str(spec.get("restartPolicy") or "Always")
        around = Surroundings(
            self._shared.runtime, self._shared.catalogue.find, self._shared.backoff, self._shared.now, self._wake.set,
            self._event, self._shared.probe_scale,
        )  # fmt: skip
        for raw in spec.get("initContainers") or []:
            sidecar = raw.get("restartPolicy") == "Always"
            init_policy = "Always" if sidecar else ("Never" if policy == "Never" else "OnFailure")
            self._init.append(Container(raw, slot, init_policy, around, is_init=True))
        self._main = [Container(raw, slot, policy, around) for raw in spec["containers"]]
        self.containers = {one.name: one for one in (*self._init, *self._main)}
        if self._adopt:
            told = (self.pod.get("status") or {}).get("containerStatuses") or []
            ready = {one["name"] for one in told if one.get("ready")}
            for container in self.containers.values():
                container.adopt(was_ready=container.name in ready)

    def _refresh_containers(self) -> None:
        """Container definitions follow the pod (an image may change in place)."""
        for raw in (*(self.pod["spec"].get("initContainers") or []), *self.pod["spec"]["containers"]):
            self.containers[raw["name"]].spec = raw

    def _prepare(self) -> PodContext | None:
        """Volumes and what else the containers need; None while something is missing (told by an event)."""
        assert self.slot is not None
        namespace = str(self.pod["metadata"]["namespace"])
        lookup = self._shared.objects.lookup(
            namespace, self._shared.allocatable(str(self.pod["spec"].get("nodeName") or ""))
        )
        claims = self._shared.objects.volume_claims(self._shared.directories, self._shared.default_volume)
        try:
            ready = volumes.prepare(self.pod, self.slot, lookup, claims)
        except VolumeError as problem:
            if self._context is not None:
                # It runs already: a deleted ConfigMap does not take its files away.
                return self._context
            if str(problem) != self._volume_problem:
                self._volume_problem = str(problem)
                self._event("Warning", "FailedMount", str(problem))
            for container in self.containers.values():
                container.wait_for(
                    "ContainerCreating" if not container.is_init and not self._init else "PodInitializing"
                )
            if self._init:
                self._init[0].wait_for("ContainerCreating")
            return None
        services = self._shared.objects.service_variables(namespace)
        self._context = PodContext(self.pod, self.slot, lookup, ready, services)
        return self._context

    async def _step_all(self, context: PodContext) -> float | None:
        """Init containers one after the other, then all others; the soonest time at which something is due."""
        delays: list[float | None] = []
        for container in self._init:
            if container.is_done and container.exit is not None and container.exit.code == 0:
                continue
            main_has_run = any(one.process is not None for one in self._main)
            if main_has_run and container.policy != "Always":
                continue
            if container.is_done:
                return None  # a failed init container under restartPolicy Never: the pod has failed
            delays.append(await container.step(context))
            if container.policy == "Always" and container.is_started:
                continue
            return _soonest([*delays, None if container.process is not None else RETRY_S])
        for container in self._main:
            delays.append(await container.step(context))
            if container.process is None:
                delays.append(RETRY_S)
        if all(container.is_done for container in self._main):
            for container in self._init:
                container.policy = "Never"  # sidecars end with the pod
                container.stop(lifecycle.grace_s(self.pod))
        return _soonest(delays)

    # -- the end -------------------------------------------------------------------------------------------------

    async def _terminate(self) -> float | None:
        grace_s = self.pod["metadata"].get("deletionGracePeriodSeconds")
        await self._finish(lifecycle.grace_s(self.pod) if grace_s is None else float(grace_s), report=True)
        return _FINISHED

    async def _finish(self, grace_s: float, *, report: bool = False) -> None:
        """End all containers, sidecars last; tell the API; give the slot back."""
        if self.slot is not None and not self.containers:
            self._make_containers(self.slot)
        for group in (self._main, self._init):
            running = [one for one in group if one.is_running]
            for container in running:
                self._event("Normal", "Killing", f"Stopping container {container.name}")
            await self._stop(running, grace_s)
        if report:
            with contextlib.suppress(NotFound):
                await self._publish()
            with contextlib.suppress(NotFound):
                meta = self.pod["metadata"]
                await self._shared.client.delete(
                    PODS, meta["name"], meta["namespace"], grace_period_s=0, uid=meta["uid"]
                )
        if self.slot is not None:
            slot, self.slot = self.slot, None
            await asyncio.to_thread(self._shared.slots.remove, slot)

    async def _stop(self, running: list[Container], grace_s: float) -> None:
        """Wait for all to end; a deletion made more urgent meanwhile shortens the grace."""
        for container in running:
            container.stop(grace_s)
        ends: asyncio.Future[object] = asyncio.ensure_future(_all_ended(running))
        while not ends.done():
            self._wake.clear()
            waiting: asyncio.Future[object] = asyncio.ensure_future(self._wake.wait())
            await asyncio.wait({ends, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            wanted = 0.0 if self._is_gone else self.pod["metadata"].get("deletionGracePeriodSeconds")
            if wanted is not None and float(wanted) < grace_s:
                grace_s = float(wanted)
                for container in running:
                    container.stop(grace_s)
        await ends

    # -- telling -------------------------------------------------------------------------------------------------

    def snapshot(self) -> PodSnapshot:
        return PodSnapshot(
            pod=self.pod,
            address=self.slot.address if self.slot is not None else "",
            init=[one.snapshot() for one in self._init],
            sidecars=frozenset(
                one.name for one in self._init if one.policy == "Always" or one.spec.get("restartPolicy")
            ),
            containers=[one.snapshot() for one in self._main],
            now=self._shared.now(),
            started_at=self._started_at,
        )

    async def _publish(self) -> None:
        """Write the status if it differs from what the API shows."""
        meta = self.pod["metadata"]
        built = status.build(self.snapshot())
        if not self.containers:
            return
        known = (self.pod.get("status") or {}).get("startTime")
        if known:
            built["startTime"] = known
        if not status.differs(self.pod, built):
            return
        answer = await self._shared.client.patch(
            PODS, meta["name"], meta["namespace"], {"metadata": {"uid": self.uid}, "status": status.as_patch(built)},
            kind="strategic", subresource="status",
        )  # fmt: skip
        self._shared.objects.pods.observe(answer)
        if answer["metadata"].get("uid") == self.uid:
            self.pod = {**self.pod, "status": answer.get("status") or built}

    def _say_what_is_ignored(self) -> None:
        found = [*volumes.notes(self.pod), *ignored_fields(self.pod)]
        if found and not self._adopt:
            self._event("Normal", "NotEnforced", f"Without effect on this machine: {'; '.join(found)}")

    def _event(self, kind: EventType, reason: str, message: str) -> None:
        self._events.put_nowait((kind, reason, message))

    async def _write_events(self) -> None:
        """In order, and never in the way of the loop."""
        while True:
            kind, reason, message = await self._events.get()
            try:
                await self._recorder.record(self.pod, kind, reason, message)
            finally:
                self._events.task_done()


_FINISHED = -1.0


async def _all_ended(containers: list[Container]) -> None:
    await asyncio.gather(*(one.ended() for one in containers))


def _soonest(delays: list[float | None]) -> float | None:
    known = [one for one in delays if one is not None]
    return min(known) if known else None


def ignored_fields(pod: Object) -> list[str]:
    """Fields of a pod that a cluster honours and this machine does not."""
    spec = pod["spec"]
    found = [
        f"spec.{key}" for key in ("hostNetwork", "hostPID", "hostIPC", "runtimeClassName", "dnsConfig") if spec.get(key)
    ]
    if spec.get("securityContext"):
        found.append("spec.securityContext")
    for container in (*(spec.get("initContainers") or []), *spec["containers"]):
        where = f"container {container['name']}"
        if (container.get("resources") or {}).get("limits"):
            found.append(f"{where}: resources.limits (scheduled by, not enforced)")
        found += [
            f"{where}: {key}" for key in ("securityContext", "volumeDevices", "stdin", "tty") if container.get(key)
        ]
    return found
