"""The embedded Kubernetes API server: HTTP API, watches and SQLite storage.

Front door: `ApiServer` (an ASGI application over a `Store`), `serve` (listens), `kubeconfig` (how clients find it).
Knows pods only as objects: what runs them is reached through `baton.cluster.node_connector`. Not here: scheduling,
workload controllers, nodes.
"""

from baton.cluster.apiserver.app import ApiServer
from baton.cluster.apiserver.operations import Mutator, Validator
from baton.cluster.apiserver.resources import Conversion
from baton.cluster.apiserver.server import Serving, kubeconfig, serve
from baton.cluster.apiserver.store import Key, Store

__all__ = ["ApiServer", "Conversion", "Key", "Mutator", "Serving", "Store", "Validator", "kubeconfig", "serve"]
