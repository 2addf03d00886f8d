"""A watch that never ends: list, watch from there, resume after a break, list again when the server forgot.

What a consumer sees is a stream of states, not of wire events: after a relist the difference to what it had been
told is made up (ADDED, MODIFIED, and DELETED with the last known object), so it may miss intermediate states but
never an end state. `cache.Cache` is the usual consumer.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from baton.cluster_client.client import Client
from baton.cluster_client.errors import ApiError, ClientError, Gone
from baton.cluster_client.resources import Object, Resource, key_of

log = logging.getLogger(__name__)
_BACKOFF_FIRST_S = 0.1
_BACKOFF_MAX_S = 10.0


@dataclass(frozen=True, slots=True)
class Change:
    """``type`` ADDED, MODIFIED or DELETED with the object; SYNCED (object None) once the first list was told."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "SYNCED"]
    object: Object | None = None


async def follow(
    client: Client,
    resource: Resource,
    namespace: str | None = None,
    *,
    label_selector: str | None = None,
    field_selector: str | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncIterator[Change]:
    """Yield changes for ever. Server and network failures are logged and retried with back-off (at most 10 s).

    A refusal that no retry can cure (403, 404 of the kind, bad selector) is retried too, since permissions and CRDs
    come later in real clusters; it is logged at warning once per failure streak.
    """
    known: dict[str, Object] = {}
    version: str | None = None
    synced = False
    backoff_s = _BACKOFF_FIRST_S
    failing = False
    while True:
        try:
            if version is None:
                listed = await client.list(
                    resource, namespace, label_selector=label_selector, field_selector=field_selector
                )
                for change in _difference(known, listed.items):
                    yield change
                version = listed.resource_version
                if not synced:
                    synced = True
                    yield Change("SYNCED")
            stream = client.watch(
                resource,
                namespace,
                resource_version=version,
                label_selector=label_selector,
                field_selector=field_selector,
            )
            heard = False
            async with aclosing(stream) as events:  # type: ignore[type-var]
                async for event in events:
                    heard = True
                    version = str(event.object["metadata"]["resourceVersion"])
                    backoff_s, failing = _BACKOFF_FIRST_S, False
                    if event.type == "BOOKMARK":
                        continue
                    yield _remember(known, event.type, event.object)
            if not heard:  # something between us and the server ends watches at once; do not spin
                await sleep(_BACKOFF_FIRST_S)
        except Gone:
            version = None
        except ClientError as error:
            level = logging.DEBUG if failing else logging.WARNING
            log.log(level, "watch interrupted", extra={"resource": resource.full_name, "error": str(error)})
            failing = True
            if isinstance(error, ApiError) and error.code == 404:
                version = None
            await sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(backoff_s * 2, _BACKOFF_MAX_S)


def _difference(known: dict[str, Object], items: list[Object]) -> list[Change]:
    """What a consumer that was told ``known`` must hear to know ``items``; updates ``known``."""
    fresh = {key_of(item): item for item in items}
    changes: list[Change] = []
    for key, old in list(known.items()):
        new = fresh.get(key)
        if new is None or new["metadata"].get("uid") != old["metadata"].get("uid"):
            del known[key]
            changes.append(Change("DELETED", old))
    for key, new in fresh.items():
        old_or_none = known.get(key)
        known[key] = new
        if old_or_none is None:
            changes.append(Change("ADDED", new))
        elif old_or_none["metadata"].get("resourceVersion") != new["metadata"].get("resourceVersion"):
            changes.append(Change("MODIFIED", new))
    return changes


def _remember(known: dict[str, Object], kind: str, obj: Object) -> Change:
    key = key_of(obj)
    if kind == "DELETED":
        known.pop(key, None)
        return Change("DELETED", obj)
    seen = key in known
    known[key] = obj
    return Change("MODIFIED" if seen else "ADDED", obj)
