"""Services at `http://127.0.0.1:PORT`: what a cloud's load balancer is on a cluster, a loopback port is here.

A Service of type LoadBalancer is published at its own ports; `baton up --publish SERVICE=PORT` chooses the (first) port of
any Service. `Publisher` keeps the listeners as the Services are, relays each connection to the Service's own address, and
says where it listens in an annotation and in `status.loadBalancer`. A port in use is told as an event and tried again.
Which pod answers is the Service proxy's affair.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from baton.api.resources import SERVICES, Object, key_of
from baton.cluster.home import HOST, HomeError
from baton.cluster.manifests import Manifest
from baton.cluster.services.proxy import Frontend, Proxy
from baton.cluster_client import Cache, Client, ClientError, EventRecorder

logger = logging.getLogger(__name__)
WANTED = "baton.dev/publish-port"
"""Annotation that asks for a port, as text."""
PUBLISHED = "baton.dev/published"
"""Annotation that tells where, `127.0.0.1:PORT` of each port, comma between. Written by `Publisher` alone."""
RETRY_S = 2.0


@dataclass(frozen=True, slots=True)
class Route:
    """One listener: `port` on 127.0.0.1, relayed to `address`:`target`."""

    port: int
    address: str
    target: int


def check_names(manifests: list[Manifest], ports: Mapping[str, int]) -> None:
    """Raises `HomeError` for a port that was chosen for a Service which the manifests do not have."""
    known = [one.name for one in manifests if one.kind == "Service"]
    for name in ports:
        if name not in known:
            there = ", ".join(known) or "none"
            raise HomeError(f"--publish {name}={ports[name]}: no Service of that name in the files; there is: {there}")


async def choose_port(client: Client, service: Object, port: int) -> None:
    """Ask for `port` on 127.0.0.1. Kept until another is chosen: applying the manifest again does not touch it."""
    metadata = service["metadata"]
    if (metadata.get("annotations") or {}).get(WANTED) != str(port):
        body: Object = {"metadata": {"annotations": {WANTED: str(port)}}}
        await client.patch(SERVICES, metadata["name"], metadata["namespace"], body)


def routes(service: Object) -> tuple[Route, ...]:
    """The listeners that a Service wants; none for one that is not published or has no address."""
    spec, metadata = service["spec"], service["metadata"]
    wanted = (metadata.get("annotations") or {}).get(WANTED)
    address = spec.get("clusterIP")
    is_balanced = spec.get("type") == "LoadBalancer"
    if metadata.get("deletionTimestamp") or not address or address == "None" or not (wanted or is_balanced):
        return ()
    ports = [int(one["port"]) for one in spec.get("ports") or [] if one.get("protocol", "TCP") == "TCP"]
    chosen = int(str(wanted)) if str(wanted or "").isdigit() else None
    found = [Route(chosen if chosen and index == 0 else port, address, port) for index, port in enumerate(ports)]
    return tuple(found if is_balanced else found[:1])


class Publisher:
    """Keeps the listeners. `run` until cancelled; one per daemon."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.ready = asyncio.Event()
        """Set after the first round: what could be published is."""
        self._services = Cache(client, SERVICES)
        self._services.subscribe(lambda _: self._changed.set())
        self._changed = asyncio.Event()
        self._events = EventRecorder(client, "baton-publisher")
        self._open: dict[Route, Proxy] = {}
        self._refused: set[tuple[str, Route]] = set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._services.run(), name="publisher-services")
            await self._services.synced()
            try:
                while True:
                    self._changed.clear()
                    complete = await self._reconcile()
                    self.ready.set()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), None if complete else RETRY_S)
            finally:
                await asyncio.gather(*(proxy.stop() for proxy in self._open.values()))

    async def _reconcile(self) -> bool:
        """Listeners and annotations as the Services want them; False when something is to be tried again."""
        complete = True
        services = {key_of(one): one for one in self._services.list()}
        wanted = {key: routes(one) for key, one in services.items()}
        for route in set(self._open) - {route for many in wanted.values() for route in many}:
            await self._open.pop(route).stop()
        for key, many in wanted.items():
            opened = [route for route in many if await self._listen(key, services[key], route)]
            complete &= len(opened) == len(many)
            try:
                await self._tell(services[key], opened)
            except ClientError as error:
                logger.warning("%s: publication not written: %s", key, error)
                complete = False
        return complete

    async def _listen(self, key: str, service: Object, route: Route) -> bool:
        if route in self._open:
            return True
        proxy = Proxy(Frontend(HOST, route.port))
        try:
            await proxy.start()
        except OSError as error:
            if (key, route) not in self._refused:
                self._refused.add((key, route))
                await self._events.record(service, "Warning", "PortNotPublished", refusal(service, route, error))
            return False
        proxy.set_backends(((route.address, route.target),))
        self._open[route] = proxy
        self._refused.discard((key, route))
        return True

    async def _tell(self, service: Object, opened: list[Route]) -> None:
        metadata, namespace = service["metadata"], service["metadata"]["namespace"]
        told = (metadata.get("annotations") or {}).get(PUBLISHED)
        text = ",".join(f"{HOST}:{route.port}" for route in opened) or None
        if told != text:
            body: Object = {"metadata": {"annotations": {PUBLISHED: text}}}
            await self._client.patch(SERVICES, metadata["name"], namespace, body)
        if service["spec"].get("type") == "LoadBalancer":
            ingress = [{"ip": HOST, "ipMode": "Proxy"}] if opened else None
            if (service.get("status") or {}).get("loadBalancer", {}).get("ingress") != ingress:
                body = {"status": {"loadBalancer": {"ingress": ingress}}}
                await self._client.patch(SERVICES, metadata["name"], namespace, body, subresource="status")


def refusal(service: Object, route: Route, error: OSError) -> str:
    """One line: what is wrong with the port and what to do."""
    choose = f"choose another with `baton up FILE --publish {service['metadata']['name']}=PORT`"
    if error.errno == errno.EADDRINUSE:
        return f"port {route.port} on {HOST} is in use by another program; {choose}"
    return f"port {route.port} on {HOST}: {error.strerror}; {choose}"
