"""RoleBasedGroup workloads.x-k8s.io/v1alpha1: what the manifests of 2025 are written in.

Types and defaults only. It is served by conversion (`conversion`); the controllers know v1alpha2 alone.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from baton.api.common import Count, IntOrPercent, RestartPolicy, Role, RoleTemplate
from baton.api.wire import JsonMap, Model, StringMap

API_VERSION = "workloads.x-k8s.io/v1alpha1"
Percent = Annotated[str, Field(pattern=r"^([0-9]|[1-9][0-9]|100)%$")]


class Workload(Model):
    """The kind that runs a role's pods upstream; what it means for us is in `baton.api.patterns`."""

    api_version: str = "apps/v1"
    kind: str = "StatefulSet"


class TemplateRef(Model):
    name: str


class LeaderWorkerTemplate(Model):
    """``size`` pods per replica; the patches are strategic merges on the role's template."""

    size: Annotated[int, Field(ge=1)] = 1
    patch_leader_template: JsonMap | None = None
    patch_worker_template: JsonMap | None = None


class InstanceComponent(Model):
    name: str
    size: Count = 1
    service_name: str = ""
    labels: StringMap = {}
    annotations: StringMap = {}
    template: JsonMap = {}


class ScalingAdapter(Model):
    enable: bool = False


class RoleSpec(Role):
    """One of ``template`` and ``template_ref`` is required (unless the kind is InstanceSet with components)."""

    workload: Workload = Workload()
    template: JsonMap | None = None
    template_ref: TemplateRef | None = None
    template_patch: JsonMap | None = None
    leader_worker_set: LeaderWorkerTemplate | None = None
    components: list[InstanceComponent] = []
    restart_policy: RestartPolicy | Literal["RecreateRBGOnPodRestart"] | None = None
    scaling_adapter: ScalingAdapter = ScalingAdapter()


class KubeScheduling(Model):
    schedule_timeout_seconds: Count = 60


class VolcanoScheduling(Model):
    priority_class_name: str = ""
    queue: str = ""


class PodGroupPolicy(Model):
    kube_scheduling: KubeScheduling | None = None
    volcano_scheduling: VolcanoScheduling | None = None


class CoordinationRollingUpdate(Model):
    max_skew: Percent | None = None
    partition: IntOrPercent | None = None
    max_unavailable: IntOrPercent | None = None


class CoordinationScaling(Model):
    max_skew: Percent | None = None
    progression: Literal["OrderScheduled", "OrderReady"] = "OrderScheduled"


class CoordinationStrategy(Model):
    rolling_update: CoordinationRollingUpdate | None = None
    scaling: CoordinationScaling | None = None


class Coordination(Model):
    name: str
    roles: list[str] = []
    strategy: CoordinationStrategy = CoordinationStrategy()


class Spec(Model):
    roles: Annotated[list[RoleSpec], Field(min_length=1)]
    role_templates: list[RoleTemplate] = []
    pod_group_policy: PodGroupPolicy | None = None
    coordination: list[Coordination] = []


class RoleBasedGroup(Model):
    api_version: Literal["workloads.x-k8s.io/v1alpha1"]
    kind: Literal["RoleBasedGroup"]
    metadata: JsonMap
    spec: Spec
    status: JsonMap = {}
