"""Which names a pod can resolve: hosts-file lines from Services and pods. Pure.

As cluster DNS would answer: `service[.namespace[.svc[.cluster.local]]]` is the Service's address, or for a headless one
those of its ready pods; `hostname.service...` is one pod of a headless Service. A name without a namespace means the
reader's own. Unlike DNS, a pod with a hostname is known under every headless Service that selects it, not only under
`spec.subdomain`: manifests of two eras name the same pods through two Services.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

Object = dict[str, Any]
DOMAIN = "svc.cluster.local"


def records(services: Iterable[Object], pods: Iterable[Object]) -> dict[tuple[str, str], list[str]]:
    """(namespace, name within it) -> addresses, in a stable order."""
    by_namespace: dict[str, list[Object]] = defaultdict(list)
    for pod in pods:
        if _address(pod) and not _has_ended(pod):
            by_namespace[pod["metadata"]["namespace"]].append(pod)
    found: dict[tuple[str, str], list[str]] = {}
    for service in services:
        namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
        address = service["spec"].get("clusterIP")
        if service["spec"].get("type") == "ExternalName" or not address:
            continue
        if address != "None":
            found[namespace, name] = [address]
            continue
        for pod in by_namespace[namespace]:
            if not _selects(service, pod) or not _is_published(service, pod):
                continue
            found.setdefault((namespace, name), []).append(_address(pod))
            hostname = pod["spec"].get("hostname")
            if hostname and pod["spec"].get("subdomain"):
                found.setdefault((namespace, f"{hostname}.{name}"), []).append(_address(pod))
    return {key: sorted(set(value)) for key, value in sorted(found.items())}


def lines(found: Mapping[tuple[str, str], list[str]], namespace: str) -> str:
    """Hosts-file text for readers in `namespace`."""
    out = []
    for (where, name), addresses in found.items():
        names = [f"{name}.{where}.{DOMAIN}", f"{name}.{where}.svc", f"{name}.{where}"]
        if where == namespace:
            names.insert(0, name)
        out += [f"{address}\t{' '.join(names)}\n" for address in addresses]
    return "".join(out)


def header(pod: Object, address: str) -> str:
    """A pod's own lines. Its `localhost` is its own address: there a program that listens on all addresses is found."""
    spec = pod["spec"]
    hostname = str(spec.get("hostname") or pod["metadata"]["name"])[:63]
    own = [hostname]
    if spec.get("subdomain"):
        own.insert(0, f"{hostname}.{spec['subdomain']}.{pod['metadata']['namespace']}.{DOMAIN}")
    text = f"# managed by baton\n{address}\tlocalhost {' '.join(own)}\n"
    for alias in spec.get("hostAliases") or []:
        text += f"{alias['ip']}\t{' '.join(alias.get('hostnames') or [])}\n"
    return text


def _selects(service: Object, pod: Object) -> bool:
    selector = service["spec"].get("selector")
    labels = pod["metadata"].get("labels") or {}
    return bool(selector) and all(labels.get(key) == value for key, value in selector.items())


def _is_published(service: Object, pod: Object) -> bool:
    if service["spec"].get("publishNotReadyAddresses"):
        return True
    if pod["metadata"].get("deletionTimestamp"):
        return False
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def _address(pod: Object) -> str:
    return str((pod.get("status") or {}).get("podIP") or "")


def _has_ended(pod: Object) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
