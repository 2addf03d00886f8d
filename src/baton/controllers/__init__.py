"""Controllers: pure reconcilers, and one runner that feeds them.

A reconciler is ``reconcile(observed, now) -> Plan`` (see `plan`); it imports `baton.api` only. `rbg` is ours and runs
anywhere; `workloads`, `network`, `volumes` and `placement` are the parts of Kubernetes that the embedded cluster needs
and every real one has. `runner` talks to an API server through `baton.cluster_client` and is the only part that does I/O.
"""
