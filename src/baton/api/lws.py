"""LeaderWorkerSet leaderworkerset.x-k8s.io/v1: types, defaults, and the names, labels and keys that programs look at.

A *group* is one leader pod `{set}-{g}` and its workers `{set}-{g}-{w}`, w from 1. Rules beyond types are in
`lws_validation`.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from baton.api.common import IntOrPercent
from baton.api.resources import Object
from baton.api.wire import JsonMap, Model

GROUP = "leaderworkerset.x-k8s.io"
API_VERSION = f"{GROUP}/v1"
FULL_NAME = f"leaderworkersets.{GROUP}"

_PREFIX = "leaderworkerset.sigs.k8s.io/"
# labels
SET_NAME = _PREFIX + "name"
GROUP_INDEX = _PREFIX + "group-index"
WORKER_INDEX = _PREFIX + "worker-index"
GROUP_KEY = _PREFIX + "group-key"
REVISION = _PREFIX + "template-revision-hash"
SUBGROUP_INDEX = _PREFIX + "subgroup-index"
SUBGROUP_KEY = _PREFIX + "subgroup-key"
# annotations
SIZE = _PREFIX + "size"
LEADER_NAME = _PREFIX + "leader-name"
EXCLUSIVE_TOPOLOGY = _PREFIX + "exclusive-topology"
SUBGROUP_EXCLUSIVE_TOPOLOGY = _PREFIX + "subgroup-exclusive-topology"
SUBGROUP_SIZE = _PREFIX + "subgroup-size"
SUBGROUP_POLICY_TYPE = _PREFIX + "subgroup-policy-type"
SUBDOMAIN_POLICY = _PREFIX + "subdomainPolicy"
LEADER_REQUESTS_TPUS = _PREFIX + "leader-requests-tpus"
RECREATE_AFTER_START = _PREFIX + "experimental-recreate-group-after-start"
# environment
LEADER_ADDRESS_VARIABLE = "LWS_LEADER_ADDRESS"
GROUP_SIZE_VARIABLE = "LWS_GROUP_SIZE"
WORKER_INDEX_VARIABLE = "LWS_WORKER_INDEX"

RestartPolicy = Literal["Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]


class RollingUpdateConfiguration(Model):
    """Groups from ``partition`` on are updated, the highest first. ``max_unavailable`` is rounded down, ``max_surge`` up."""

    partition: int = 0
    max_unavailable: IntOrPercent = 1
    max_surge: IntOrPercent = 0


class RolloutStrategy(Model):
    type: Literal["RollingUpdate"] = "RollingUpdate"
    rolling_update_configuration: RollingUpdateConfiguration = RollingUpdateConfiguration()


class SubGroupPolicy(Model):
    """Parts of a group that are placed together. LeaderExcluded: the leader is in none of them."""

    sub_group_policy_type: Literal["LeaderWorker", "LeaderExcluded"] = "LeaderWorker"
    sub_group_size: int | None = None


class ClaimRetentionPolicy(Model):
    when_deleted: Literal["Retain", "Delete"] = "Retain"
    when_scaled: Literal["Retain", "Delete"] = "Retain"


class LeaderWorkerTemplate(Model):
    """``size`` pods a group, the leader among them. Without a ``leader_template`` the leader is made from the workers'."""

    worker_template: JsonMap
    leader_template: JsonMap | None = None
    size: int = 1
    restart_policy: RestartPolicy = "RecreateGroupOnPodRestart"
    sub_group_policy: SubGroupPolicy | None = None
    volume_claim_templates: list[JsonMap] = []
    persistent_volume_claim_retention_policy: ClaimRetentionPolicy | None = None


class NetworkConfig(Model):
    """Shared: one headless Service `{set}`. UniquePerReplica: one per group, `{set}-{g}`."""

    subdomain_policy: Literal["Shared", "UniquePerReplica"] = "Shared"


class Spec(Model):
    """``replicas`` counts groups."""

    leader_worker_template: LeaderWorkerTemplate
    replicas: int = 1
    rollout_strategy: RolloutStrategy = RolloutStrategy()
    startup_policy: Literal["LeaderCreated", "LeaderReady"] = "LeaderCreated"
    network_config: NetworkConfig = NetworkConfig()


class LeaderWorkerSet(Model):
    api_version: Literal["leaderworkerset.x-k8s.io/v1"]
    kind: Literal["LeaderWorkerSet"]
    metadata: JsonMap
    spec: Spec
    status: JsonMap = {}


def complete(obj: Object) -> Object:
    """The object as an admission hook stores it: the deprecated restart policy ``Default`` is called ``None``."""
    spec = obj.get("spec")
    template = spec.get("leaderWorkerTemplate") if isinstance(spec, dict) else None
    if not isinstance(spec, dict) or not isinstance(template, dict) or template.get("restartPolicy") != "Default":
        return obj
    return {**obj, "spec": {**spec, "leaderWorkerTemplate": {**template, "restartPolicy": "None"}}}


def leader_name(set_name: str, group: int) -> str:
    return f"{set_name}-{group}"


def worker_name(set_name: str, group: int, worker: int) -> str:
    return f"{set_name}-{group}-{worker}"


def pod_selector(set_name: str) -> str:
    """Selects the leaders: what an autoscaler looks at."""
    return f"{SET_NAME}={set_name},{WORKER_INDEX}=0"


def unique_key(*parts: str) -> str:
    """sha1 hex of `a/b`: the value of group-key (namespace, leader) and subgroup-key (leader, subgroup index)."""
    return hashlib.sha1("/".join(parts).encode(), usedforsecurity=False).hexdigest()


def subgroup_index(size: int, subgroup_size: int, worker: int) -> int:
    """Which subgroup a worker (or 0, the leader) is in. A leader that is one too many joins the first subgroup."""
    if (size - 1) % subgroup_size == 0 and size % subgroup_size != 0:
        return max(worker - 1, 0) // subgroup_size
    return worker // subgroup_size
