"""Exclusive placement: one group (or subgroup) per topology domain, and all of it there."""

from __future__ import annotations

from baton.api.resources import Object

_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def add_exclusive_terms(spec: Object, topology: str, label: str, key: str) -> None:
    """Draw the pods with ``label=key`` into one domain of ``topology`` and keep those with any other key out of it.

    Other terms stay. A template that has required terms of both kinds for this topology already is left as it is.
    """
    affinity = spec.setdefault("affinity", {})
    together = affinity.setdefault("podAffinity", {}).setdefault(_REQUIRED, [])
    apart = affinity.setdefault("podAntiAffinity", {}).setdefault(_REQUIRED, [])
    if all(any(term.get("topologyKey") == topology for term in terms) for terms in (together, apart)):
        return
    mine = {"key": label, "operator": "In", "values": [key]}
    others = [{"key": label, "operator": "Exists"}, {"key": label, "operator": "NotIn", "values": [key]}]
    together.append({"labelSelector": {"matchExpressions": [mine]}, "topologyKey": topology})
    apart.append({"labelSelector": {"matchExpressions": others}, "topologyKey": topology})


def pin_to_topology(spec: Object, topology: str, value: str) -> None:
    """Only nodes of the leader's domain will do."""
    spec["nodeSelector"] = {**(spec.get("nodeSelector") or {}), topology: value}


def topology_of(node: Object | None, topology: str) -> str | None:
    """The node's value of a topology label."""
    if node is None:
        return None
    value = (node["metadata"].get("labels") or {}).get(topology)
    return None if value is None else str(value)
