"""The contract of every reconciler: ``reconcile(observed, now) -> Plan``, level-based, pure, idempotent.

A reconciler reads values and returns values; no I/O, no clock, no client. `runner` loads what it observes (through a
:class:`World`), applies the plan, and calls again on any change. Waiting is not an error: it is an empty plan with a
status that says why, and ``requeue_after_s`` when only time can end it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, Literal, Protocol, TypeVar

from baton.api.resources import Object, Resource


@dataclass(frozen=True, slots=True)
class Create:
    """Make an object; a name already taken means another pass has done it."""

    resource: Resource
    obj: Object


@dataclass(frozen=True, slots=True)
class Patch:
    """Change an object; ``body`` is complete for its patch kind. ``why`` is for logs and plans."""

    resource: Resource
    namespace: str | None
    name: str
    body: Object
    kind: Literal["merge", "strategic"] = "merge"
    subresource: str | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete exactly the object with this uid."""

    resource: Resource
    namespace: str | None
    name: str
    uid: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Bind:
    """Give an unscheduled pod its node."""

    namespace: str
    name: str
    uid: str
    node: str


Action = Create | Patch | Delete | Bind


@dataclass(frozen=True, slots=True)
class Note:
    """An event to record, about ``about`` or (None) the reconciled object. Written only when the plan was applied."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str
    about: Object | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now. ``status`` is the whole new status of the reconciled object, None when it is right already."""

    actions: tuple[Action, ...] = ()
    status: Object | None = None
    notes: tuple[Note, ...] = ()
    requeue_after_s: float | None = None

    @property
    def is_empty(self) -> bool:
        return not self.actions and self.status is None and not self.notes


class World(Protocol):
    """What a controller may read: current copies, never to be changed by the reader."""

    def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object | None: ...

    def all(self, resource: Resource, namespace: str | None = None) -> list[Object]: ...

    def owned(self, resource: Resource, uid: str) -> list[Object]: ...

    def labelled(self, resource: Resource, label: str, value: str, namespace: str) -> list[Object]: ...


Keys = Callable[[Object, World], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Trigger:
    """A resource whose changes concern a controller, and which of its keys (`namespace/name`) each change concerns."""

    resource: Resource
    keys: Keys


Observed = TypeVar("Observed")


@dataclass(frozen=True, slots=True)
class Controller(Generic[Observed]):
    """A reconciler with what it needs to be fed: one value per kind of object it looks after.

    ``observe`` returns None when there is nothing to reconcile (any more). ``primary`` names the object that status
    and events belong to. ``labels`` are label keys that ``World.labelled`` will be asked for, by resource.
    """

    name: str
    triggers: tuple[Trigger, ...]
    observe: Callable[[World, str], Observed | None]
    reconcile: Callable[[Observed, datetime], Plan]
    primary: Callable[[Observed], Object | None]
    resource: Resource
    labels: dict[Resource, tuple[str, ...]] = field(default_factory=dict)
    gather_s: float = 0.0
    """How long changes of one key are gathered before a pass; for keys that many objects change at about the same time."""
    rejected: Callable[[Object, Object, list[tuple[Action, str]], datetime], Object] | None = None
    """``(primary, planned status, refused actions with messages, now) -> status`` that tells of the refusals."""


def own_key(obj: Object, _: World) -> Iterable[str]:
    """The trigger of a controller's own kind."""
    meta = obj["metadata"]
    return (f"{meta['namespace']}/{meta['name']}" if meta.get("namespace") else str(meta["name"]),)


def owner_key(resource: Resource) -> Keys:
    """Triggers the owner (of kind ``resource``) that controls a changed object."""

    def keys(obj: Object, _: World) -> Iterable[str]:
        owner = controller_of(obj)
        if owner and owner["kind"] == resource.kind and owner["apiVersion"].split("/")[0] == resource.group:
            return (f"{obj['metadata']['namespace']}/{owner['name']}",)
        return ()

    return keys


def controller_of(obj: Object) -> Object | None:
    """The owner reference that controls an object."""
    for owner in obj["metadata"].get("ownerReferences") or []:
        if owner.get("controller"):
            return dict(owner)
    return None


def owner_reference(owner: Object) -> Object:
    """A controlling owner reference to ``owner``; its apiVersion is the owner's stored one."""
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def changed_status(obj: Object, status: Object) -> Object | None:
    """``status`` when it differs from the object's, else None."""
    return None if obj.get("status") == status else status


def covers(actual: object, wanted: object) -> bool:
    """True when every value in ``wanted`` is in ``actual`` too; servers may add defaults beside them."""
    if isinstance(wanted, dict):
        return isinstance(actual, dict) and all(covers(actual.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list):
        return isinstance(actual, list) and len(actual) == len(wanted) and all(map(covers, actual, wanted))
    return actual == wanted


def set_condition(
    conditions: list[Object], kind: str, status: bool, reason: str, message: str, now: datetime, generation: int | None
) -> list[Object]:
    """``conditions`` with one set; its transition time moves only when its status changes."""
    text = "True" if status else "False"
    old = next((entry for entry in conditions if entry.get("type") == kind), None)
    moved = old is None or old.get("status") != text
    entry: Object = {
        "type": kind,
        "status": text,
        "reason": reason,
        "message": message,
        "lastTransitionTime": format_time(now) if moved or old is None else old.get("lastTransitionTime"),
    }
    if generation is not None:
        entry["observedGeneration"] = generation
    if old is None:
        return [*conditions, entry]
    return [entry if item is old else item for item in conditions]


def format_time(moment: datetime) -> str:
    """RFC 3339 with whole seconds, as metav1.Time."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
