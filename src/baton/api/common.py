"""Parts of a role that v1alpha1 and v1alpha2 spell the same way."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from baton.api.wire import JsonMap, Model, StringMap

IntOrPercent = int | str
Count = Annotated[int, Field(ge=0)]
RestartPolicy = Literal["None", "RecreateRoleInstanceOnPodRestart"]


class InPlaceUpdateStrategy(Model):
    """``grace_period_seconds``: between taking a pod out of service and changing its image."""

    grace_period_seconds: Count = 0


class RollingUpdate(Model):
    """How a changed template reaches the pods. Ordinals >= ``partition`` are updated, highest first.

    ``type`` has no enum on the wire (upstream accepts any text); see `normal_update_type` for what texts mean.
    """

    type: str = "InPlaceIfPossible"
    partition: IntOrPercent = 0
    max_unavailable: IntOrPercent = 1
    max_surge: IntOrPercent = 0
    paused: bool = False
    in_place_update_strategy: InPlaceUpdateStrategy = InPlaceUpdateStrategy()


class RolloutStrategy(Model):
    type: Literal["RollingUpdate"] = "RollingUpdate"
    rolling_update: RollingUpdate = RollingUpdate()


class ServicePort(Model):
    """core/v1 ServicePort, as far as a headless Service needs it."""

    port: Annotated[int, Field(ge=1, le=65535)]
    name: str = ""
    protocol: Literal["TCP", "UDP", "SCTP"] = "TCP"
    app_protocol: str | None = None
    target_port: IntOrPercent | None = None
    node_port: int | None = None


class EngineRuntime(Model):
    """Use of a cluster-wide profile of sidecars."""

    profile_name: str
    inject_containers: list[str] = []
    containers: list[JsonMap] = []


class RoleTemplate(Model):
    """A pod template that several roles share."""

    name: str
    template: JsonMap


class Role(Model):
    """What a role is in every version. ``replicas`` counts role instances, ``dependencies`` names other roles."""

    name: Annotated[str, Field(min_length=1)]
    labels: StringMap = {}
    annotations: StringMap = {}
    replicas: Count = 1
    dependencies: list[str] = []
    rollout_strategy: RolloutStrategy = RolloutStrategy()
    service_ports: list[ServicePort] = []
    engine_runtimes: list[EngineRuntime] = []
    min_ready_seconds: Count = 0


UpdateType = Literal["RecreatePod", "InPlaceIfPossible", "InPlaceOnly"]
_UPDATE_TYPES: dict[str, UpdateType] = {
    "recreate": "RecreatePod",
    "recreatepod": "RecreatePod",
    "inplaceifpossible": "InPlaceIfPossible",
    "inplaceonly": "InPlaceOnly",
}


def normal_update_type(text: str) -> UpdateType | None:
    """The update type a text stands for, whatever its case ("InplaceIfPossible" is common); None for no type at all."""
    return _UPDATE_TYPES.get(text.lower())
