"""A small asynchronous Kubernetes client: the only code of ours that speaks HTTP to an API server.

Front door: :func:`load_config`, :class:`Client` (verbs), :class:`Cache` (list + watch, indexed),
:class:`EventRecorder`, :class:`LeaderElector`. Objects are plain dicts as on the wire. It knows nothing of what the
objects mean, of controllers, or of the embedded cluster: it works against any API server.
"""

from baton.cluster_client.cache import Cache
from baton.cluster_client.client import Client, ObjectList, WatchEvent
from baton.cluster_client.config import ClusterConfig, load_config
from baton.cluster_client.errors import (
    AlreadyExists,
    ApiError,
    ClientError,
    ConfigError,
    Conflict,
    Gone,
    Invalid,
    NotFound,
    Unreachable,
)
from baton.cluster_client.events import EventRecorder
from baton.cluster_client.lease import LeaderElector, LeadershipLost, LeaseTiming
from baton.cluster_client.resources import Object, Resource, key_of, resource_of
from baton.cluster_client.watch import Change, follow

__all__ = [
    "AlreadyExists",
    "ApiError",
    "Cache",
    "Change",
    "Client",
    "ClientError",
    "ClusterConfig",
    "ConfigError",
    "Conflict",
    "EventRecorder",
    "Gone",
    "Invalid",
    "LeaderElector",
    "LeadershipLost",
    "LeaseTiming",
    "NotFound",
    "Object",
    "ObjectList",
    "Resource",
    "Unreachable",
    "WatchEvent",
    "follow",
    "key_of",
    "load_config",
    "resource_of",
]
