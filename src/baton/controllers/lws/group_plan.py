"""What to do with each group: make it, complete it, take it down as a whole. One `GroupPlanner` plans one pass.

Invariants: a leader is made only when no pod of its group's former life is left, so a group never mixes revisions or
lives; an update takes a ready group down only while enough others are ready.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from baton.api import lws
from baton.api.resources import PODS, Object
from baton.controllers.lws import restart
from baton.controllers.lws.claims import plan_claims
from baton.controllers.lws.groups import ROSTER, Group
from baton.controllers.lws.memory import Recreation
from baton.controllers.lws.placement import topology_of
from baton.controllers.lws.pod_template import Blueprint, make_leader, make_worker
from baton.controllers.lws.restart import Loss
from baton.controllers.lws.services import plan_own
from baton.controllers.plan import Action, Create, Delete, Note, Patch, controller_of, format_time, owner_reference
from baton.controllers.pods import explain, is_ready, is_terminating, phase


@dataclass(slots=True)
class GroupPlanner:
    """Reads the set and what is around it; collects actions, events, holds and when to come back."""

    owner: Object
    spec: lws.Spec
    blueprints: dict[str, Blueprint]
    services: dict[str, Object]
    claims: dict[str, Object]
    nodes: dict[str, Object]
    recreations: dict[int, Recreation]
    now: datetime
    actions: list[Action] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    holds: list[str] = field(default_factory=list)
    waits: list[timedelta] = field(default_factory=list)

    @property
    def policy(self) -> lws.RestartPolicy:
        return restart.effective_policy(self.owner, self.spec.leader_worker_template.restart_policy)

    def remove(self, group: Group, why: str) -> None:
        """Take the whole group down, the leader first."""
        for pod in [*group.members, *filter(self._is_abandoned, group.in_the_way)]:
            self._delete(pod, why)

    def _delete(self, pod: Object, why: str) -> None:
        """What is leaving already is left to leave."""
        if not is_terminating(pod):
            meta = pod["metadata"]
            self.actions.append(Delete(PODS, meta["namespace"], meta["name"], meta["uid"], why))

    def scale_down(self, group: Group, count: int) -> None:
        if group.is_alive:
            kind = "surge replica" if group.index >= self.spec.replicas and count > self.spec.replicas else "replica"
            self.note("GroupsProgressing", f"deleting {kind} {group.leader_name}")
        self.remove(group, f"scaled down to {count}")

    def _is_abandoned(self, pod: Object) -> bool:
        """A worker of a leader that is gone; a pod of somebody else's is not ours to delete."""
        holder = controller_of(pod)
        return holder is not None and holder.get("kind") == "Pod"

    def note(self, kind: str, message: str) -> None:
        self.notes.append(Note("Normal", kind, message))

    def make_again(self, group: Group) -> bool:
        """Take a group down that lost a pod, if the policy says so; True when it is (or will be) lost."""
        loss = restart.find_loss(group, self.policy)
        if loss is None:
            return False
        past = self.recreations.get(group.index)
        if loss.by_itself:
            wait = restart.delay_before(past, self.now)
            if wait > timedelta():
                times = f"made again {past.count if past else 0} times"
                self.holds.append(f"group {group.index} ({times}) waits until {format_time(self.now + wait)}: {loss}")
                self.waits.append(wait)
                return True
            self.recreations[group.index] = restart.counted(past, self.now)
        self._tell_loss(group, loss)
        self.remove(group, f"the group is made again: {loss}")
        return True

    def _tell_loss(self, group: Group, loss: Loss) -> None:
        text = f"{loss}; deleted all pods to recreate group {group.index}"
        self.notes.append(Note("Warning" if loss.by_itself else "Normal", "RecreateGroup", text[0].upper() + text[1:]))

    def begin(self, group: Group, revision: str) -> None:
        """A group without a living leader: clear what is left of its former life, then make a new leader."""
        if group.orphan is not None:
            meta = group.orphan["metadata"]
            body: Object = {"metadata": {"ownerReferences": [owner_reference(self.owner)]}}
            self.actions.append(Patch(PODS, meta["namespace"], meta["name"], body, why="adopted"))
        elif not group.is_empty:
            if group.leader is not None and not all(map(is_terminating, group.members)):
                self._tell_loss(group, Loss(group.leader_name, "is being deleted", by_itself=False))
            self.remove(group, "its leader is gone")
            leaving = [*group.members, *group.in_the_way]
            self.holds.append(f"group {group.index} starts when pod {leaving[0]['metadata']['name']} is gone")
        else:
            blueprint = self.blueprints[revision]
            pod = make_leader(self.owner, blueprint, group.index)
            self.actions += plan_claims(self.owner, blueprint, pod, self.claims)
            self.actions.append(Create(PODS, pod))
            self.note("GroupsProgressing", f"Created leader pod {pod['metadata']['name']}")

    def complete(self, group: Group) -> None:
        """A living group of the right revision: its Service, its workers, and the list of who was seen."""
        assert group.leader is not None, "only living groups are completed"
        blueprint = self.blueprints.get(group.revision)
        self._replace_ended(group)
        for pod in filter(self._is_abandoned, group.in_the_way):
            self._delete(pod, "its leader is gone")
        missing = [index for index in range(1, group.size) if index not in group.workers]
        if blueprint is None:
            if missing:
                self._tell_loss(group, Loss(group.leader_name, f"has the unknown revision {group.revision}", False))
                self.remove(group, "its revision is not known any more")
            return
        self.actions += plan_own(self.owner, group, blueprint, self.services)
        if missing and self._may_have_workers(group):
            self._make_workers(group, blueprint, missing)
        self._remember_workers(group)
        self._explain(group)

    def _replace_ended(self, group: Group) -> None:
        """Where no policy takes the group down, a pod that has ended is replaced alone."""
        for pod in group.members:
            if phase(pod) in ("Failed", "Succeeded"):
                self._delete(pod, f"has ended ({phase(pod)}) and is replaced")

    def _may_have_workers(self, group: Group) -> bool:
        leader = group.leader
        assert leader is not None
        is_first_time = not group.workers and not group.roster
        if self.spec.startup_policy == "LeaderReady" and is_first_time and not is_ready(leader):
            self.holds.append(f"group {group.index}: workers start when the leader is ready; {explain(leader)}")
            return False
        if self._topology() and self._topology_value(leader) is None:
            node = leader["spec"].get("nodeName")
            cause = f"node {node} has no label {self._topology()}" if node else explain(leader)
            self.holds.append(f"group {group.index}: workers are placed beside the leader; {cause}")
            return False
        return True

    def _topology(self) -> str:
        return str((self.owner["metadata"].get("annotations") or {}).get(lws.EXCLUSIVE_TOPOLOGY) or "")

    def _topology_value(self, leader: Object) -> str | None:
        if not self._topology():
            return None
        return topology_of(self.nodes.get(leader["spec"].get("nodeName") or ""), self._topology())

    def _make_workers(self, group: Group, blueprint: Blueprint, missing: list[int]) -> None:
        leader = group.leader
        assert leader is not None
        taken = {pod["metadata"]["name"] for pod in group.in_the_way}
        value = self._topology_value(leader)
        pods = [make_worker(self.owner, blueprint, leader, index, value) for index in missing]
        pods = [pod for pod in pods if pod["metadata"]["name"] not in taken]
        for pod in pods:
            self.actions += plan_claims(self.owner, blueprint, pod, self.claims)
        self.actions += [Create(PODS, pod) for pod in pods]
        if pods:
            names = ", ".join(pod["metadata"]["name"] for pod in pods)
            self.note("GroupsProgressing", f"Created workers for leader pod {group.leader_name}: {names}")
        if taken:
            self.holds.append(f"group {group.index} is complete when pod {min(taken)}, which is not its own, is gone")

    def _remember_workers(self, group: Group) -> None:
        if self.policy == "None" or group.leader is None:
            return
        seen = {index: pod["metadata"]["uid"] for index, pod in group.workers.items() if not is_terminating(pod)}
        roster = {**group.roster, **seen}
        if roster != group.roster:
            meta = group.leader["metadata"]
            text = json.dumps({str(index): uid for index, uid in sorted(roster.items())})
            body: Object = {"metadata": {"annotations": {ROSTER: text}}}
            self.actions.append(Patch(PODS, meta["namespace"], meta["name"], body, why="workers seen"))

    def _explain(self, group: Group) -> None:
        unready = next((pod for pod in group.members if not is_ready(pod)), None)
        if unready is not None:
            self.holds.append(f"group {group.index}: {explain(unready)}")
