"""Carrying out a plan through the API, in its order, and telling the caches at once what the server answered.

Lost races are not failures: what is gone already, or made already by an earlier pass, is fine. A refusal (an invalid
pod, a missing permission) is a failure of that action; the rest of the plan still goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from baton.api.merge import diff
from baton.api.resources import PODS, Object, Resource
from baton.cluster_client import AlreadyExists, Cache, Change, Client, Conflict, NotFound
from baton.cluster_client.errors import ApiError
from baton.controllers.plan import Action, Bind, Create, Delete, Patch, controller_of

_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Failure:
    """An action that the server refused, with its one-line message."""

    action: Action
    message: str


class Applier:
    """Applies actions for any controller. Raises only what a retry may cure (no answer, server fault)."""

    def __init__(self, client: Client, caches: dict[Resource, Cache]) -> None:
        self._client = client
        self._caches = caches

    async def apply(self, actions: Sequence[Action]) -> list[Failure]:
        """Carry out in order; neighbouring creations and bindings of pods, which do not depend on each other, go
        in parallel."""
        failures: list[Failure] = []
        for parallel, group in groupby(actions, key=_may_be_parallel):
            batch = list(group)
            size = _AT_ONCE if parallel else 1
            for start in range(0, len(batch), size):
                results = await asyncio.gather(*(self._one(action) for action in batch[start : start + size]))
                failures += [failure for failure in results if failure is not None]
        return failures

    async def write_status(self, resource: Resource, obj: Object, status: Object) -> None:
        """Replace the status: fields that the new one lacks are removed."""
        meta = obj["metadata"]
        body = {"status": diff(obj.get("status") or {}, status)}
        try:
            answer = await self._client.patch(
                resource, meta["name"], meta.get("namespace"), body, kind="merge", subresource="status"
            )
        except NotFound:
            return
        self._observe(resource, answer)

    async def _one(self, action: Action) -> Failure | None:
        try:
            if isinstance(action, Create):
                return await self._create(action)
            if isinstance(action, Patch):
                await self._patch(action)
            elif isinstance(action, Delete):
                await self._delete(action)
            else:
                await self._bind(action)
        except ApiError as error:
            if error.code >= 500 or error.code == 429:
                raise
            return Failure(action, error.message)
        return None

    async def _create(self, action: Create) -> Failure | None:
        try:
            self._observe(action.resource, await self._client.create(action.resource, action.obj))
        except AlreadyExists:
            meta = action.obj["metadata"]
            found = await self._client.get(action.resource, meta["name"], meta.get("namespace"))
            self._observe(action.resource, found)
            ours, theirs = controller_of(action.obj), controller_of(found)
            if ours and (theirs or {}).get("uid") != ours["uid"]:
                kind, name = action.resource.kind, meta["name"]
                return Failure(action, f"{kind} {name} exists and does not belong to {ours['kind']} {ours['name']}")
        return None

    async def _patch(self, action: Patch) -> None:
        try:
            answer = await self._client.patch(
                action.resource,
                action.name,
                action.namespace,
                action.body,
                kind=action.kind,
                subresource=action.subresource,
            )
        except NotFound:
            return
        self._observe(action.resource, answer)

    async def _delete(self, action: Delete) -> None:
        try:
            answer = await self._client.delete(action.resource, action.name, action.namespace, uid=action.uid)
        except (NotFound, Conflict):  # gone, or another object has the name by now
            return
        if answer.get("kind") == action.resource.kind and answer["metadata"].get("deletionTimestamp"):
            self._observe(action.resource, answer)
            return
        cache = self._caches.get(action.resource)
        gone = cache.get(action.name, action.namespace) if cache else None
        if cache is not None and gone is not None and gone["metadata"]["uid"] == action.uid:
            cache.apply(Change("DELETED", gone))

    async def _bind(self, action: Bind) -> None:
        binding: Object = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": action.name, "namespace": action.namespace, "uid": action.uid},
            "target": {"apiVersion": "v1", "kind": "Node", "name": action.node},
        }
        try:
            await self._client.request("POST", PODS.path(action.namespace, action.name, "binding"), body=binding)
        except (NotFound, Conflict):  # deleted, or bound by the previous pass
            return

    def _observe(self, resource: Resource, obj: Object) -> None:
        cache = self._caches.get(resource)
        if cache is not None:
            obj.setdefault("kind", resource.kind)
            cache.observe(obj)


def _may_be_parallel(action: Action) -> bool:
    return isinstance(action, Bind) or (isinstance(action, Create) and action.resource == PODS)
