"""A Kubernetes in memory for reconcilers: stores objects, applies plans, collects garbage, plays an all-ready kubelet.

It is not an API server: no validation, no versions, no watch. What it does (uids, generations, merge patches,
generateName, deletion through owners) is only what reconcilers can see of one.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from baton.api.merge import merge_patch, strategic_merge
from baton.api.resources import KNOWN, PODS, Object, Resource
from baton.controllers.plan import Bind, Controller, Create, Delete, Note, Patch, Plan, format_time

START = datetime(2026, 1, 1, tzinfo=UTC)
_NO_GENERATION = {"status"}


class KubeWorld:
    """Implements `controllers.plan.World`. ``log`` is one line per change, for golden traces."""

    def __init__(self, controllers: list[Controller[Any]]) -> None:
        self.controllers = controllers
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.now = START
        self.log: list[str] = []
        self.notes: list[tuple[str, Note]] = []
        self._uids = itertools.count(1)
        self.requeue_s: float | None = None
        self.after_action: Callable[[], None] = lambda: None

    # World
    def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object | None:
        return self.objects.get((resource.full_name, namespace or "", name))

    def all(self, resource: Resource, namespace: str | None = None) -> list[Object]:
        return [
            obj
            for (kind, ns, _), obj in sorted(self.objects.items())
            if kind == resource.full_name and namespace in (None, ns)
        ]

    def owned(self, resource: Resource, uid: str) -> list[Object]:
        return [o for o in self.all(resource) if uid in [r["uid"] for r in o["metadata"].get("ownerReferences") or []]]

    def labelled(self, resource: Resource, label: str, value: str, namespace: str) -> list[Object]:
        return [o for o in self.all(resource, namespace) if (o["metadata"].get("labels") or {}).get(label) == value]

    # Changes
    def put(self, obj: Object) -> Object:
        """Create, or change spec and metadata of, an object as a user would."""
        resource = next(r for r in KNOWN if (r.api_version, r.kind) == (obj["apiVersion"], obj["kind"]))
        obj = copy.deepcopy(obj)
        meta = obj["metadata"]
        if resource.namespaced:
            meta.setdefault("namespace", "default")
        number = next(self._uids)
        if "name" not in meta:
            meta["name"] = f"{meta.pop('generateName')}{number:05x}"
        key = (resource.full_name, meta.get("namespace", ""), meta["name"])
        old = self.objects.get(key)
        if old is not None:
            changed = {k: v for k, v in obj.items() if k not in ("status", "metadata")}
            was = {k: old.get(k) for k in changed}
            meta = {**old["metadata"], **meta}
            if changed != was:
                meta["generation"] = old["metadata"]["generation"] + 1
            obj = {**old, **obj, "metadata": meta}
        else:
            meta |= {"uid": f"uid-{number}", "generation": 1, "creationTimestamp": format_time(self.now)}
        obj["metadata"]["resourceVersion"] = str(number)
        self.objects[key] = obj
        return obj

    def patch(self, resource: Resource, namespace: str | None, name: str, body: Object, kind: str = "merge") -> None:
        old = self.get(resource, name, namespace)
        assert old is not None, f"patch of {resource.kind} {name}, which does not exist"
        merge = strategic_merge if kind == "strategic" else merge_patch
        self.put(merge(old, body))

    def set_status(self, obj: Object, status: Object) -> None:
        key = next(k for k, v in self.objects.items() if v["metadata"]["uid"] == obj["metadata"]["uid"])
        self.objects[key] = {**self.objects[key], "status": copy.deepcopy(status)}

    def delete(self, resource: Resource, namespace: str | None, name: str) -> None:
        """Delete with everything it owns, at once (pods: when the kubelet lets go, see :meth:`terminate`)."""
        obj = self.objects.get((resource.full_name, namespace or "", name))
        if obj is None:
            return
        if resource == PODS and not obj["metadata"].get("deletionTimestamp"):
            self.objects[resource.full_name, namespace or "", name] = {
                **obj,
                "metadata": {**obj["metadata"], "deletionTimestamp": format_time(self.now)},
            }
            return
        del self.objects[resource.full_name, namespace or "", name]
        for (kind, ns, other), child in list(self.objects.items()):
            if obj["metadata"]["uid"] in [r["uid"] for r in child["metadata"].get("ownerReferences") or []]:
                self.delete(next(r for r in KNOWN if r.full_name == kind), ns, other)

    def apply(self, controller: Controller[Any], key: str, plan: Plan, primary: Object | None) -> None:
        for action in plan.actions:
            self._do(action)
            self.after_action()
        if plan.status is not None and primary is not None:
            self.set_status(primary, plan.status)
        self.notes += [(key, note) for note in plan.notes]

    def _do(self, action: Any) -> None:
        if isinstance(action, Create):
            obj = self.put(action.obj)
            self.log.append(f"create {action.resource.kind} {obj['metadata']['name']}")
        elif isinstance(action, Patch):
            self.patch(action.resource, action.namespace, action.name, action.body, action.kind)
            self.log.append(f"patch {action.resource.kind} {action.name}")
        elif isinstance(action, Delete):
            found = self.get(action.resource, action.name, action.namespace)
            assert found is not None and found["metadata"]["uid"] == action.uid, f"stale delete of {action.name}"
            self.delete(action.resource, action.namespace, action.name)
            self.log.append(f"delete {action.resource.kind} {action.name}")
        elif isinstance(action, Bind):
            self.patch(PODS, action.namespace, action.name, {"spec": {"nodeName": action.node}})
            self.log.append(f"bind Pod {action.name} to {action.node}")

    # Controllers and kubelet
    def keys(self, controller: Controller[Any]) -> list[str]:
        found: set[str] = set()
        for trigger in controller.triggers:
            for obj in self.all(trigger.resource):
                found.update(trigger.keys(obj, self))
        return sorted(found)

    def plan(self, controller: Controller[Any], key: str) -> tuple[Plan, Object | None]:
        observed = controller.observe(self, key)
        if observed is None:
            return Plan(), None
        before = copy.deepcopy(self.objects)
        plan = controller.reconcile(observed, self.now)
        assert self.objects == before, f"{controller.name} changed what it only may read"
        return plan, controller.primary(observed)

    def reconcile(self) -> bool:
        """One pass of every controller over every key; True when anything was planned."""
        busy = False
        self.requeue_s = None
        for controller in self.controllers:
            for key in self.keys(controller):
                plan, primary = self.plan(controller, key)
                busy |= not plan.is_empty
                if plan.requeue_after_s is not None:
                    self.requeue_s = min(plan.requeue_after_s, self.requeue_s or plan.requeue_after_s)
                self.apply(controller, key, plan, primary)
        return busy

    def terminate(self) -> bool:
        """The kubelet lets go of every pod that is being deleted; True when there was one."""
        leaving = [pod["metadata"] for pod in self.all(PODS) if pod["metadata"].get("deletionTimestamp")]
        for meta in leaving:
            self.delete(PODS, meta["namespace"], meta["name"])
        return bool(leaving)

    def run_pods(self, limit: int | None = None) -> bool:
        """The kubelet makes pods Ready (at most ``limit``, lowest name first); True when it had something to do."""
        moved = self.terminate()
        changed = 0
        for pod in self.all(PODS):
            if (limit is None or changed < limit) and self.needs_kubelet(pod):
                self.make_ready(pod)
                changed += 1
        return moved or changed > 0

    @staticmethod
    def needs_kubelet(pod: Object) -> bool:
        running = {c["name"]: c["image"] for c in (pod.get("status") or {}).get("containerStatuses") or []}
        wanted = {c["name"]: c.get("image") for c in pod["spec"]["containers"]}
        conditions = {c["type"]: c["status"] for c in (pod.get("status") or {}).get("conditions") or []}
        return running != wanted or conditions.get("Ready") != "True"

    def make_ready(self, pod: Object) -> None:
        old = {c["name"]: c for c in (pod.get("status") or {}).get("containerStatuses") or []}
        statuses = []
        for container in pod["spec"]["containers"]:
            before = old.get(container["name"])
            restarted = before is not None and before["image"] != container.get("image")
            count = before["restartCount"] + restarted if before else 0
            container_id = f"c-{next(self._uids)}" if before is None or restarted else before["containerID"]
            statuses.append({"name": container["name"], "image": container.get("image"), "imageID": container.get("image"),
                             "containerID": container_id, "restartCount": count, "ready": True})  # fmt: skip
        number = int(pod["metadata"]["uid"].removeprefix("uid-"))
        self.set_status(
            pod,
            {
                "phase": "Running",
                "podIP": f"127.{number >> 16}.{number >> 8 & 255}.{number & 255}",
                "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": format_time(self.now)}],
                "containerStatuses": statuses,
            },
        )

    def make_unready(self, name: str, namespace: str = "default") -> None:
        pod = self.get(PODS, name, namespace)
        assert pod is not None
        condition = {"type": "Ready", "status": "False", "lastTransitionTime": format_time(self.now)}
        self.set_status(pod, {**pod["status"], "conditions": [condition]})

    def restart(self, name: str, exit_code: int = 1, message: str = "", namespace: str = "default") -> None:
        """A container of the pod ended and runs again."""
        pod = self.get(PODS, name, namespace)
        assert pod is not None
        entry = pod["status"]["containerStatuses"][0]
        ended = {"exitCode": exit_code, "reason": "Error", "message": message}
        again = {**entry, "restartCount": entry["restartCount"] + 1, "lastState": {"terminated": ended}}
        rest = pod["status"]["containerStatuses"][1:]
        self.set_status(pod, {**pod["status"], "containerStatuses": [again, *rest]})

    def settle(self, max_rounds: int = 200) -> None:
        """Controllers and kubelet in turn until nothing moves and nothing waits for time to pass."""
        for _ in range(max_rounds):
            moved = self.reconcile()
            moved |= self.run_pods()
            if not moved and self.requeue_s is None:
                return
            self.now += timedelta(seconds=self.requeue_s if not moved and self.requeue_s else 1)
        raise AssertionError(f"no rest after {max_rounds} rounds; last: {self.log[-5:]}")

    def pod_names(self, namespace: str = "default") -> list[str]:
        return [pod["metadata"]["name"] for pod in self.all(PODS, namespace)]
