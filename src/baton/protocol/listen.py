"""Which address a server binds when it is told "all addresses".

Pods of the embedded cluster share one machine's network and have a loopback address each; several of them listen on the
same port. The node agent names the pod's address in BATON_POD_IP, and a wildcard then means that address. Elsewhere the
variable is not set and nothing changes.
"""

import os

POD_IP_VARIABLE = "BATON_POD_IP"
_WILDCARDS = ("0.0.0.0", "::", "")


def listen_host(host: str) -> str:
    """The host to bind for the one that was asked for."""
    return os.environ.get(POD_IP_VARIABLE) or host if host in _WILDCARDS else host
