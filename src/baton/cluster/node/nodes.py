"""Virtual nodes: the Node objects of this machine, their capacity and labels, and the Lease that says they live.

How many there are and what they offer is the caller's choice (`NodeSpec`); by default every node offers plenty, extended
resources too, since they place pods and reserve nothing. `Nodes` grows them by an extended resource that a pod asks for
and no node has, unless the caller fixed the capacity.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import baton
from baton.cluster.node.environment import HOST_IP, Object
from baton.cluster.node.status import rfc3339
from baton.cluster_client import AlreadyExists, Client, ClientError, NotFound
from baton.cluster_client.resources import LEASES, NODES

log = logging.getLogger(__name__)
LEASE_NAMESPACE = "kube-node-lease"
LEASE_DURATION_S = 40
LEASE_RENEW_S = 10.0
STATUS_REFRESH_S = 300.0
DEFAULT_CAPACITY: Mapping[str, str] = {
    "cpu": "256", "memory": "4Ti", "ephemeral-storage": "4Ti", "pods": "1000",
    "nvidia.com/gpu": "8", "aliyun/erdma": "8", "rdma/hca": "8",
}  # fmt: skip
EXTENDED_AMOUNT = "64"


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One virtual node. `is_fixed`: the capacity is meant, and never grows."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    capacity: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_CAPACITY))
    is_fixed: bool = False


def default_nodes(count: int = 8) -> tuple[NodeSpec, ...]:
    """`baton-0` and so on: one host each, in racks of four, all in one RDMA domain."""
    return tuple(
        NodeSpec(
            f"baton-{number}",
            {
                "topology.kubernetes.io/zone": "local",
                "topology.kubernetes.io/rack": f"rack-{number // 4}",
                "baton.dev/rdma-domain": "rdma-0",
            },
        )
        for number in range(count)
    )


def extended_resources(pod: Object) -> dict[str, str]:
    """Extended resources (names with a slash) that a pod asks for."""
    found: dict[str, str] = {}
    for container in (*(pod["spec"].get("initContainers") or []), *pod["spec"].get("containers", [])):
        resources = container.get("resources") or {}
        for section in ("limits", "requests"):
            found.update({name: str(value) for name, value in (resources.get(section) or {}).items() if "/" in name})
    return found


class Nodes:
    """The Node objects of one agent: registered at start, kept alive by `run`."""

    def __init__(
        self, client: Client, specs: tuple[NodeSpec, ...], runtime_name: str, now: Callable[[], float]
    ) -> None:
        self._client, self._runtime_name, self._now = client, runtime_name, now
        self._specs = {spec.name: spec for spec in specs}
        self._capacity = {spec.name: dict(spec.capacity) for spec in specs}
        self._grown = asyncio.Event()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._specs)

    def allocatable(self, node: str) -> Mapping[str, str]:
        return self._capacity.get(node, {})

    def grow_for(self, pod: Object) -> None:
        """Offer what a pending pod asks for and nobody has heard of."""
        for resource in extended_resources(pod):
            for name, spec in self._specs.items():
                if not spec.is_fixed and resource not in self._capacity[name]:
                    self._capacity[name][resource] = EXTENDED_AMOUNT
                    self._grown.set()

    async def register(self) -> None:
        """Create the Node objects, or bring those of an earlier agent up to date."""
        for spec in self._specs.values():
            labels = {
                "kubernetes.io/hostname": spec.name, "kubernetes.io/os": "linux", "kubernetes.io/arch": _architecture(),
                **spec.labels,
            }  # fmt: skip
            node = {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": spec.name, "labels": labels, "annotations": {"baton.dev/virtual": "true"}},
                "spec": {},
            }
            try:
                await self._client.create(NODES, node)
            except AlreadyExists:
                await self._client.patch(NODES, spec.name, None, {"metadata": {"labels": labels}}, kind="merge")
            await self._write_status(spec.name)
            await self._renew(spec.name)

    async def run(self) -> None:
        """Renew the leases, and the status now and then or when capacity grew. Until cancelled."""
        last_status = self._now()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._grown.wait(), LEASE_RENEW_S)
            refresh = self._grown.is_set() or self._now() - last_status >= STATUS_REFRESH_S
            self._grown.clear()
            if refresh:
                last_status = self._now()
            for name in self._specs:
                try:
                    if refresh:
                        await self._write_status(name)
                    await self._renew(name)
                except ClientError as error:
                    log.warning("node heartbeat failed", extra={"node": name, "error": str(error)})

    async def _write_status(self, name: str) -> None:
        await self._client.patch(
            NODES, name, None, {"status": self._status(name)}, kind="strategic", subresource="status"
        )  # fmt: skip

    def _status(self, name: str) -> Object:
        at = rfc3339(self._now())
        good = {
            "MemoryPressure": ("False", "KubeletHasSufficientMemory", "virtual node: memory is not watched"),
            "DiskPressure": ("False", "KubeletHasNoDiskPressure", "virtual node: disk is not watched"),
            "PIDPressure": ("False", "KubeletHasSufficientPID", "virtual node: processes are not counted"),
            "Ready": ("True", "KubeletReady", f"pods run as processes of this machine ({self._runtime_name})"),
        }
        return {
            "capacity": dict(self._capacity[name]),
            "allocatable": dict(self._capacity[name]),
            "conditions": [
                {
                    "type": kind, "status": value, "reason": reason, "message": message,
                    "lastHeartbeatTime": at, "lastTransitionTime": at,
                }
                for kind, (value, reason, message) in good.items()
            ],
            "addresses": [{"type": "InternalIP", "address": HOST_IP}, {"type": "Hostname", "address": name}],
            "nodeInfo": {
                "kubeletVersion": f"v{baton.__version__}-baton", "containerRuntimeVersion": f"{self._runtime_name}://1",
                "osImage": "this machine", "operatingSystem": "linux", "architecture": _architecture(),
                "kernelVersion": platform.release(), "machineID": "", "systemUUID": "", "bootID": "",
                "kubeProxyVersion": "",
            },
        }  # fmt: skip

    async def _renew(self, name: str) -> None:
        moment = datetime.fromtimestamp(self._now(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": name, "leaseDurationSeconds": LEASE_DURATION_S, "renewTime": moment}
        try:
            await self._client.patch(LEASES, name, LEASE_NAMESPACE, {"spec": spec}, kind="merge")
        except NotFound:
            lease = {
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"name": name, "namespace": LEASE_NAMESPACE}, "spec": spec,
            }  # fmt: skip
            with contextlib.suppress(AlreadyExists, NotFound):  # NotFound: a server without that namespace
                await self._client.create(LEASES, lease, LEASE_NAMESPACE)


def _architecture() -> str:
    machine = platform.machine()
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
