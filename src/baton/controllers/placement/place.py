"""Where one pod goes: filters, then a score. A pure function with the reasons in Kubernetes' own words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from baton.api.resources import Object
from baton.controllers.placement.affinity import (
    matches_node,
    preference,
    satisfies_affinity,
    untolerated_taint,
    violates_anti_affinity,
)
from baton.controllers.placement.resources import free_on, lacking, requests_of
from baton.controllers.pods import phase


@dataclass(frozen=True, slots=True)
class Placement:
    """``node`` is the chosen node's name, or None with ``message`` as in a FailedScheduling event."""

    node: str | None
    message: str = ""


def place(pod: Object, nodes: list[Object], pods: list[Object]) -> Placement:
    """Choose a node for ``pod`` given all ``nodes`` and ``pods`` (those without nodeName or finished do not count).

    Among equals by preference the node with most room left wins, then the first by name.
    """
    by_name = {node["metadata"]["name"]: node for node in nodes}
    active = [
        other
        for other in pods
        if other["spec"].get("nodeName") in by_name and phase(other) not in ("Failed", "Succeeded")
    ]
    placed = [(other, by_name[other["spec"]["nodeName"]]) for other in active]
    reasons: Counter[str] = Counter()
    best: tuple[float, str] | None = None
    for name in sorted(by_name):
        node = by_name[name]
        here = [other for other in active if other["spec"]["nodeName"] == name]
        found = _reasons(pod, node, here, placed)
        if found:
            reasons.update(found)
            continue
        score = preference(pod, node, placed) * 100 + _room(pod, node, here)
        if best is None or score > best[0]:
            best = (score, name)
    if best is not None:
        return Placement(best[1])
    return Placement(None, failure_message(len(nodes), reasons))


def failure_message(num_nodes: int, reasons: Counter[str]) -> str:
    """`0/3 nodes are available: 1 Insufficient nvidia.com/gpu, 2 node(s) ...`"""
    if not num_nodes:
        return "no nodes available to schedule pods"
    parts = sorted(f"{count} {reason}" for reason, count in reasons.items())
    return f"0/{num_nodes} nodes are available: {', '.join(parts)}."


def _reasons(pod: Object, node: Object, here: list[Object], placed: list[tuple[Object, Object]]) -> list[str]:
    """Why a node will not do: the first filter that says no, as Kubernetes stops there too (resources name all)."""
    if (node.get("spec") or {}).get("unschedulable"):
        return ["node(s) were unschedulable"]
    if not _is_ready(node):
        return ["node(s) were not ready"]
    taint = untolerated_taint(pod, node)
    if taint is not None:
        return [f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value') or ''}}}"]
    if not matches_node(pod, node):
        return ["node(s) didn't match Pod's node affinity/selector"]
    if _port_conflict(pod, here):
        return ["node(s) didn't have free ports for the requested pod ports"]
    short = lacking(requests_of(pod), free_on(node, here))
    if short:
        return ["Too many pods" if name == "pods" else f"Insufficient {name}" for name in short]
    anti = violates_anti_affinity(pod, node, placed)
    if anti == "existing":
        return ["node(s) didn't satisfy existing pods anti-affinity rules"]
    if anti == "own":
        return ["node(s) didn't match pod anti-affinity rules"]
    if not satisfies_affinity(pod, node, placed):
        return ["node(s) didn't match pod affinity rules"]
    return []


def _is_ready(node: Object) -> bool:
    for entry in (node.get("status") or {}).get("conditions") or []:
        if entry.get("type") == "Ready":
            return bool(entry.get("status") == "True")
    return True


def _port_conflict(pod: Object, here: list[Object]) -> bool:
    wanted = _host_ports(pod)
    return any(wanted & _host_ports(other) for other in here) if wanted else False


def _host_ports(pod: Object) -> set[tuple[str, int]]:
    return {
        (port.get("protocol", "TCP"), port["hostPort"])
        for container in pod["spec"].get("containers") or []
        for port in container.get("ports") or []
        if port.get("hostPort")
    }


def _room(pod: Object, node: Object, here: list[Object]) -> float:
    """0..1: the mean share of asked-for resources that stays free. Spreads pods, so that one node is not overrun."""
    wanted, free = requests_of(pod), free_on(node, here)
    capacity = free_on(node, [])
    shares = [float((free[name] - amount) / capacity[name]) for name, amount in wanted.items() if capacity.get(name)]
    return sum(shares) / len(shares) if shares else 0.0
