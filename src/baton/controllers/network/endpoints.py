"""discovery.k8s.io/v1 EndpointSlices: the addresses and ports behind each Service that has a selector.

Pods that resolve a named targetPort to different numbers go to different slices. Names are a hash of the ports, so a
pass is repeatable. One slice holds all pods of one port set (Kubernetes splits at 100; one machine does not need it).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from baton.api import labels
from baton.api.resources import ENDPOINT_SLICES, PODS, SERVICES, Object
from baton.controllers.plan import (
    Action,
    Controller,
    Create,
    Delete,
    Patch,
    Plan,
    Trigger,
    World,
    own_key,
    owner_reference,
)
from baton.controllers.pods import is_ready, is_terminating, phase
from baton.controllers.revisions import short_hash

_MANAGER = "endpointslice-controller.k8s.io"


@dataclass(frozen=True, slots=True)
class EndpointsObserved:
    service: Object
    pods: list[Object]
    slices: list[Object]


def observe(world: World, key: str) -> EndpointsObserved | None:
    namespace, _, name = key.partition("/")
    service = world.get(SERVICES, name, namespace)
    if service is None or not (service["spec"].get("selector")):
        return None
    slices = [
        entry
        for entry in world.owned(ENDPOINT_SLICES, service["metadata"]["uid"])
        if (entry["metadata"].get("labels") or {}).get(labels.MANAGED_BY) == _MANAGER
    ]
    pods = [pod for pod in _candidates(world, service["spec"]["selector"], namespace) if _selects(service, pod)]
    return EndpointsObserved(service, pods, slices)


# A selector is looked up by its first indexed label, else by scanning the namespace.
_INDEXED = (labels.GROUP_NAME, labels.OLD_GROUP_NAME)


def _candidates(world: World, selector: dict[str, str], namespace: str) -> list[Object]:
    for label in _INDEXED:
        if label in selector:
            return world.labelled(PODS, label, selector[label], namespace)
    return world.all(PODS, namespace)


def _selects(service: Object, pod: Object) -> bool:
    found = pod["metadata"].get("labels") or {}
    return all(found.get(key) == value for key, value in service["spec"]["selector"].items())


def reconcile(observed: EndpointsObserved, now: datetime) -> Plan:
    service = observed.service
    if service["metadata"].get("deletionTimestamp"):
        return Plan()
    groups: dict[str, tuple[list[Object], list[Object]]] = {}
    for pod in sorted(observed.pods, key=lambda pod: str(pod["metadata"]["name"])):
        if not (pod.get("status") or {}).get("podIP") or phase(pod) in ("Failed", "Succeeded"):
            continue
        ports = _ports(service, pod)
        groups.setdefault(short_hash(ports), (ports, []))[1].append(_endpoint(service, pod))
    if not groups:  # an empty slice says "known, none ready"; its absence would say "not looked at"
        ports = _ports(service, {"spec": {"containers": []}})
        groups[short_hash(ports)] = (ports, [])
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    wanted = {f"{name}-{text}": content for text, content in groups.items()}
    existing = {entry["metadata"]["name"]: entry for entry in observed.slices}
    actions: list[Action] = []
    for slice_name, (ports, endpoints) in wanted.items():
        found = existing.get(slice_name)
        if found is None:
            actions.append(Create(ENDPOINT_SLICES, _slice(service, slice_name, ports, endpoints)))
        elif (found.get("endpoints") or []) != endpoints or (found.get("ports") or []) != ports:
            body: Object = {"endpoints": endpoints, "ports": ports}
            actions.append(Patch(ENDPOINT_SLICES, namespace, slice_name, body, why="endpoints changed"))
    for slice_name, entry in existing.items():
        if slice_name not in wanted:
            actions.append(Delete(ENDPOINT_SLICES, namespace, slice_name, entry["metadata"]["uid"], "no such ports"))
    return Plan(tuple(actions))


def _ports(service: Object, pod: Object) -> list[Object]:
    """The Service's ports as numbers of this pod; a name that the pod does not have is left out, as Kubernetes does."""
    result = []
    for port in service["spec"].get("ports") or []:
        protocol = port.get("protocol", "TCP")
        target = port.get("targetPort", port["port"])
        number = target if isinstance(target, int) else _named_port(pod, str(target), protocol)
        if number is None:
            continue
        entry: Object = {"name": port.get("name") or "", "port": number, "protocol": protocol}
        if port.get("appProtocol"):
            entry["appProtocol"] = port["appProtocol"]
        result.append(entry)
    return result


def _named_port(pod: Object, name: str, protocol: str) -> int | None:
    if name.isdigit():
        return int(name)
    for container in pod["spec"]["containers"]:
        for port in container.get("ports") or []:
            if port.get("name") == name and port.get("protocol", "TCP") == protocol:
                return int(port["containerPort"])
    return None


def _endpoint(service: Object, pod: Object) -> Object:
    meta, spec = pod["metadata"], pod["spec"]
    serving = is_ready(pod) or (is_terminating(pod) and _ready_condition(pod))
    endpoint: Object = {
        "addresses": [pod["status"]["podIP"]],
        "conditions": {
            "ready": bool(service["spec"].get("publishNotReadyAddresses")) or is_ready(pod),
            "serving": serving,
            "terminating": is_terminating(pod),
        },
        "targetRef": {"kind": "Pod", "namespace": meta["namespace"], "name": meta["name"], "uid": meta["uid"]},
    }
    if spec.get("hostname") and spec.get("subdomain") == service["metadata"]["name"]:
        endpoint["hostname"] = spec["hostname"]
    if spec.get("nodeName"):
        endpoint["nodeName"] = spec["nodeName"]
    return endpoint


def _ready_condition(pod: Object) -> bool:
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in pod["status"].get("conditions") or [])


def _slice(service: Object, name: str, ports: list[Object], endpoints: list[Object]) -> Object:
    meta = service["metadata"]
    own = {labels.SERVICE_NAME: meta["name"], labels.MANAGED_BY: _MANAGER}
    if service["spec"].get("clusterIP") == "None":
        own["service.kubernetes.io/headless"] = ""
    return {
        "apiVersion": ENDPOINT_SLICES.api_version,
        "kind": ENDPOINT_SLICES.kind,
        "metadata": {
            "name": name,
            "namespace": meta["namespace"],
            "labels": {**(meta.get("labels") or {}), **own},
            "ownerReferences": [owner_reference(service)],
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": ports,
    }


def _slice_key(obj: Object, _: World) -> Iterable[str]:
    name = (obj["metadata"].get("labels") or {}).get(labels.SERVICE_NAME)
    return (f"{obj['metadata']['namespace']}/{name}",) if name else ()


def _pod_keys(pod: Object, world: World) -> Iterable[str]:
    namespace = pod["metadata"]["namespace"]
    for service in world.all(SERVICES, namespace):
        if service["spec"].get("selector") and _selects(service, pod):
            yield f"{namespace}/{service['metadata']['name']}"


CONTROLLER: Controller[EndpointsObserved] = Controller(
    name="endpointslice",
    resource=SERVICES,
    triggers=(Trigger(SERVICES, own_key), Trigger(PODS, _pod_keys), Trigger(ENDPOINT_SLICES, _slice_key)),
    observe=observe,
    reconcile=reconcile,
    primary=lambda observed: observed.service,
    labels={PODS: _INDEXED},
    gather_s=0.05,
)
