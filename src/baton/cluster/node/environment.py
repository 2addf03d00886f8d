"""The environment of a container as its manifest defines it: env, envFrom, references, `$(VAR)` expansion.

Pure: objects come through `Lookup`, nothing is read from this machine. What the image and the machine add is `plan`'s.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.cluster.node import quantity

Object = dict[str, Any]
_REFERENCE = re.compile(r"\$(\$|\(([^()]*)\))")
_SUBSCRIPT = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")
HOST_IP = "127.0.0.1"


class ContainerConfigError(Exception):
    """The container cannot be configured; the message is shown as Kubernetes would (CreateContainerConfigError)."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """Where objects of the pod's namespace come from; each answers None for an object that does not exist."""

    config_map: Callable[[str], Object | None]
    secret: Callable[[str], Object | None]
    allocatable: Mapping[str, str]
    """Of the pod's node: what a missing limit means."""


def expand(text: str, values: Mapping[str, str]) -> str:
    """Kubernetes' expansion: `$(NAME)` for a known name, `$$` for a dollar sign, everything else as it stands."""

    def replace(match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        return values.get(match[2], match[0])

    return _REFERENCE.sub(replace, text)


def build(pod: Object, container: Object, pod_ip: str, lookup: Lookup, services: Mapping[str, str]) -> dict[str, str]:
    """All variables of one container, in Kubernetes' order of precedence (services, envFrom, env). Raises `ContainerConfigError`."""
    result = dict(services) if pod["spec"].get("enableServiceLinks", True) else {}
    for source in container.get("envFrom") or []:
        result.update(_from(source, lookup))
    for entry in container.get("env") or []:
        name = entry["name"]
        if entry.get("valueFrom") is None:
            result[name] = expand(str(entry.get("value") or ""), result)
            continue
        value = _value(pod, container, pod_ip, name, entry["valueFrom"], lookup)
        if value is not None:
            result[name] = value
    return result


def service_variables(services: Sequence[Object]) -> dict[str, str]:
    """NAME_SERVICE_HOST and NAME_SERVICE_PORT[_PORTNAME] of the Services with an address."""
    result = {}
    for service in services:
        address = service["spec"].get("clusterIP")
        ports = service["spec"].get("ports") or []
        if not address or address == "None" or not ports:
            continue
        name = service["metadata"]["name"].upper().replace("-", "_")
        result[f"{name}_SERVICE_HOST"] = address
        result[f"{name}_SERVICE_PORT"] = str(ports[0]["port"])
        for port in ports:
            if port.get("name"):
                result[f"{name}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = str(port["port"])
    return result


def field_value(pod: Object, path: str, pod_ip: str) -> str:
    """A downward-API field. Raises `ContainerConfigError` for one that does not exist."""
    meta, spec = pod["metadata"], pod["spec"]
    match = _SUBSCRIPT.fullmatch(path)
    if match is not None:
        return str((meta.get(match[1]) or {}).get(match[2], ""))
    fields: dict[str, Any] = {
        "metadata.name": meta["name"], "metadata.namespace": meta.get("namespace"), "metadata.uid": meta.get("uid"),
        "spec.nodeName": spec.get("nodeName"), "spec.serviceAccountName": spec.get("serviceAccountName") or "default",
        "status.podIP": pod_ip, "status.podIPs": pod_ip, "status.hostIP": HOST_IP, "status.hostIPs": HOST_IP,
    }  # fmt: skip
    if path in ("metadata.labels", "metadata.annotations"):
        values = meta.get(path.partition(".")[2]) or {}
        return "\n".join(f'{key}="{value}"' for key, value in sorted(values.items()))
    if path not in fields:
        raise ContainerConfigError(f"fieldRef {path!r} is not a field of a pod that can be referenced")
    return str(fields[path] or "")


def resource_value(container: Object, reference: Object, allocatable: Mapping[str, str]) -> str:
    """`resourceFieldRef`: the limit (or what the node has) or the request, divided and rounded up."""
    where, _, resource = str(reference["resource"]).partition(".")
    resources = container.get("resources") or {}
    value = (resources.get(where) or {}).get(resource)
    if value is None and where == "requests":
        value = (resources.get("limits") or {}).get(resource, "0")
    try:
        return quantity.divided(
            value if value is not None else allocatable.get(resource, "0"), reference.get("divisor") or "1"
        )
    except ValueError as error:
        raise ContainerConfigError(f"resourceFieldRef {reference['resource']!r}: {error}") from error


def decoded(secret: Object) -> dict[str, bytes]:
    """A Secret's data as bytes."""
    try:
        return {key: base64.b64decode(value, validate=True) for key, value in (secret.get("data") or {}).items()}
    except (binascii.Error, ValueError) as error:
        raise ContainerConfigError(f'secret "{secret["metadata"]["name"]}": data is not base64: {error}') from error


def config_data(config_map: Object) -> dict[str, bytes]:
    """A ConfigMap's data and binaryData as bytes."""
    result = {key: str(value).encode() for key, value in (config_map.get("data") or {}).items()}
    for key, value in (config_map.get("binaryData") or {}).items():
        result[key] = base64.b64decode(value)
    return result


def _from(source: Object, lookup: Lookup) -> dict[str, str]:
    prefix = source.get("prefix") or ""
    if source.get("configMapRef"):
        content = _content("configmap", source["configMapRef"], lookup)
    elif source.get("secretRef"):
        content = _content("secret", source["secretRef"], lookup)
    else:
        return {}
    return {prefix + key: value.decode(errors="replace") for key, value in (content or {}).items()}


def _content(kind: str, reference: Object, lookup: Lookup) -> dict[str, bytes] | None:
    """The data of the referenced object; None for a missing optional one."""
    name = str(reference.get("name") or "")
    found = lookup.config_map(name) if kind == "configmap" else lookup.secret(name)
    if found is None:
        if reference.get("optional"):
            return None
        raise ContainerConfigError(f'{kind} "{name}" not found')
    return config_data(found) if kind == "configmap" else decoded(found)


def _value(pod: Object, container: Object, pod_ip: str, name: str, source: Object, lookup: Lookup) -> str | None:
    if source.get("fieldRef"):
        return field_value(pod, str(source["fieldRef"].get("fieldPath") or ""), pod_ip)
    if source.get("resourceFieldRef"):
        return resource_value(container, source["resourceFieldRef"], lookup.allocatable)
    for key, kind in (("configMapKeyRef", "configmap"), ("secretKeyRef", "secret")):
        reference = source.get(key)
        if reference:
            content = _content(kind, reference, lookup)
            if content is None or reference.get("key") not in content:
                if reference.get("optional") or content is None:
                    return None
                raise ContainerConfigError(
                    f"couldn't find key {reference.get('key')} in {kind} {pod['metadata'].get('namespace')}/{reference.get('name')}"
                )
            return content[reference["key"]].decode(errors="replace")
    raise ContainerConfigError(
        f"env {name}: valueFrom names no known source (of {', '.join(sorted(source)) or 'none'})"
    )
