"""What the server itself writes into built-in objects: service addresses, pod QoS, bindings of spec and status.

Owns `prepare_create`, `prepare_update` and `ServiceAddresses`. Not here: defaults that clients could have written
(see `defaults`), CRD status (see `crd`).
"""

from __future__ import annotations

import ipaddress
from typing import Any

from baton.cluster.apiserver.errors import Cause
from baton.cluster.apiserver.rules_pod import quantity

JSON = dict[str, Any]


class ServiceAddresses:
    """Hands out cluster addresses of Services from one network.

    Invariant: `used` holds exactly the addresses of the stored Services of this network (set by the caller through
    `take` and `free`).
    """

    def __init__(self, network: str = "127.96.0.0/16") -> None:
        self.network = ipaddress.IPv4Network(network)
        self.used: set[str] = set()
        self._next = 1

    def take(self, address: str) -> bool:
        """Reserves a given address; False when it is in use."""
        if address in self.used:
            return False
        self.used.add(address)
        return True

    def allocate(self) -> str | None:
        """A free address, now reserved; None when the network is full."""
        size = self.network.num_addresses - 2
        for _ in range(size):
            candidate = str(self.network[self._next])
            self._next = self._next % size + 1
            if self.take(candidate):
                return candidate
        return None

    def free(self, address: str) -> None:
        self.used.discard(address)


def prepare_create(kind: str, obj: JSON, has_status: bool) -> None:
    """Status is the server's and the controllers' to write: what a client sent at creation is dropped."""
    if kind == "Pod":
        _admit_pod(obj.setdefault("spec", {}))
        obj["status"] = {"phase": "Pending", "qosClass": qos_class(obj.get("spec") or {})}
    elif kind == "Service":
        obj["status"] = {"loadBalancer": {}}
    elif kind == "Namespace":
        obj.setdefault("spec", {})["finalizers"] = ["kubernetes"]
        obj["status"] = {"phase": "Active"}
    elif kind in ("PersistentVolumeClaim", "PersistentVolume"):
        obj["status"] = {"phase": "Pending"}
    elif kind == "Node":
        obj.setdefault("spec", {})
        obj.setdefault("status", {})  # kubelets register with their status
    elif has_status:
        obj["status"] = {"replicas": 0} if kind in ("StatefulSet", "ReplicaSet") else {}


def _admit_pod(spec: JSON) -> None:
    """What Kubernetes' admission puts into every pod."""
    spec.setdefault("priority", 0)
    spec.setdefault("preemptionPolicy", "PreemptLowerPriority")
    account = spec.setdefault("serviceAccountName", "default")
    spec.setdefault("serviceAccount", account)


def prepare_update(kind: str, new: JSON, old: JSON) -> None:
    """Carries over what an update leaves out but may not drop."""
    if kind == "Service":
        spec, before = new.get("spec") or {}, old.get("spec") or {}
        if spec.get("type") != "ExternalName":
            for name in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
                if not spec.get(name) and before.get(name):
                    spec[name] = before[name]
    elif kind == "Namespace":
        new.setdefault("spec", {})["finalizers"] = (old.get("spec") or {}).get("finalizers") or []
    elif kind == "Pod" and (old.get("spec") or {}).get("nodeName"):
        new.setdefault("spec", {}).setdefault("nodeName", old["spec"]["nodeName"])


def allocate_address(obj: JSON, addresses: ServiceAddresses) -> list[Cause]:
    """Gives a new Service its address; causes when the wanted one is taken or none is left."""
    spec = obj.setdefault("spec", {})
    if spec.get("type") == "ExternalName":
        return []
    wanted = spec.get("clusterIP")
    if wanted and wanted != "None" and not addresses.take(wanted):
        text = "failed to allocate IP " + wanted + ": provided IP is already allocated"
        return [Cause.invalid("spec.clusterIPs", [wanted], text)]
    if not wanted:
        wanted = addresses.allocate()
        if wanted is None:
            return [Cause.invalid("spec.clusterIP", "", f"no free address in {addresses.network}")]
    spec["clusterIP"], spec["clusterIPs"] = wanted, [wanted]
    spec.setdefault("ipFamilies", ["IPv4"])
    spec.setdefault("ipFamilyPolicy", "SingleStack")
    return []


def qos_class(spec: JSON) -> str:
    """Guaranteed, Burstable or BestEffort from the containers' cpu and memory."""
    containers = [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]
    any_set, guaranteed = False, True
    for container in containers:
        resources = container.get("resources") or {}
        limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
        for name in ("cpu", "memory"):
            any_set = any_set or quantity(limits.get(name, 0)) > 0 or quantity(requests.get(name, 0)) > 0
            same = name in limits and quantity(limits[name]) == quantity(requests.get(name, limits[name]))
            guaranteed = guaranteed and same
    return "BestEffort" if not any_set else "Guaranteed" if guaranteed else "Burstable"
