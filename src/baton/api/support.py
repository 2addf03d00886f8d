"""Which parts of the RoleBasedGroup API are refused because nothing here carries them out yet.

A refusal names the field, says what is missing, and what to do instead. When a feature arrives, its entry here goes.
"""

from __future__ import annotations

from collections.abc import Iterator

from baton.api import labels, v1alpha1, v1alpha2
from baton.api.common import Role
from baton.api.wire import FieldError

_STANDALONE_WORKLOADS = (
    "apps/v1/StatefulSet",
    "workloads.x-k8s.io/v1alpha2/RoleInstanceSet",
)
_ROLE_ANNOTATIONS = {
    labels.ROLE_INPLACE_SCHEDULING: "returning pods to their node",
    labels.ROLE_INSTANCE_GANG_SCHEDULING: "gang scheduling",
    labels.PORT_ALLOCATOR: "port allocation",
    labels.COMPONENT_DISCOVERY: "component discovery",
    labels.COMPONENT_DEPENDS_ON: "component ordering",
}
_GROUP_ANNOTATIONS = {
    labels.GANG_SCHEDULING: "gang scheduling",
    labels.EXCLUSIVE_TOPOLOGY: "exclusive topology",
    labels.OLD_EXCLUSIVE_TOPOLOGY: "exclusive topology",
    labels.MISSPELT_EXCLUSIVE_TOPOLOGY: "exclusive topology",
    labels.ROLE_INSTANCE_GANG_SCHEDULING: "gang scheduling",
    # where a stored group keeps what its author wrote in these v1alpha1 fields
    labels.KEPT_POD_GROUP_POLICY: "gang scheduling (v1alpha1 spec.podGroupPolicy)",
    labels.KEPT_COORDINATION: "coordination of roles (v1alpha1 spec.coordination)",
}


def unsupported(group: v1alpha1.RoleBasedGroup | v1alpha2.RoleBasedGroup) -> Iterator[FieldError]:
    """One error per use of something we do not do yet."""
    annotations = group.metadata.get("annotations") or {}
    for key, what in _GROUP_ANNOTATIONS.items():
        if annotations.get(key) not in (None, "", "false"):
            yield _not_yet(f"metadata.annotations[{key}]", what)
    if isinstance(group, v1alpha1.RoleBasedGroup):
        if group.spec.pod_group_policy is not None:
            yield _not_yet("spec.podGroupPolicy", "gang scheduling")
        if group.spec.coordination:
            yield _not_yet("spec.coordination", "coordination of roles")
    for index, role in enumerate(group.spec.roles):
        path = f"spec.roles[{index}]"
        yield from _role(role, path)
        if isinstance(role, v1alpha1.RoleSpec):
            yield from _v1alpha1_role(role, path)
        elif isinstance(role, v1alpha2.RoleSpec):
            yield from _v1alpha2_role(role, path)


def _not_yet(path: str, what: str) -> FieldError:
    return FieldError(path, f"{what} is not supported yet; remove it", "FieldValueNotSupported")


def _role(role: Role, path: str) -> Iterator[FieldError]:
    for key, what in _ROLE_ANNOTATIONS.items():
        if key in role.annotations:
            yield _not_yet(f"{path}.annotations[{key}]", what)
    if role.engine_runtimes:
        yield _not_yet(f"{path}.engineRuntimes", "an engine runtime profile")
    update = role.rollout_strategy.rolling_update
    if update.max_surge not in (0, "0", "0%"):
        yield _not_yet(f"{path}.rolloutStrategy.rollingUpdate.maxSurge", "surging")
    if update.in_place_update_strategy.grace_period_seconds:
        where = f"{path}.rolloutStrategy.rollingUpdate.inPlaceUpdateStrategy.gracePeriodSeconds"
        yield _not_yet(where, "a grace period before an in-place update")


def _v1alpha1_role(role: v1alpha1.RoleSpec, path: str) -> Iterator[FieldError]:
    workload = f"{role.workload.api_version}/{role.workload.kind}"
    if workload not in _STANDALONE_WORKLOADS:
        yield FieldError(
            f"{path}.workload",
            f"{workload} is not supported yet; use {' or '.join(_STANDALONE_WORKLOADS)}",
            "FieldValueNotSupported",
        )
    if role.leader_worker_set is not None:
        yield _not_yet(f"{path}.leaderWorkerSet", "a leader with workers")
    if role.components:
        yield _not_yet(f"{path}.components", "a role of several components")
    if role.restart_policy not in (None, "None"):
        yield _not_yet(f"{path}.restartPolicy", f"restart policy {role.restart_policy}")
    if role.scaling_adapter.enable:
        yield _not_yet(f"{path}.scalingAdapter", "the scaling adapter")


def _v1alpha2_role(role: v1alpha2.RoleSpec, path: str) -> Iterator[FieldError]:
    workload = role.annotations.get(labels.ROLE_WORKLOAD_TYPE, _STANDALONE_WORKLOADS[1])
    where = f"{path}.annotations[{labels.ROLE_WORKLOAD_TYPE}]"
    if workload not in _STANDALONE_WORKLOADS:
        text = f"{workload} is not supported yet; use {' or '.join(_STANDALONE_WORKLOADS)}"
        yield FieldError(where, text, "FieldValueNotSupported")
    if role.annotations.get(labels.ROLE_INSTANCE_PATTERN, "Stateful") != "Stateful":
        yield _not_yet(f"{path}.annotations[{labels.ROLE_INSTANCE_PATTERN}]", "the stateless pattern")
    if role.leader_worker_pattern is not None:
        yield _not_yet(f"{path}.leaderWorkerPattern", "a leader with workers")
    if role.custom_components_pattern is not None:
        yield _not_yet(f"{path}.customComponentsPattern", "a role of several components")
    if role.scaling_adapter.enable:
        yield _not_yet(f"{path}.scalingAdapter", "the scaling adapter")
