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
    return _moved(path, _volume_paths())


def local_path(path: str) -> str:
    """The other way: where a path of the manifest lies in this pod."""
    return _moved(path, [(manifest, here) for here, manifest in _volume_paths()])


def _volume_paths() -> list[tuple[str, str]]:
    """(here, in the manifest)."""
    pairs = (pair.partition("=") for pair in os.environ.get(VOLUME_PATHS_VARIABLE, "").split(":"))
    return [(here, manifest) for here, _, manifest in pairs if here]


def _moved(path: str, moves: list[tuple[str, str]]) -> str:
    for start, end in sorted(moves, key=lambda move: -len(move[0])):  # a volume may lie inside another
        if path == start or path.startswith(start + "/"):
            return end + path[len(start) :]
    return path
