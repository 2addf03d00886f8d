"""Writing Events that `kubectl describe` shows, one object per distinct message with a growing count.

A recorder belongs to one component. Recording never fails the caller: an event that cannot be written is logged.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

from baton.cluster_client.client import Client
from baton.cluster_client.errors import ClientError, NotFound
from baton.cluster_client.resources import EVENTS, Object

log = logging.getLogger(__name__)
EventType = Literal["Normal", "Warning"]
_NUM_REMEMBERED = 4096


def timestamp(moment: datetime) -> str:
    """Kubernetes' time format: RFC 3339, whole seconds, Z."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def utc_now() -> datetime:
    return datetime.now(UTC)


class EventRecorder:
    """``component`` is the source shown in `describe`; ``host`` the node for a node agent."""

    def __init__(
        self, client: Client, component: str, *, host: str = "", now: Callable[[], datetime] = utc_now
    ) -> None:
        self._client = client
        self._component = component
        self._host = host
        self._now = now
        # what is told -> the name of its event object and how often it happened; bounded, oldest forgotten first
        self._told: OrderedDict[str, tuple[str, int]] = OrderedDict()

    async def record(self, about: Object, kind: EventType, reason: str, message: str) -> None:
        """Write (or count up) an event about an object; waits for the server, swallows its refusal into the log."""
        at = self._now()
        key = "\0".join((str(about["metadata"].get("uid")), kind, reason, message))
        name, count = self._told.get(key) or (self._name(about, key, at), 0)
        count += 1
        self._told[key] = (name, count)
        self._told.move_to_end(key)
        while len(self._told) > _NUM_REMEMBERED:
            self._told.popitem(last=False)
        event = self._event(about, kind, reason, message, name, at)
        namespace = event["metadata"]["namespace"]
        try:
            if count > 1:
                patch = {"count": count, "lastTimestamp": event["lastTimestamp"]}
                try:
                    await self._client.patch(EVENTS, name, namespace, patch, kind="merge")
                    return
                except NotFound:  # expired on the server: write it afresh
                    self._told[key] = (name, 1)
            await self._client.create(EVENTS, event, namespace)
        except ClientError as error:
            log.warning("event not written", extra={"reason": reason, "event_message": message, "error": str(error)})

    def _name(self, about: Object, key: str, at: datetime) -> str:
        """Time first: `kubectl describe` keeps the order of names for events of one second."""
        who = hashlib.sha256(f"{key}\0{self._component}\0{self._host}".encode()).hexdigest()[:6]
        return f"{about['metadata']['name'][:200]}.{int(at.timestamp() * 1e6):x}{who}"

    def _event(self, about: Object, kind: EventType, reason: str, message: str, name: str, at: datetime) -> Object:
        meta = about["metadata"]
        reference = {
            "apiVersion": about.get("apiVersion"),
            "kind": about.get("kind"),
            "name": meta["name"],
            "uid": meta.get("uid"),
            "resourceVersion": meta.get("resourceVersion"),
        }
        if meta.get("namespace"):
            reference["namespace"] = meta["namespace"]
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": meta.get("namespace") or "default"},
            "involvedObject": {name: value for name, value in reference.items() if value},
            "type": kind,
            "reason": reason,
            "message": message[:1024],
            "count": 1,
            "firstTimestamp": timestamp(at),
            "lastTimestamp": timestamp(at),
            "source": {"component": self._component} | ({"host": self._host} if self._host else {}),
            "reportingComponent": self._component,
            "reportingInstance": self._host,
        }
