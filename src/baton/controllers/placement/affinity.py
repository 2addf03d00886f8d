"""Node selectors, node affinity, pod affinity and anti-affinity with topology keys, taints: each as a question with
yes or no for one node. Preferences are scores; `place` adds them up.
"""

from __future__ import annotations

from collections.abc import Iterable

from baton.api.resources import Object
from baton.api.selectors import matches_selector


def matches_node(pod: Object, node: Object) -> bool:
    """nodeSelector and required node affinity."""
    labels = node["metadata"].get("labels") or {}
    selector = pod["spec"].get("nodeSelector") or {}
    if any(labels.get(key) != value for key, value in selector.items()):
        return False
    required = _affinity(pod, "nodeAffinity").get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    return any(_node_term(term, node) for term in required.get("nodeSelectorTerms") or [])


def _affinity(pod: Object, kind: str) -> Object:
    return dict((pod["spec"].get("affinity") or {}).get(kind) or {})


def _node_term(term: Object, node: Object) -> bool:
    expressions, fields = term.get("matchExpressions") or [], term.get("matchFields") or []
    if not expressions and not fields:
        return False
    labels = node["metadata"].get("labels") or {}
    named = {"metadata.name": node["metadata"]["name"]}
    return all(_node_expression(e, labels) for e in expressions) and all(_node_expression(e, named) for e in fields)


def _node_expression(expression: Object, labels: dict[str, str]) -> bool:
    operator = expression["operator"]
    if operator not in ("Gt", "Lt"):
        return matches_selector({"matchExpressions": [expression]}, labels)
    value, bound = labels.get(expression["key"], ""), (expression.get("values") or [""])[0]
    if not (value.lstrip("-").isdigit() and bound.lstrip("-").isdigit()):
        return False
    return int(value) > int(bound) if operator == "Gt" else int(value) < int(bound)


def untolerated_taint(pod: Object, node: Object) -> Object | None:
    """The first NoSchedule or NoExecute taint the pod does not tolerate."""
    tolerations = pod["spec"].get("tolerations") or []
    for taint in (node.get("spec") or {}).get("taints") or []:
        if taint.get("effect") == "PreferNoSchedule":
            continue
        if not any(_tolerates(toleration, taint) for toleration in tolerations):
            return dict(taint)
    return None


def _tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") not in (None, "", taint.get("effect")):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return toleration.get("key") == taint["key"] and (toleration.get("value") or "") == (taint.get("value") or "")


def satisfies_affinity(pod: Object, node: Object, placed: list[tuple[Object, Object]]) -> bool:
    """Required pod affinity, ``placed`` being (pod, its node). The first of a self-affine group may go anywhere."""
    return all(
        _has_match(term, pod, node, placed) or _is_first_of_its_kind(term, pod, node, placed)
        for term in _required(pod, "podAffinity")
    )


def violates_anti_affinity(pod: Object, node: Object, placed: list[tuple[Object, Object]]) -> str | None:
    """ "own" when the pod's required anti-affinity forbids the node, "existing" when that of a placed pod does."""
    if any(_has_match(term, pod, node, placed) for term in _required(pod, "podAntiAffinity")):
        return "own"
    for other, where in placed:
        for term in _required(other, "podAntiAffinity"):
            if _same_topology(term, node, where) and _term_selects(term, other, pod):
                return "existing"
    return None


def preference(pod: Object, node: Object, placed: list[tuple[Object, Object]]) -> int:
    """Sum of the weights of preferred terms that hold on the node; anti-affinity counts against it."""
    score = 0
    for entry in _preferred(pod, "nodeAffinity"):
        score += entry["weight"] if _node_term(entry["preference"], node) else 0
    for kind, sign in (("podAffinity", 1), ("podAntiAffinity", -1)):
        for entry in _preferred(pod, kind):
            score += sign * entry["weight"] * _has_match(entry["podAffinityTerm"], pod, node, placed)
    for taint in (node.get("spec") or {}).get("taints") or []:
        tolerated = any(_tolerates(t, taint) for t in pod["spec"].get("tolerations") or [])
        score -= 1 if taint.get("effect") == "PreferNoSchedule" and not tolerated else 0
    return score


def _required(pod: Object, kind: str) -> list[Object]:
    return _affinity(pod, kind).get("requiredDuringSchedulingIgnoredDuringExecution") or []


def _preferred(pod: Object, kind: str) -> list[Object]:
    return _affinity(pod, kind).get("preferredDuringSchedulingIgnoredDuringExecution") or []


def _has_match(term: Object, pod: Object, node: Object, placed: Iterable[tuple[Object, Object]]) -> bool:
    return any(_same_topology(term, node, where) and _term_selects(term, pod, other) for other, where in placed)


def _is_first_of_its_kind(term: Object, pod: Object, node: Object, placed: list[tuple[Object, Object]]) -> bool:
    if not _term_selects(term, pod, pod) or term["topologyKey"] not in (node["metadata"].get("labels") or {}):
        return False
    return not any(_term_selects(term, pod, other) for other, _ in placed)


def _same_topology(term: Object, node: Object, other: Object) -> bool:
    key = term["topologyKey"]
    value = (node["metadata"].get("labels") or {}).get(key)
    return value is not None and value == (other["metadata"].get("labels") or {}).get(key)


def _term_selects(term: Object, owner: Object, candidate: Object) -> bool:
    """Whether ``owner``'s term means ``candidate``: namespaces (the owner's own by default) and label selector."""
    namespaces = term.get("namespaces") or []
    if not namespaces and term.get("namespaceSelector") is None:
        namespaces = [owner["metadata"].get("namespace")]
    if namespaces and candidate["metadata"].get("namespace") not in namespaces:
        return False
    selector = term.get("labelSelector")
    return selector is not None and matches_selector(selector, candidate["metadata"].get("labels") or {})
