"""What a program has to know when it runs in a pod of the embedded cluster. Elsewhere nothing here has an effect.

Pods share one machine's network and have a loopback address each; several of them listen on the same port. The node
agent names the pod's address in BATON_POD_IP, and "all addresses" then means that one. Without namespaces volumes lie
elsewhere than their manifest says: BATON_VOLUME_PATHS (`HERE=MANIFEST` pairs joined by `:`) gives the way back, for names
that users see.
"""

import os

POD_IP_VARIABLE = "BATON_POD_IP"
VOLUME_PATHS_VARIABLE = "BATON_VOLUME_PATHS"
_WILDCARDS = ("0.0.0.0", "::", "")


def listen_host(host: str) -> str:
    """The host to bind for the one that was asked for."""
    return os.environ.get(POD_IP_VARIABLE) or host if host in _WILDCARDS else host


def manifest_path(path: str) -> str:
    """The path as the manifest has it, for one that a volume's place was written into; any other path as it is."""
    for pair in os.environ.get(VOLUME_PATHS_VARIABLE, "").split(":"):
        here, _, manifest = pair.partition("=")
        if here and (path == here or path.startswith(here + "/")):
            return manifest + path[len(here) :]
    return path
