"""Names that people and manifests rely on, as pure functions of the group, the role and the ordinal.

Both eras: until v0.4 a role's headless Service was `{group}-{role}`, since v0.5 it is `s-{group}-{role}`.
"""

from __future__ import annotations

import hashlib
import re

_MAX_LABEL = 63
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")

DISCOVERY_VOLUME = "rbg-cluster-config"
DISCOVERY_MOUNT = "/etc/rbg"
DISCOVERY_KEY = "config.yaml"
NODE_STOPPED = "NodeStopped"
"""Reason of a pod's Ready condition after its node was stopped with all its pods: what its status says else is of before."""


def is_dns_label(text: str) -> bool:
    return len(text) <= _MAX_LABEL and _DNS_LABEL.fullmatch(text) is not None


def is_dns_subdomain(text: str) -> bool:
    return len(text) <= 253 and _DNS_SUBDOMAIN.fullmatch(text) is not None


def workload_name(group: str, role: str) -> str:
    """`{group}-{role}`, cut to 63 characters, no `-` at the end. Also the old-era Service of the role."""
    return f"{group}-{role}"[:_MAX_LABEL].rstrip("-")


def old_service_name(group: str, role: str) -> str:
    return workload_name(group, role)


def new_service_name(group: str, role: str) -> str:
    return f"s-{group}-{role}"[:_MAX_LABEL].rstrip("-")


def pod_name(group: str, role: str, ordinal: int) -> str:
    """`{group}-{role}-{ordinal}`; raises nothing, see `validation` for names that get too long."""
    return f"{workload_name(group, role)}-{ordinal}"


def ordinal_of(name: str, prefix: str) -> int | None:
    """The ordinal of a pod called `{prefix}-{ordinal}`, None for any other name."""
    head, _, tail = name.rpartition("-")
    return int(tail) if head == prefix and tail.isdigit() and str(int(tail)) == tail else None


def group_uid(namespace: str, group: str) -> str:
    """sha1 hex of `namespace/name`: the value of the group-uid label (not the object's metadata.uid)."""
    return hashlib.sha1(f"{namespace}/{group}".encode(), usedforsecurity=False).hexdigest()


def port_key(name: str | None, port: int) -> str:
    """The key of a service port in config.yaml: lower-case name with `_` for `-`, or `port<N>`."""
    return name.lower().replace("-", "_") if name else f"port{port}"
