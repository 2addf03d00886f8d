"""How much a pod asks for and a node has left. Quantities are exact; "pods" counts as a resource like any other."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal

from baton.api.quantity import parse_quantity
from baton.api.resources import Object

Amounts = dict[str, Decimal]


def requests_of(pod: Object) -> Amounts:
    """Sum over containers, at least each init container's, plus overhead. A limit without request is the request."""
    spec = pod["spec"]
    total: Amounts = {"pods": Decimal(1)}
    for container in spec.get("containers") or []:
        _add(total, _container(container))
    for container in spec.get("initContainers") or []:
        amounts = _container(container)
        if container.get("restartPolicy") == "Always":  # a sidecar runs beside the containers
            _add(total, amounts)
        else:
            for name, amount in amounts.items():
                total[name] = max(total.get(name, Decimal(0)), amount)
    _add(total, {name: parse_quantity(value) for name, value in (spec.get("overhead") or {}).items()})
    return total


def _container(container: Object) -> Amounts:
    resources = container.get("resources") or {}
    merged = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    return {name: parse_quantity(value) for name, value in merged.items()}


def _add(total: Amounts, more: Amounts) -> None:
    for name, amount in more.items():
        total[name] = total.get(name, Decimal(0)) + amount


def free_on(node: Object, pods: Iterable[Object]) -> Amounts:
    """Allocatable minus what the pods on the node ask for."""
    status = node.get("status") or {}
    source = status.get("allocatable") or status.get("capacity") or {}
    free = {name: parse_quantity(value) for name, value in source.items()}
    for pod in pods:
        for name, amount in requests_of(pod).items():
            if name in free or name != "pods":  # a node that names no number of pods sets no bound on it
                free[name] = free.get(name, Decimal(0)) - amount
    return free


def lacking(wanted: Amounts, free: Amounts) -> list[str]:
    """Names of resources that do not fit, sorted. Nothing asked for never lacks; "pods" only if the node counts them."""
    return sorted(
        name
        for name, amount in wanted.items()
        if amount > 0 and amount > free.get(name, Decimal(0)) and not (name == "pods" and "pods" not in free)
    )
