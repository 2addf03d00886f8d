"""Loaded by every Python program of a pod (this directory is first on its PYTHONPATH). Standard library only.

Pods of one machine share its network, so a program that listens on "all addresses" would take the port from all pods:
here all addresses means the pod's own (BATON_POD_IP). In plain isolation, where /etc/hosts cannot be replaced, names of
the cluster are looked up in the slot's hosts file (BATON_HOSTS_FILE) first. Event loops go around these functions (uvloop does
all of it in C), so theirs are wrapped too when a program imports them. Not reached: programs started with `python -I`/-E, and C libraries that bind or
resolve by themselves (ZeroMQ, gRPC); these must be given the pod's address.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_WILDCARDS = ("0.0.0.0", "::", "")
_POD_IP = os.environ.get("BATON_POD_IP", "")
_HOSTS_FILE = os.environ.get("BATON_HOSTS_FILE", "")
_getaddrinfo = socket.getaddrinfo
_table: dict[str, list[str]] = {}
_table_version: tuple[int, int] | None = None


def _addresses(host: str) -> list[str]:
    """The cluster's addresses of a name, [] for a name that is not the cluster's."""
    global _table, _table_version
    if not _HOSTS_FILE:
        return []
    try:
        found = os.stat(_HOSTS_FILE)
        version = (found.st_mtime_ns, found.st_size)
        if version != _table_version:
            with open(_HOSTS_FILE, encoding="utf-8") as file:
                _table = _parse(file.read())
            _table_version = version
    except OSError:
        return []
    return _table.get(host.rstrip(".").lower(), [])


def _parse(text: str) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        for name in words[1:]:
            table.setdefault(name.lower(), []).append(words[0])
    return table


def _text(host: object) -> object:
    return host.decode() if isinstance(host, bytes) else host


def _resolved(host: Any, flags: int = 0) -> list[Any]:
    """What to look up instead of `host`: the pod's address for "all", the cluster's for its names, else `host` itself."""
    name = _text(host)
    if _POD_IP and (name in _WILDCARDS or (name is None and flags & socket.AI_PASSIVE)):
        return [_POD_IP]
    if isinstance(name, str) and name:
        return list(_addresses(name)) or [host]
    return [host]


def getaddrinfo(
    host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
) -> list[tuple[Any, Any, int, str, Any]]:
    targets = _resolved(host, flags)
    if targets == [host]:
        return _getaddrinfo(host, port, family, type, proto, flags)
    if family == socket.AF_INET6:  # the pod has IPv4 only: a dual-stack socket takes the mapped form
        targets = [f"::ffff:{one}" for one in targets]
    found: list[tuple[Any, Any, int, str, Any]] = []
    for target in targets:
        found += _getaddrinfo(target, port, family, type, proto, flags)
    return found


def _gethostbyname(host: str) -> str:
    return str(_resolved(host)[0]) if _resolved(host) != [host] else _original["gethostbyname"](host)


def _gethostbyname_ex(host: str) -> tuple[str, list[str], list[str]]:
    targets = _resolved(host)
    return _original["gethostbyname_ex"](host) if targets == [host] else (host, [], [str(one) for one in targets])


def _gethostname() -> str:
    return os.environ.get("HOSTNAME") or _original["gethostname"]()


_original: dict[str, Any] = {
    name: getattr(socket, name) for name in ("gethostbyname", "gethostbyname_ex", "gethostname")
}


class _Socket(socket.socket):
    """A socket for which "all addresses" is the pod's, and which knows the cluster's names."""

    def bind(self, address: Any, /) -> None:
        super().bind(_bind_address(self, address))

    def connect(self, address: Any, /) -> None:
        super().connect(_named(self, address))

    def connect_ex(self, address: Any, /) -> int:
        return super().connect_ex(_named(self, address))


def _bind_address(sock: socket.socket, address: Any) -> Any:
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or not isinstance(address, tuple):
        return address
    host = _text(address[0])
    if host not in _WILDCARDS:
        return _named(sock, address)
    if not _POD_IP:
        return address
    if sock.family == socket.AF_INET:
        return (_POD_IP, *address[1:])
    if sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return address
    return (f"::ffff:{_POD_IP}", *address[1:])


def _named(sock: socket.socket, address: Any) -> Any:
    if sock.family != socket.AF_INET or not isinstance(address, tuple) or not isinstance(_text(address[0]), str):
        return address
    found = _addresses(str(_text(address[0])))
    return (found[0], *address[1:]) if found else address


def _target(host: Any, flags: int = 0) -> Any:
    return _resolved(host, flags)[0] if isinstance(host, str | bytes) else host


def _patch_servers(loop: Any) -> None:
    """Event loops parse address texts themselves and bind them one by one: what to bind is said before."""
    original = loop.create_server

    async def create_server(self: Any, factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        if host is None and port is not None and _POD_IP:
            host = _POD_IP
        elif isinstance(host, list | tuple):
            host = list(dict.fromkeys(_target(one) for one in host))
        else:
            host = _target(host)
        return await original(self, factory, host, port, **options)

    loop.create_server = create_server


def _patch_asyncio(module: ModuleType) -> None:
    _patch_servers(module.BaseEventLoop)


def _patch_uvloop(module: ModuleType) -> None:
    loop: Any = module.Loop
    _patch_servers(loop)
    connect, getaddrinfo = loop.create_connection, loop.getaddrinfo

    async def create_connection(self: Any, factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        if options.get("ssl") and host and not options.get("server_hostname"):
            options["server_hostname"] = host
        return await connect(self, factory, _target(host), port, **options)

    async def lookup(self: Any, host: Any, port: Any, **options: Any) -> Any:
        targets = _resolved(host, int(options.get("flags", 0)))
        if targets == [host]:
            return await getaddrinfo(self, host, port, **options)
        return [one for each in targets for one in await getaddrinfo(self, each, port, **options)]

    loop.create_connection, loop.getaddrinfo = create_connection, lookup


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Runs a patch once, right after one module was imported."""

    def __init__(self, name: str, patch: Callable[[ModuleType], None]) -> None:
        self._name, self._patch = name, patch
        self._inner: Any = None

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self._inner, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._patch(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _install() -> None:
    socket.getaddrinfo = getaddrinfo
    socket.socket = _Socket  # type: ignore[misc]
    if _HOSTS_FILE:
        socket.gethostbyname, socket.gethostbyname_ex = _gethostbyname, _gethostbyname_ex
        socket.gethostname = _gethostname
    sys.meta_path[:0] = [_AfterImport("asyncio.base_events", _patch_asyncio), _AfterImport("uvloop", _patch_uvloop)]


def _run_the_next() -> None:
    """The sitecustomize that would have been loaded without this directory, if there is one."""
    own = os.path.dirname(os.path.abspath(__file__))
    rest = [entry for entry in sys.path if os.path.abspath(entry or ".") != own]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


if _POD_IP or _HOSTS_FILE:
    _install()
_run_the_next()
