"""What a write is about and how it was asked for.

Owns `Target` and `WriteOptions`, which handlers make from the URL and `Operations` reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.cluster.apiserver.errors import StatusError, not_found
from baton.cluster.apiserver.resources import Resource, Version
from baton.cluster.apiserver.store import Key


@dataclass(slots=True)
class WriteOptions:
    """The query of a write. `warnings` is filled on the way and sent as Warning headers."""

    manager: str = "unknown"
    dry_run: bool = False
    validation: str = "Warn"  # Strict, Warn or Ignore: what to do about unknown fields
    force: bool = False
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Target:
    """What a request is about. `subresource` is "" or "status" for writes."""

    resource: Resource
    version: Version
    namespace: str
    name: str = ""
    subresource: str = ""

    @property
    def key(self) -> Key:
        return Key(self.resource.store_name, self.namespace, self.name)

    def missing(self) -> StatusError:
        return not_found(self.resource.plural, self.resource.group, self.name)
