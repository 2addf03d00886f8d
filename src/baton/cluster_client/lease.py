"""Leader election by a Lease object, as Kubernetes' own controllers do it: one holder, renewed, taken over when stale.

A holder that cannot renew for ``renew_deadline_s`` gives up before others may take over (``duration_s`` after the
last change *they saw*; clocks of two machines are never compared).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from baton.cluster_client.client import Client
from baton.cluster_client.errors import AlreadyExists, ClientError, Conflict, NotFound
from baton.cluster_client.resources import LEASES, Object

log = logging.getLogger(__name__)


class LeadershipLost(ClientError):
    """Raised out of :meth:`LeaderElector.hold`: someone else leads, or nothing could be renewed in time."""


@dataclass(frozen=True, slots=True)
class LeaseTiming:
    """Seconds; Kubernetes' own defaults. Needs retry < renew_deadline < duration."""

    duration_s: float = 15.0
    renew_deadline_s: float = 10.0
    retry_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.retry_s < self.renew_deadline_s < self.duration_s:
            raise ValueError(f"lease timing must satisfy 0 < retry < renew_deadline < duration, got {self}")


class LeaderElector:
    """``identity`` must differ between candidates (host name and process id, say)."""

    def __init__(
        self,
        client: Client,
        name: str,
        namespace: str,
        identity: str,
        *,
        timing: LeaseTiming | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._client, self._name, self._namespace, self.identity = client, name, namespace, identity
        self._timing = timing or LeaseTiming()
        self._monotonic, self._sleep = monotonic, sleep
        self._seen: tuple[str, str] | None = None
        self._seen_at = float("-inf")
        self.is_leader = False
        self.leader = ""

    async def acquire(self) -> None:
        """Return once this candidate leads. Waits for ever; failures of the server are logged and tried again."""
        while True:
            try:
                if await self._try():
                    self.is_leader = True
                    log.info("became leader", extra={"lease": self._name, "identity": self.identity})
                    return
            except ClientError as error:
                log.warning("lease not acquired", extra={"lease": self._name, "error": str(error)})
            await self._sleep(self._timing.retry_s)

    async def hold(self) -> None:
        """Renew until cancelled. Raises :class:`LeadershipLost`; whoever runs as leader must stop then."""
        renewed_at = self._monotonic()
        try:
            while True:
                await self._sleep(self._timing.retry_s)
                remaining = self._timing.renew_deadline_s - (self._monotonic() - renewed_at)
                try:
                    renewed = await asyncio.wait_for(self._try(), max(remaining, 0.1))
                except (ClientError, TimeoutError) as error:
                    log.warning("lease not renewed", extra={"lease": self._name, "error": str(error)})
                else:
                    if not renewed:
                        raise LeadershipLost(f"lease {self._name}: {self.leader} leads now")
                    renewed_at = self._monotonic()
                if self._monotonic() - renewed_at > self._timing.renew_deadline_s:
                    raise LeadershipLost(f"lease {self._name}: not renewed for {self._timing.renew_deadline_s:g} s")
        finally:
            self.is_leader = False

    async def release(self) -> None:
        """Give the lease up on a clean stop, so that the next leader need not wait for it to go stale."""
        try:
            lease = await self._client.get(LEASES, self._name, self._namespace)
            if lease.get("spec", {}).get("holderIdentity") == self.identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _micro_now()}
                await self._client.update(LEASES, lease)
        except ClientError as error:
            log.warning("lease not released", extra={"lease": self._name, "error": str(error)})

    async def _try(self) -> bool:
        """One round: create, renew or take over. True when this candidate holds the lease after it."""
        try:
            lease = await self._client.get(LEASES, self._name, self._namespace)
        except NotFound:
            return await self._create()
        spec = lease.setdefault("spec", {})
        holder = str(spec.get("holderIdentity") or "")
        self.leader = holder
        if holder and holder != self.identity and not self._is_stale(holder, str(spec.get("renewTime"))):
            return False
        if holder != self.identity:
            spec["acquireTime"] = _micro_now()
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + 1
        spec["holderIdentity"] = self.identity
        spec["leaseDurationSeconds"] = max(1, int(self._timing.duration_s))
        spec["renewTime"] = _micro_now()
        try:
            await self._client.update(LEASES, lease)
        except Conflict:
            return False
        self.leader = self.identity
        return True

    async def _create(self) -> bool:
        now = _micro_now()
        lease: Object = {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self.identity,
                "leaseDurationSeconds": max(1, int(self._timing.duration_s)),
                "acquireTime": now,
                "renewTime": now,
                "leaseTransitions": 0,
            },
        }
        try:
            await self._client.create(LEASES, lease, self._namespace)
        except AlreadyExists:
            return False
        self.leader = self.identity
        return True

    def _is_stale(self, holder: str, renew_time: str) -> bool:
        if self._seen != (holder, renew_time):
            self._seen, self._seen_at = (holder, renew_time), self._monotonic()
        return self._monotonic() - self._seen_at > self._timing.duration_s


def _micro_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
