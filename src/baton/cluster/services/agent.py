"""Keeps one proxy per Service port, over the endpoints that EndpointSlices name. A kube-proxy for one machine.

A Service's address, `spec.clusterIP`, is the API server's choice and must be a loopback one. Level-based: each change
leads to one comparison of what should listen with what does. A port that cannot be opened is told by an event on the
Service and tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections import defaultdict
from typing import Any

from baton.cluster.services.proxy import Frontend, Proxy
from baton.cluster_client import Cache, Client, EventRecorder
from baton.cluster_client.resources import ENDPOINT_SLICES, SERVICES

Object = dict[str, Any]
Backends = tuple[tuple[str, int], ...]
SERVICE_LABEL = "kubernetes.io/service-name"
RETRY_S = 5.0


class ServiceAgent:
    """`services` may be shared with others (its watch is theirs then); `run` follows until cancelled."""

    def __init__(self, client: Client, services: Cache | None = None) -> None:
        self._owns_services = services is None
        self.services = services or Cache(client, SERVICES)
        self.slices = Cache(client, ENDPOINT_SLICES, index_labels=(SERVICE_LABEL,))
        self._recorder = EventRecorder(client, "kube-proxy")
        self._proxies: dict[Frontend, Proxy] = {}
        self._failed: set[Frontend] = set()
        self._refused: set[str] = set()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        for cache in (self.services, self.slices):
            cache.subscribe(lambda _: self._changed.set())
        async with asyncio.TaskGroup() as group:
            if self._owns_services:
                group.create_task(self.services.run(), name="watch services")
            group.create_task(self.slices.run(), name="watch endpointslices")
            await self.services.synced()
            await self.slices.synced()
            try:
                while True:
                    self._changed.clear()
                    await self.sync()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), RETRY_S if self._failed else None)
            finally:
                await asyncio.gather(*(proxy.stop() for proxy in self._proxies.values()))

    async def sync(self) -> None:
        """Make what listens equal to what should."""
        wanted: dict[Frontend, tuple[Object, Backends]] = {}
        for service in self.services.list():
            address = await self._address(service)
            if address is None:
                continue
            meta = service["metadata"]
            slices = self.slices.by_label(SERVICE_LABEL, meta["name"], meta["namespace"])
            for port in service["spec"].get("ports") or []:
                if str(port.get("protocol") or "TCP") == "TCP":
                    wanted[Frontend(address, int(port["port"]))] = (service, backends(port, slices))
        for frontend in [one for one in self._proxies if one not in wanted]:
            await self._proxies.pop(frontend).stop()
        self._failed &= set(wanted)
        for frontend, (service, endpoints) in wanted.items():
            if await self._listens(frontend, service):
                self._proxies[frontend].set_backends(endpoints)

    async def _listens(self, frontend: Frontend, service: Object) -> bool:
        if frontend in self._proxies:
            return True
        proxy = Proxy(frontend)
        try:
            await proxy.start()
        except OSError as error:
            if frontend not in self._failed:
                self._failed.add(frontend)
                text = f"cannot listen on {frontend.address}:{frontend.port}: {error.strerror or error}"
                await self._recorder.record(service, "Warning", "FailedToListen", text)
            return False
        self._failed.discard(frontend)
        self._proxies[frontend] = proxy
        return True

    async def _address(self, service: Object) -> str | None:
        """The Service's address on this machine; None for one without (headless, ExternalName, or not given yet)."""
        spec = service["spec"]
        address = str(spec.get("clusterIP") or "")
        if address == "None" or spec.get("type") == "ExternalName":
            return None
        if not address or _is_loopback(address):
            return address or None
        if address not in self._refused:
            self._refused.add(address)
            text = f"clusterIP {address} is not an address of this machine: nothing listens for this Service"
            await self._recorder.record(service, "Warning", "UnusableAddress", text)
        return None


def backends(port: Object, slices: list[Object]) -> Backends:
    """Ready endpoints of one Service port: those of each slice under the slice port of the same name."""
    found: dict[tuple[str, int], None] = {}
    wanted = str(port.get("name") or "")
    numbers: dict[int, list[str]] = defaultdict(list)
    for one in slices:
        for target in one.get("ports") or []:
            if str(target.get("name") or "") == wanted and target.get("port"):
                for endpoint in one.get("endpoints") or []:
                    conditions = endpoint.get("conditions") or {}
                    if conditions.get("ready") is not False:
                        numbers[int(target["port"])] += endpoint.get("addresses") or []
    for number, addresses in sorted(numbers.items()):
        for address in sorted(addresses):
            found[address, number] = None
    return tuple(found)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
