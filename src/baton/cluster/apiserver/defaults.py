"""Defaults of built-in kinds that depend on other fields; plain ones are in the `.schema` files.

Owns `apply_defaults(kind, obj)`, which changes the object in place (the caller owns it: it is fresh from `conform`).
Not here: what the server itself sets (uid, clusterIP), see `strategy`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

JSON = dict[str, Any]


def apply_defaults(kind: str, obj: JSON) -> None:
    """Fills what Kubernetes fills for `kind` from other fields of the object."""
    fill = _BY_KIND.get(kind)
    if fill is not None:
        fill(obj)


def default_pod_spec(spec: JSON) -> None:
    for name in ("containers", "initContainers", "ephemeralContainers"):
        for container in spec.get(name) or ():
            _container(container)
    for volume in spec.get("volumes") or ():
        if set(volume) == {"name"}:
            volume["emptyDir"] = {}
        for source in (volume.get("projected") or {}).get("sources") or ():
            token = source.get("serviceAccountToken")
            if token is not None:
                token.setdefault("expirationSeconds", 3600)
    account = spec.get("serviceAccountName") or spec.get("serviceAccount")
    if account:
        spec["serviceAccountName"] = spec["serviceAccount"] = account


def _container(container: JSON) -> None:
    image = container.get("image") or ""
    if image and "imagePullPolicy" not in container:
        last = image.rpartition("/")[2]
        untagged = "@" not in image and (":" not in last or last.endswith(":latest"))
        container["imagePullPolicy"] = "Always" if untagged else "IfNotPresent"
    resources = container.get("resources") or {}
    if resources.get("limits"):
        requests = resources.setdefault("requests", {})
        for name, amount in resources["limits"].items():
            requests.setdefault(name, amount)
    for port in container.get("ports") or ():
        port.setdefault("protocol", "TCP")


def _pod(obj: JSON) -> None:
    spec = obj.get("spec")
    if spec is None:
        return
    default_pod_spec(spec)
    if spec.get("hostNetwork"):
        for container in spec.get("containers") or ():
            for port in container.get("ports") or ():
                port.setdefault("hostPort", port.get("containerPort"))


def _template(obj: JSON) -> None:
    template = (obj.get("spec") or {}).get("template") or {}
    if template.get("spec") is not None:
        default_pod_spec(template["spec"])


def _workload(obj: JSON) -> None:
    _template(obj)
    spec = obj.get("spec") or {}
    labels = ((spec.get("template") or {}).get("metadata") or {}).get("labels")
    if obj["kind"] == "ReplicaSet" and labels and not spec.get("selector"):
        spec["selector"] = {"matchLabels": dict(labels)}


def _stateful_set(obj: JSON) -> None:
    _template(obj)
    spec = obj.get("spec") or {}
    strategy = spec.get("updateStrategy") or {}
    if strategy.get("type") == "RollingUpdate":
        strategy.setdefault("rollingUpdate", {}).setdefault("partition", 0)
    for claim in spec.get("volumeClaimTemplates") or ():
        claim.setdefault("kind", "PersistentVolumeClaim")
        claim.setdefault("apiVersion", "v1")
        claim.setdefault("status", {"phase": "Pending"})


def _deployment(obj: JSON) -> None:
    _template(obj)
    strategy = (obj.get("spec") or {}).get("strategy") or {}
    if strategy.get("type") == "RollingUpdate":
        rolling = strategy.setdefault("rollingUpdate", {})
        rolling.setdefault("maxUnavailable", "25%")
        rolling.setdefault("maxSurge", "25%")


def _service(obj: JSON) -> None:
    spec = obj.setdefault("spec", {})
    for port in spec.get("ports") or ():
        port.setdefault("protocol", "TCP")
        if port.get("targetPort") in (None, "", 0) and "port" in port:
            port["targetPort"] = port["port"]
    if spec.get("type") != "ExternalName":
        spec.setdefault("internalTrafficPolicy", "Cluster")
    if spec.get("type") in ("NodePort", "LoadBalancer"):
        spec.setdefault("externalTrafficPolicy", "Cluster")


def _secret(obj: JSON) -> None:
    """stringData is write-only: it ends up encoded in data."""
    plain = obj.pop("stringData", None)
    if plain:
        encoded = {name: base64.b64encode(text.encode()).decode() for name, text in plain.items()}
        obj["data"] = {**obj.get("data", {}), **encoded}


def _persistent_volume_claim(obj: JSON) -> None:
    obj.setdefault("status", {}).setdefault("phase", "Pending")


def _persistent_volume(obj: JSON) -> None:
    obj.setdefault("status", {}).setdefault("phase", "Pending")


def _namespace(obj: JSON) -> None:
    obj.setdefault("status", {}).setdefault("phase", "Active")
    obj.setdefault("metadata", {}).setdefault("labels", {})["kubernetes.io/metadata.name"] = obj["metadata"].get("name")


def _crd(obj: JSON) -> None:
    names = (obj.get("spec") or {}).get("names") or {}
    if names.get("kind"):
        names.setdefault("singular", names["kind"].lower())
        names.setdefault("listKind", names["kind"] + "List")


_BY_KIND: dict[str, Callable[[JSON], None]] = {
    "Pod": _pod,
    "StatefulSet": _stateful_set,
    "Deployment": _deployment,
    "ReplicaSet": _workload,
    "Service": _service,
    "Secret": _secret,
    "PersistentVolumeClaim": _persistent_volume_claim,
    "PersistentVolume": _persistent_volume,
    "Namespace": _namespace,
    "CustomResourceDefinition": _crd,
}
