"""Rules between the fields of built-in kinds: on create and on update.

Owns `create_causes` and `update_causes`, dispatched by kind. Pods are in `rules_pod`; CRDs in `crd`. Not here: types
and required fields (see `conform`), metadata (see `metadata`).
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
from collections.abc import Callable
from typing import Any

from baton.cluster.apiserver import rules_pod
from baton.cluster.apiserver.errors import Cause
from baton.cluster.apiserver.names import check_label, check_label_1035, check_labels, check_qualified, check_subdomain
from baton.cluster.apiserver.selectors import LabelSelector, SelectorError

JSON = dict[str, Any]
_STS_MUTABLE = (
    "replicas",
    "ordinals",
    "template",
    "updateStrategy",
    "revisionHistoryLimit",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
)


def create_causes(kind: str, obj: JSON) -> list[Cause]:
    """What is wrong with a complete (defaulted) object."""
    check = _CREATE.get(kind)
    return check(obj) if check else []


def update_causes(kind: str, new: JSON, old: JSON) -> list[Cause]:
    """What may not change from `old` to `new` (rules of create are checked as well, by the caller)."""
    check = _UPDATE.get(kind)
    return check(new, old) if check else []


def name_causes(kind: str, name: str) -> list[Cause]:
    check = {"Service": check_label_1035, "Namespace": check_label}.get(kind, check_subdomain)
    return [Cause.invalid("metadata.name", name, text) for text in check(name)]


def _workload(obj: JSON) -> list[Cause]:
    spec = obj.get("spec") or {}
    out: list[Cause] = []
    if (spec.get("replicas") or 0) < 0:
        out.append(Cause.invalid("spec.replicas", spec["replicas"], "must be greater than or equal to 0"))
    template = spec.get("template") or {}
    labels = (template.get("metadata") or {}).get("labels") or {}
    out += check_labels(labels, "spec.template.metadata.labels")
    out += _selector_matches(spec.get("selector"), labels)
    if template.get("spec") is not None:
        claims = [(claim.get("metadata") or {}).get("name") or "" for claim in spec.get("volumeClaimTemplates") or []]
        out += rules_pod.pod_spec_causes(template["spec"], "spec.template.spec", template_of=obj["kind"], claims=claims)
    elif template:
        out.append(Cause.required("spec.template.spec.containers"))
    return out


def _selector_matches(selector: JSON | None, labels: JSON) -> list[Cause]:
    if selector is None:
        return []
    if not selector.get("matchLabels") and not selector.get("matchExpressions"):
        return [Cause.invalid("spec.selector", selector, "empty selector is invalid for deployment")]
    try:
        matched = LabelSelector.from_object(selector).matches(labels)
    except SelectorError as error:
        return [Cause.invalid("spec.selector", selector, str(error))]
    if matched:
        return []
    return [Cause.invalid("spec.template.metadata.labels", labels, "`selector` does not match template `labels`")]


def _stateful_set(obj: JSON) -> list[Cause]:
    out = _workload(obj)
    policy = (obj.get("spec") or {}).get("podManagementPolicy")
    if policy not in ("OrderedReady", "Parallel"):
        out.append(Cause.not_supported("spec.podManagementPolicy", policy, ("OrderedReady", "Parallel")))
    return out


def _stateful_set_update(new: JSON, old: JSON) -> list[Cause]:
    def fixed(obj: JSON) -> JSON:
        return {k: v for k, v in (obj.get("spec") or {}).items() if k not in _STS_MUTABLE}

    if fixed(new) == fixed(old):
        return []
    names = ", ".join(f"'{n}'" for n in _STS_MUTABLE[:-1]) + f" and '{_STS_MUTABLE[-1]}'"
    return [Cause.forbidden("spec", f"updates to statefulset spec for fields other than {names} are forbidden")]


def _selector_fixed(new: JSON, old: JSON) -> list[Cause]:
    return _immutable(new, old, ("spec", "selector"))


def _immutable(new: JSON, old: JSON, path: tuple[str, ...], *, when_set: bool = False) -> list[Cause]:
    a: Any = new
    b: Any = old
    for name in path:
        a, b = (a or {}).get(name), (b or {}).get(name)
    if a == b or (when_set and b in (None, "")):
        return []
    return [Cause.invalid(".".join(path), a, "field is immutable")]


def _service(obj: JSON) -> list[Cause]:
    spec = obj.get("spec") or {}
    out: list[Cause] = []
    kinds = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")
    if spec.get("type") not in kinds:
        out.append(Cause.not_supported("spec.type", spec.get("type"), kinds))
    headless = spec.get("clusterIP") == "None"
    ports = spec.get("ports") or []
    if not ports and not headless and spec.get("type") != "ExternalName":
        out.append(Cause.required("spec.ports"))
    if spec.get("type") == "ExternalName" and not spec.get("externalName"):
        out.append(Cause.required("spec.externalName"))
    address = spec.get("clusterIP")
    if address and address != "None" and not _is_address(address):
        out.append(
            Cause.invalid(
                "spec.clusterIPs[0]", address, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
            )
        )
    out += check_labels(spec.get("selector") or {}, "spec.selector")
    _service_ports(ports, out)
    return out


def _service_ports(ports: list[JSON], out: list[Cause]) -> None:
    seen: set[tuple[object, object]] = set()
    names: set[str] = set()
    for index, port in enumerate(ports):
        here, number = f"spec.ports[{index}]", port.get("port")
        if len(ports) > 1 and not port.get("name"):
            out.append(Cause.required(f"{here}.name"))
        if port.get("name"):
            if port["name"] in names:
                out.append(Cause.duplicate(f"{here}.name", port["name"]))
            names.add(port["name"])
            out += [Cause.invalid(f"{here}.name", port["name"], text) for text in check_label(port["name"])]
        if not isinstance(number, int) or not 0 < number < 65536:
            out.append(Cause.invalid(f"{here}.port", number or 0, "must be between 1 and 65535, inclusive"))
        target = port.get("targetPort")
        if isinstance(target, int) and not 0 < target < 65536:
            out.append(Cause.invalid(f"{here}.targetPort", target, "must be between 1 and 65535, inclusive"))
        if port.get("protocol") not in ("SCTP", "TCP", "UDP"):
            out.append(Cause.not_supported(f"{here}.protocol", port.get("protocol"), ("SCTP", "TCP", "UDP")))
        if (number, port.get("protocol")) in seen:
            out.append(Cause.duplicate(here, {"port": number, "protocol": port.get("protocol")}))
        seen.add((number, port.get("protocol")))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _service_update(new: JSON, old: JSON) -> list[Cause]:
    spec, before = new.get("spec") or {}, old.get("spec") or {}
    if "ExternalName" in (spec.get("type"), before.get("type")):
        return []
    if not before.get("clusterIP") or spec.get("clusterIP") == before.get("clusterIP"):
        return []
    out = [Cause.invalid("spec.clusterIPs[0]", spec.get("clusterIPs"), "may not change once set")]
    return out if before["clusterIP"] == "None" or spec.get("clusterIP") else []


def _config_map(obj: JSON) -> list[Cause]:
    out: list[Cause] = []
    for field in ("data", "binaryData"):
        for key in obj.get(field) or {}:
            if not key or not all(c.isalnum() or c in "-_." for c in key) or len(key) > 253:
                text = "a valid config key must consist of alphanumeric characters, '-', '_' or '.'"
                out.append(Cause.invalid(f"{field}[{key}]", key, text))
    size = sum(len(str(v)) for f in ("data", "binaryData") for v in (obj.get(f) or {}).values())
    if size > 1024 * 1024:
        out.append(Cause("", "FieldValueTooLong", "Too long: may not be more than 1048576 bytes"))
    return out


def _config_map_update(new: JSON, old: JSON) -> list[Cause]:
    if not old.get("immutable"):
        return []
    text = "field is immutable when `immutable` is set"
    return [Cause.forbidden(f, text) for f in ("immutable", "data", "binaryData") if new.get(f) != old.get(f)]


def _secret(obj: JSON) -> list[Cause]:
    out = _config_map(obj)
    for key, text in (obj.get("data") or {}).items():
        try:
            base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            out.append(Cause.invalid(f"data[{key}]", "<hidden>", "illegal base64 data"))
    return out


def _secret_update(new: JSON, old: JSON) -> list[Cause]:
    return _immutable(new, old, ("type",)) + _config_map_update(new, old)


_ACCESS = ("ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod")


def _volume_claim(obj: JSON) -> list[Cause]:
    spec = obj.get("spec") or {}
    out: list[Cause] = []
    if not spec.get("accessModes"):
        out.append(Cause.required("spec.accessModes", "at least 1 access mode is required"))
    for mode in spec.get("accessModes") or []:
        if mode not in _ACCESS:
            out.append(Cause.not_supported("spec.accessModes", mode, _ACCESS))
    if not ((spec.get("resources") or {}).get("requests") or {}).get("storage"):
        out.append(Cause.required("spec.resources[storage]"))
    return out


def _volume_claim_update(new: JSON, old: JSON) -> list[Cause]:
    def fixed(obj: JSON) -> JSON:
        out = {k: v for k, v in (obj.get("spec") or {}).items() if k not in ("resources", "volumeAttributesClassName")}
        if not (old.get("spec") or {}).get("volumeName"):
            out.pop("volumeName", None)
        return out

    if fixed(new) == fixed(old):
        return []
    text = "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims"
    return [Cause.forbidden("spec", text)]


def _volume(obj: JSON) -> list[Cause]:
    spec = obj.get("spec") or {}
    out: list[Cause] = []
    if not spec.get("accessModes"):
        out.append(Cause.required("spec.accessModes"))
    if not (spec.get("capacity") or {}).get("storage"):
        out.append(Cause.required("spec.capacity"))
    return out


def _lease(obj: JSON) -> list[Cause]:
    duration = (obj.get("spec") or {}).get("leaseDurationSeconds")
    if duration is not None and duration <= 0:
        return [Cause.invalid("spec.leaseDurationSeconds", duration, "must be greater than 0")]
    return []


def _endpoint_slice(obj: JSON) -> list[Cause]:
    kinds = ("FQDN", "IPv4", "IPv6")
    if obj.get("addressType") not in kinds:
        return [Cause.not_supported("addressType", obj.get("addressType"), kinds)]
    return []


def _node(obj: JSON) -> list[Cause]:
    out = []
    for index, taint in enumerate((obj.get("spec") or {}).get("taints") or []):
        out += [
            Cause.invalid(f"spec.taints[{index}].key", taint.get("key"), t)
            for t in check_qualified(taint.get("key") or "")
        ]
    return out


def _revision_update(new: JSON, old: JSON) -> list[Cause]:
    return _immutable(new, old, ("data",))


_CREATE: dict[str, Callable[[JSON], list[Cause]]] = {
    "Pod": rules_pod.pod_causes,
    "StatefulSet": _stateful_set,
    "Deployment": _workload,
    "ReplicaSet": _workload,
    "Service": _service,
    "ConfigMap": _config_map,
    "Secret": _secret,
    "PersistentVolumeClaim": _volume_claim,
    "PersistentVolume": _volume,
    "Lease": _lease,
    "EndpointSlice": _endpoint_slice,
    "Node": _node,
}
_UPDATE: dict[str, Callable[[JSON, JSON], list[Cause]]] = {
    "Pod": rules_pod.pod_update_causes,
    "StatefulSet": _stateful_set_update,
    "Deployment": _selector_fixed,
    "ReplicaSet": _selector_fixed,
    "Service": _service_update,
    "ConfigMap": _config_map_update,
    "Secret": _secret_update,
    "PersistentVolumeClaim": _volume_claim_update,
    "ControllerRevision": _revision_update,
    "StorageClass": lambda n, o: _immutable(n, o, ("provisioner",)) + _immutable(n, o, ("parameters",)),
    "EndpointSlice": lambda n, o: _immutable(n, o, ("addressType",)),
}
