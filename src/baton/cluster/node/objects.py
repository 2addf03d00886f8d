"""The API objects that a node agent reads, as caches kept by watches; and which pod wants to hear of which change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from baton.cluster.node.environment import Lookup, service_variables
from baton.cluster.node.volumes import Claims
from baton.cluster_client import Cache, Client, Object
from baton.cluster_client.resources import (
    CONFIG_MAPS,
    PERSISTENT_VOLUME_CLAIMS,
    PERSISTENT_VOLUMES,
    PODS,
    SECRETS,
    SERVICES,
)


class Objects:
    """Caches of everything pods refer to."""

    def __init__(self, client: Client) -> None:
        self.pods = Cache(client, PODS)
        self.services = Cache(client, SERVICES)
        self.config_maps = Cache(client, CONFIG_MAPS)
        self.secrets = Cache(client, SECRETS)
        self.claims = Cache(client, PERSISTENT_VOLUME_CLAIMS)
        self.persistent_volumes = Cache(client, PERSISTENT_VOLUMES)

    @property
    def all(self) -> tuple[Cache, ...]:
        return (self.pods, self.services, self.config_maps, self.secrets, self.claims, self.persistent_volumes)

    def start(self, group: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        return [group.create_task(cache.run(), name=f"watch {cache.resource.full_name}") for cache in self.all]

    async def synced(self) -> None:
        for cache in self.all:
            await cache.synced()

    def lookup(self, namespace: str, allocatable: Mapping[str, str]) -> Lookup:
        return Lookup(
            lambda name: self.config_maps.get(name, namespace),
            lambda name: self.secrets.get(name, namespace),
            allocatable,
        )

    def volume_claims(self, directories: Mapping[str, Path], default: Callable[[], Path] | None) -> Claims:
        return Claims(
            directories,
            default,
            lambda namespace, name: self.claims.get(name, namespace),
            lambda name: self.persistent_volumes.get(name),
        )

    def service_variables(self, namespace: str) -> dict[str, str]:
        services: list[Object] = self.services.list(namespace)
        return service_variables(services)
