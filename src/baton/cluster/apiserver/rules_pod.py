"""Rules for pods and pod templates: what the API server refuses, in Kubernetes' words.

Owns `pod_spec_causes` and `pod_update_causes`. Not here: types and required fields (see `conform`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from baton.cluster.apiserver.errors import Cause
from baton.cluster.apiserver.names import check_label, check_qualified, check_subdomain

JSON = dict[str, Any]
_PROTOCOLS = ("SCTP", "TCP", "UDP")
_HANDLERS = ("exec", "httpGet", "tcpSocket", "grpc")
_UPDATE_TEXT = (
    "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"
    "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
    "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
)


def pod_spec_causes(spec: JSON, path: str, *, template_of: str = "", claims: Collection[str] = ()) -> list[Cause]:
    """`path` is where the pod spec is; `template_of` names the workload kind when it is a template, and `claims` are
    the volumes that this workload adds to its pods."""
    out: list[Cause] = []
    volumes = _volumes(spec.get("volumes") or [], f"{path}.volumes", out) | set(claims)
    if not spec.get("containers") and "containers" in spec:
        out.append(Cause.required(f"{path}.containers"))
    names: set[str] = set()
    for field in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(field) or []):
            _container(container, f"{path}.{field}[{index}]", names, volumes, field, out)
    allowed: tuple[str, ...] = ("Always",) if template_of else ("Always", "OnFailure", "Never")
    if spec.get("restartPolicy") not in (*allowed, None):
        out.append(Cause.not_supported(f"{path}.restartPolicy", spec["restartPolicy"], allowed))
    if spec.get("dnsPolicy") not in ("ClusterFirstWithHostNet", "ClusterFirst", "Default", "None", None):
        allowed = ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None")
        out.append(Cause.not_supported(f"{path}.dnsPolicy", spec["dnsPolicy"], allowed))
    if (spec.get("terminationGracePeriodSeconds") or 0) < 0:
        value = spec["terminationGracePeriodSeconds"]
        text = "must be greater than or equal to 0"
        out.append(Cause.invalid(f"{path}.terminationGracePeriodSeconds", value, text))
    for field in ("hostname", "subdomain"):
        if spec.get(field):
            out += [Cause.invalid(f"{path}.{field}", spec[field], text) for text in check_label(spec[field])]
    return out


def _volumes(volumes: list[JSON], path: str, out: list[Cause]) -> set[str]:
    seen: set[str] = set()
    for index, volume in enumerate(volumes):
        name, here = volume.get("name") or "", f"{path}[{index}]"
        if not name:
            continue  # reported as a missing field already
        out += [Cause.invalid(f"{here}.name", name, text) for text in check_label(name)]
        if name in seen:
            out.append(Cause.duplicate(f"{here}.name", name))
        seen.add(name)
        sources = [k for k in volume if k != "name"]
        for extra in sources[1:]:
            out.append(Cause.forbidden(f"{here}.{extra}", "may not specify more than 1 volume type"))
        out += _volume_source(volume, here)
    return seen


def _volume_source(volume: JSON, path: str) -> list[Cause]:
    out: list[Cause] = []
    for field, key in (("configMap", "name"), ("secret", "secretName")):
        source = volume.get(field)
        if source is not None and not source.get(key):
            out.append(Cause.required(f"{path}.{field}.{key}"))
    return out


def _container(container: JSON, path: str, names: set[str], volumes: set[str], field: str, out: list[Cause]) -> None:
    name = container.get("name") or ""
    if name:
        out += [Cause.invalid(f"{path}.name", name, text) for text in check_label(name)]
        if name in names:
            out.append(Cause.duplicate(f"{path}.name", name))
        names.add(name)
    if not container.get("image"):
        out.append(Cause.required(f"{path}.image"))
    if container.get("imagePullPolicy") not in ("Always", "IfNotPresent", "Never", None):
        allowed = ("Always", "IfNotPresent", "Never")
        out.append(Cause.not_supported(f"{path}.imagePullPolicy", container["imagePullPolicy"], allowed))
    _env(container.get("env") or [], f"{path}.env", out)
    _ports(container.get("ports") or [], f"{path}.ports", out)
    _mounts(container.get("volumeMounts") or [], f"{path}.volumeMounts", volumes, out)
    _requests(container.get("resources") or {}, f"{path}.resources", out)
    sidecar = field == "initContainers" and container.get("restartPolicy") == "Always"
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        if container.get(probe) is None:
            continue
        if field == "initContainers" and not sidecar:
            out.append(
                Cause.forbidden(f"{path}.{probe}", "may not be set for init containers without restartPolicy=Always")
            )
        _probe(container[probe], f"{path}.{probe}", probe, out)


def _env(env: list[JSON], path: str, out: list[Cause]) -> None:
    for index, entry in enumerate(env):
        name = entry.get("name") or ""
        if "=" in name:
            out.append(
                Cause.invalid(f"{path}[{index}].name", name, "a valid environment variable name must not contain '='")
            )
        source = entry.get("valueFrom")
        if source is None:
            continue
        if entry.get("value"):
            text = "may not be specified when `value` is not empty"
            out.append(Cause.invalid(f"{path}[{index}].valueFrom", "", text))
        if len(source) != 1:
            text = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or `secretKeyRef`"
            wrong = Cause.invalid(
                f"{path}[{index}].valueFrom",
                "",
                text if not source else "may not have more than one field specified at a time",
            )
            out.append(wrong)


def _ports(ports: list[JSON], path: str, out: list[Cause]) -> None:
    names: set[str] = set()
    for index, port in enumerate(ports):
        here = f"{path}[{index}]"
        number = port.get("containerPort")
        if not number:
            out.append(Cause.required(f"{here}.containerPort"))
        elif not 0 < number < 65536:
            out.append(Cause.invalid(f"{here}.containerPort", number, "must be between 1 and 65535, inclusive"))
        if port.get("protocol") not in _PROTOCOLS:
            out.append(Cause.not_supported(f"{here}.protocol", port.get("protocol"), _PROTOCOLS))
        name = port.get("name")
        if name:
            if len(name) > 15:
                out.append(Cause.invalid(f"{here}.name", name, "must be no more than 15 characters"))
            if name in names:
                out.append(Cause.duplicate(f"{here}.name", name))
            names.add(name)


def _mounts(mounts: list[JSON], path: str, volumes: set[str], out: list[Cause]) -> None:
    paths: set[str] = set()
    for index, mount in enumerate(mounts):
        here, name, at = f"{path}[{index}]", mount.get("name"), mount.get("mountPath")
        if name and name not in volumes:
            out.append(Cause.not_found(f"{here}.name", name))
        if at and at in paths:
            out.append(Cause.invalid(f"{here}.mountPath", at, "must be unique"))
        paths.add(at or "")
        sub = mount.get("subPath") or ""
        if sub.startswith("/"):
            out.append(Cause.invalid(f"{here}.subPath", sub, "must be a relative path"))
        if ".." in sub.split("/"):
            out.append(Cause.invalid(f"{here}.subPath", sub, "must not contain '..'"))


def _requests(resources: JSON, path: str, out: list[Cause]) -> None:
    limits = resources.get("limits") or {}
    for name, amount in (resources.get("requests") or {}).items():
        if name not in ("cpu", "memory", "ephemeral-storage") and "/" not in name and not name.startswith("hugepages-"):
            text = "must be a standard resource type or fully qualified"
            out.append(Cause.invalid(f"{path}.requests", name, text))
        out += [Cause.invalid(f"{path}.requests", name, text) for text in check_qualified(name)]
        if name in limits and quantity(amount) > quantity(limits[name]):
            text = f"must be less than or equal to {name} limit of {limits[name]}"
            out.append(Cause.invalid(f"{path}.requests", amount, text))


def _probe(probe: JSON, path: str, which: str, out: list[Cause]) -> None:
    handlers = [h for h in _HANDLERS if probe.get(h) is not None]
    if not handlers:
        out.append(Cause.required(path, "must specify a handler type"))
    for extra in handlers[1:]:
        out.append(Cause.forbidden(f"{path}.{extra}", "may not specify more than 1 handler type"))
    for field in ("initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"):
        if (probe.get(field) or 0) < 0:
            out.append(Cause.invalid(f"{path}.{field}", probe[field], "must be greater than or equal to 0"))
    if which != "readinessProbe" and probe.get("successThreshold", 1) != 1:
        out.append(Cause.invalid(f"{path}.successThreshold", probe["successThreshold"], "must be 1"))


_SUFFIX = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}


def quantity(text: object) -> float:
    """The number a quantity stands for; 0 for what is no quantity (reported elsewhere)."""
    value = str(text)
    try:
        if value[-2:] in _BINARY:
            return float(value[:-2]) * _BINARY[value[-2:]]
        if value[-1:] in _SUFFIX and not value[-1:].isdigit():
            return float(value[:-1]) * _SUFFIX[value[-1:]]
        return float(value)
    except ValueError:
        return 0.0


def pod_causes(obj: JSON) -> list[Cause]:
    spec = obj.get("spec")
    if not spec:
        return [Cause.required("spec.containers")]
    return pod_spec_causes(spec, "spec")


def pod_update_causes(new: JSON, old: JSON) -> list[Cause]:
    """Only images, the deadline and new tolerations of a running pod may change."""
    if _frozen(new.get("spec") or {}, old.get("spec") or {}) != _frozen(old.get("spec") or {}, old.get("spec") or {}):
        return [Cause.forbidden("spec", _UPDATE_TEXT)]
    return []


def _frozen(spec: JSON, old: JSON) -> JSON:
    out = {k: v for k, v in spec.items() if k not in ("activeDeadlineSeconds", "tolerations", "schedulingGates")}
    for field in ("containers", "initContainers"):
        if field in out:
            out[field] = [{k: v for k, v in c.items() if k != "image"} for c in out[field]]
    out.pop("ephemeralContainers", None)
    if not old.get("nodeName"):
        out.pop("nodeName", None)
    return out


def node_name_causes(name: str) -> list[Cause]:
    return [Cause.invalid("spec.nodeName", name, text) for text in check_subdomain(name)]
