"""The objects that exist before anybody creates one.

Owns the first namespaces, their default service accounts and the `kubernetes` Service. Not here: nodes (the node
agent registers them), CRDs (the daemon applies them).
"""

from __future__ import annotations

from baton.cluster.apiserver.operations import Operations
from baton.cluster.apiserver.resources import Registry
from baton.cluster.apiserver.store import Key
from baton.cluster.apiserver.target import Target, WriteOptions

NAMESPACES = ("default", "kube-node-lease", "kube-public", "kube-system")


async def create_first_objects(operations: Operations, registry: Registry) -> None:
    """Idempotent: creates only what is missing."""
    options = WriteOptions(manager="kube-apiserver")
    namespaces, accounts = registry.lookup("", "v1", "namespaces"), registry.lookup("", "v1", "serviceaccounts")
    assert namespaces and accounts
    for name in NAMESPACES:
        if operations.store.latest(Key("namespaces", "", name)) is None:
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            await operations.create(Target(*namespaces, ""), body, options)
    for name in NAMESPACES:
        if operations.store.latest(Key("serviceaccounts", name, "default")) is None:
            body = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
            await operations.create(Target(*accounts, name), body, options)
