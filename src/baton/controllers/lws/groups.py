"""Pods sorted into groups, and the facts about one group: alive, ready, which revision, what is in its way.

A group's identity is its leader pod: workers belong to the leader that owns them, and those of a leader that is gone are
*stale*. Nothing is decided here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from baton.api import lws
from baton.api.names import ordinal_of
from baton.api.resources import Object
from baton.controllers.plan import controller_of
from baton.controllers.pods import is_ready, is_terminating

ROSTER = "baton.dev/group-pods"
"""Annotation of a leader: the uid of each worker that was seen, by worker index. A worker in it that is not there any
more was lost, however briefly; one that is not in it has yet to be made."""


@dataclass(slots=True)
class Group:
    """One group as it is. ``leader`` is the set's own, or None; ``in_the_way``: pods of no use that hold a name."""

    index: int
    leader: Object | None = None
    workers: dict[int, Object] = field(default_factory=dict)
    in_the_way: list[Object] = field(default_factory=list)
    orphan: Object | None = None
    """A leader without an owner, to be adopted."""

    @property
    def is_alive(self) -> bool:
        return self.leader is not None and not is_terminating(self.leader)

    @property
    def is_empty(self) -> bool:
        return self.leader is None and not self.workers and not self.in_the_way and self.orphan is None

    @property
    def members(self) -> list[Object]:
        """The leader and its workers, the leader first."""
        workers = [self.workers[index] for index in sorted(self.workers)]
        return ([self.leader] if self.leader is not None else []) + workers

    @property
    def leader_name(self) -> str:
        return "" if self.leader is None else str(self.leader["metadata"]["name"])

    @property
    def revision(self) -> str:
        return "" if self.leader is None else revision_of(self.leader)

    @property
    def size(self) -> int:
        """As the group was made, whatever the set says now; 0 without a leader."""
        if self.leader is None:
            return 0
        text = (self.leader["metadata"].get("annotations") or {}).get(lws.SIZE) or ""
        return int(text) if text.isdigit() else 1

    @property
    def is_complete(self) -> bool:
        """Every pod of the group is there and none is leaving."""
        return (
            self.is_alive
            and set(self.workers) >= set(range(1, self.size))
            and not any(map(is_terminating, self.workers.values()))
        )

    @property
    def is_ready(self) -> bool:
        return self.is_complete and all(map(is_ready, self.members))

    def is_updated(self, revision: str) -> bool:
        return self.is_complete and self.revision == revision

    @property
    def roster(self) -> dict[int, str]:
        """Workers that were seen, by index."""
        if self.leader is None:
            return {}
        try:
            entries = json.loads((self.leader["metadata"].get("annotations") or {}).get(ROSTER) or "{}")
            return {int(index): str(uid) for index, uid in entries.items()}
        except (ValueError, AttributeError):
            return {}  # somebody else wrote it


def revision_of(pod: Object) -> str:
    return str((pod["metadata"].get("labels") or {}).get(lws.REVISION) or "")


def sort_into_groups(owner: Object, pods: list[Object]) -> dict[int, Group]:
    """Groups by index, of all ``pods`` that carry the set's name label. Pods with other names are not ours."""
    found: dict[int, Group] = {}
    name = owner["metadata"]["name"]
    workers: list[tuple[Group, int, Object]] = []
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
        group_index, worker_index = indexes_of(pod, name)
        if group_index is None:
            continue
        group = found.setdefault(group_index, Group(group_index))
        if worker_index is not None:
            workers.append((group, worker_index, pod))
            continue
        controller = controller_of(pod)
        if controller is not None and controller.get("uid") == owner["metadata"]["uid"]:
            group.leader = pod
        elif controller is None and not is_terminating(pod):
            group.orphan = pod
        else:
            group.in_the_way.append(pod)
    for group, worker_index, pod in workers:
        controller = controller_of(pod)
        leader = group.leader or group.orphan
        if leader is not None and controller is not None and controller.get("uid") == leader["metadata"]["uid"]:
            group.workers[worker_index] = pod
        else:
            group.in_the_way.append(pod)
    return found


def indexes_of(pod: Object, set_name: str) -> tuple[int | None, int | None]:
    """(group, worker) of a pod by its name; worker None for a leader, group None for a pod with another name.

    Labels tell leaders from workers: in a set called `a`, `a-1-2` is a worker, though a set `a-1` has a leader so called.
    """
    name = str(pod["metadata"]["name"])
    worker = (pod["metadata"].get("labels") or {}).get(lws.WORKER_INDEX)
    if worker == "0":
        return ordinal_of(name, set_name), None
    head, _, tail = name.rpartition("-")
    if worker is None or tail != worker or not tail.isdigit():
        return None, None
    return ordinal_of(head, set_name), int(tail)
