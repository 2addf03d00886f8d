"""RoleBasedGroup workloads.x-k8s.io/v1alpha2: the stored version and the one controllers know. Types and defaults only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from baton.api.common import Count, RestartPolicy, Role, RoleTemplate
from baton.api.wire import JsonMap, Model, StringMap

API_VERSION = "workloads.x-k8s.io/v1alpha2"


class TemplateRef(Model):
    """A shared template and a strategic-merge patch on it (``{}`` for none)."""

    name: str
    patch: JsonMap | None = None


class TemplateSource(Model):
    """Exactly one of the two."""

    template: JsonMap | None = None
    template_ref: TemplateRef | None = None


class RestartPolicyConfig(Model):
    """Seconds; the n-th recreate waits min(base * 2^(n-1), max). ``max_delay_seconds`` 0 means no bound."""

    type: RestartPolicy | None = None
    base_delay_seconds: Count = 30
    max_delay_seconds: Count = 600


class StandalonePattern(TemplateSource):
    """One pod per replica."""


class LeaderWorkerPattern(TemplateSource):
    """``size`` pods per replica, of which the first leads."""

    size: Annotated[int, Field(ge=1)] = 1
    leader_template_patch: JsonMap | None = None
    worker_template_patch: JsonMap | None = None
    shared_service_selection: Literal["All", "LeaderOnly"] | None = None
    restart_policy: RestartPolicy | Literal["RecreateRBGOnPodRestart"] | None = None
    restart_policy_config: RestartPolicyConfig | None = None


class InstanceComponent(Model):
    name: str
    size: Count = 1
    service_name: str = ""
    labels: StringMap = {}
    annotations: StringMap = {}
    template: JsonMap = {}


class CustomComponentsPattern(Model):
    """Several kinds of pods per replica."""

    components: list[InstanceComponent] = []
    restart_policy: RestartPolicy | Literal["RecreateRBGOnPodRestart"] | None = None
    restart_policy_config: RestartPolicyConfig | None = None


class ScalingAdapter(Model):
    enable: bool = False
    labels: StringMap = {}


class RoleSpec(Role):
    """Exactly one pattern."""

    pod_management_policy: Literal["Parallel", "OrderedReady"] = "Parallel"
    scaling_adapter: ScalingAdapter = ScalingAdapter()
    standalone_pattern: StandalonePattern | None = None
    leader_worker_pattern: LeaderWorkerPattern | None = None
    custom_components_pattern: CustomComponentsPattern | None = None


class Spec(Model):
    roles: Annotated[list[RoleSpec], Field(min_length=1)]
    role_templates: list[RoleTemplate] = []


class RoleBasedGroup(Model):
    api_version: Literal["workloads.x-k8s.io/v1alpha2"]
    kind: Literal["RoleBasedGroup"]
    metadata: JsonMap
    spec: Spec
    status: JsonMap = {}
