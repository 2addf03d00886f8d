"""The `World` that reconcilers read, made of caches: one per resource, shared by all controllers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from baton.api.resources import Object, Resource
from baton.cluster_client import Cache, Client
from baton.controllers.plan import Controller


class CacheWorld:
    """Caches for every resource the controllers have triggers for."""

    def __init__(self, client: Client, controllers: Iterable[Controller[Any]], namespace: str | None = None) -> None:
        wanted: dict[Resource, set[str]] = {}
        for controller in controllers:
            for trigger in controller.triggers:
                wanted.setdefault(trigger.resource, set())
            for resource, labels in controller.labels.items():
                wanted.setdefault(resource, set()).update(labels)
        self.caches = {
            resource: Cache(client, resource, namespace if resource.namespaced else None, index_labels=sorted(labels))
            for resource, labels in wanted.items()
        }

    def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object | None:
        return self.caches[resource].get(name, namespace)

    def all(self, resource: Resource, namespace: str | None = None) -> list[Object]:
        return self.caches[resource].list(namespace)

    def owned(self, resource: Resource, uid: str) -> list[Object]:
        return self.caches[resource].by_owner(uid)

    def labelled(self, resource: Resource, label: str, value: str, namespace: str) -> list[Object]:
        return self.caches[resource].by_label(label, value, namespace)

    async def synced(self) -> None:
        for cache in self.caches.values():
            await cache.synced()
