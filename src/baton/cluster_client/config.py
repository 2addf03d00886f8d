"""Where the API server is and how to authenticate: kubeconfig files, or the pod's service account.

Own reader (a page of YAML) rather than a generated client library, whose import alone costs a second. Supported: CA
and client certificates by file or inline, token, tokenFile, basic auth, credential plug-ins (`exec`), `tls-server-name`,
`insecure-skip-tls-verify`. Not supported and refused by name: `auth-provider` (removed from Kubernetes), `proxy-url`.
"""

from __future__ import annotations

import base64
import os
import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from baton.cluster_client.credentials import BasicAuth, Credentials, ExecPlugin, NoAuth, StaticToken, TokenFile
from baton.cluster_client.errors import ConfigError

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """How to reach one API server. ``server`` has no trailing slash; ``ca_pem`` etc. are PEM bytes or None."""

    server: str
    credentials: Credentials = field(default_factory=NoAuth)
    ca_pem: bytes | None = None
    client_cert_pem: bytes | None = None
    client_key_pem: bytes | None = None
    verify_tls: bool = True
    tls_server_name: str | None = None
    namespace: str = "default"

    async def auth_headers(self) -> dict[str, str]:
        return await self.credentials.headers()

    def ssl_context(self) -> ssl.SSLContext | bool:
        """For aiohttp: a context for https, True (its default) for http."""
        if not self.server.startswith("https:"):
            return True
        context = ssl.create_default_context(cadata=self.ca_pem.decode() if self.ca_pem else None)
        if not self.verify_tls:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.client_cert_pem and self.client_key_pem:
            _load_client_pair(context, self.client_cert_pem, self.client_key_pem)
        return context


def load_config(kubeconfig: str | Path | None = None, context: str | None = None) -> ClusterConfig:
    """The usual order: the given file, $KUBECONFIG, the pod's service account, ~/.kube/config.

    Raises :class:`ConfigError` naming what was looked for when there is none.
    """
    if kubeconfig is not None:
        return load_kubeconfig([Path(kubeconfig)], context)
    if os.environ.get("KUBECONFIG"):
        paths = [Path(part) for part in os.environ["KUBECONFIG"].split(os.pathsep) if part]
        return load_kubeconfig(paths, context)
    if os.environ.get("KUBERNETES_SERVICE_HOST") and (_SERVICE_ACCOUNT / "token").exists():
        return in_cluster()
    home = Path.home() / ".kube" / "config"
    if home.exists():
        return load_kubeconfig([home], context)
    raise ConfigError(f"no cluster: give --kubeconfig, or set KUBECONFIG (looked for {home} and a service account)")


def in_cluster() -> ClusterConfig:
    """From the files and variables that every pod has."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    host = f"[{host}]" if ":" in host else host
    namespace = _SERVICE_ACCOUNT / "namespace"
    return ClusterConfig(
        server=f"https://{host}:{port}",
        credentials=TokenFile(_SERVICE_ACCOUNT / "token"),
        ca_pem=(_SERVICE_ACCOUNT / "ca.crt").read_bytes(),
        namespace=namespace.read_text().strip() if namespace.exists() else "default",
    )


def load_kubeconfig(paths: list[Path], context: str | None = None) -> ClusterConfig:
    """Read one or more kubeconfig files (first definition of a name wins, as kubectl does)."""
    merged = _Merged()
    existing = [path for path in paths if path.exists()]
    if not existing:
        raise ConfigError(f"kubeconfig {', '.join(map(str, paths))}: no such file")
    for path in existing:
        merged.add(path)
    name = context or merged.current_context
    if not name:
        raise ConfigError(f"kubeconfig {existing[0]}: no current-context; choose one of {sorted(merged.contexts)}")
    ctx, where = merged.pick("contexts", name)
    cluster, cluster_where = merged.pick("clusters", str(ctx.get("cluster") or ""))
    user: dict[str, Any] = {}
    if ctx.get("user"):
        user, where = merged.pick("users", str(ctx["user"]))
    return _config(cluster, cluster_where, user, where, str(ctx.get("namespace") or "default"))


class _Merged:
    """The named entries of several kubeconfig files, each with the file it came from."""

    def __init__(self) -> None:
        self.current_context = ""
        self.clusters: dict[str, tuple[dict[str, Any], Path]] = {}
        self.users: dict[str, tuple[dict[str, Any], Path]] = {}
        self.contexts: dict[str, tuple[dict[str, Any], Path]] = {}

    def add(self, path: Path) -> None:
        try:
            content = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"kubeconfig {path}: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"kubeconfig {path}: not a mapping")
        self.current_context = self.current_context or str(content.get("current-context") or "")
        for section, inner in (("clusters", "cluster"), ("users", "user"), ("contexts", "context")):
            target: dict[str, tuple[dict[str, Any], Path]] = getattr(self, section)
            for entry in content.get(section) or []:
                target.setdefault(str(entry.get("name")), (entry.get(inner) or {}, path))

    def pick(self, section: str, name: str) -> tuple[dict[str, Any], Path]:
        entries: dict[str, tuple[dict[str, Any], Path]] = getattr(self, section)
        if name not in entries:
            raise ConfigError(f"kubeconfig: no entry {name!r} in {section}; it has {sorted(entries)}")
        return entries[name]


def _config(
    cluster: dict[str, Any], cluster_file: Path, user: dict[str, Any], user_file: Path, namespace: str
) -> ClusterConfig:
    server = str(cluster.get("server") or "").rstrip("/")
    if not server.startswith(("http://", "https://")):
        raise ConfigError(
            f"kubeconfig {cluster_file}: clusters[].cluster.server is {server!r}; it must be an http(s) URL"
        )
    for refused in ("proxy-url",):
        if cluster.get(refused):
            raise ConfigError(f"kubeconfig {cluster_file}: clusters[].cluster.{refused} is not supported")
    return ClusterConfig(
        server=server,
        credentials=_credentials(user, user_file),
        ca_pem=_pem(cluster, "certificate-authority", cluster_file),
        client_cert_pem=_pem(user, "client-certificate", user_file),
        client_key_pem=_pem(user, "client-key", user_file),
        verify_tls=not cluster.get("insecure-skip-tls-verify", False),
        tls_server_name=cluster.get("tls-server-name"),
        namespace=namespace,
    )


def _credentials(user: dict[str, Any], path: Path) -> Credentials:
    if user.get("auth-provider"):
        raise ConfigError(f"kubeconfig {path}: users[].user.auth-provider is not supported; use exec")
    if user.get("exec"):
        return ExecPlugin.from_config(user["exec"], path)
    if user.get("token"):
        return StaticToken(str(user["token"]))
    if user.get("tokenFile"):
        return TokenFile(path.parent / str(user["tokenFile"]))
    if user.get("username"):
        return BasicAuth(str(user["username"]), str(user.get("password") or ""))
    return NoAuth()


def _pem(section: dict[str, Any], key: str, path: Path) -> bytes | None:
    """`KEY-data` (base64) before `KEY` (a file, relative to the kubeconfig), as kubectl does."""
    inline = section.get(f"{key}-data")
    if inline:
        try:
            return base64.b64decode(inline, validate=True)
        except ValueError as error:
            raise ConfigError(f"kubeconfig {path}: {key}-data is not base64: {error}") from error
    if section.get(key):
        file = path.parent / str(section[key])
        try:
            return file.read_bytes()
        except OSError as error:
            raise ConfigError(f"kubeconfig {path}: {key}: {error}") from error
    return None


def _load_client_pair(context: ssl.SSLContext, cert: bytes, key: bytes) -> None:
    # The ssl module reads client keys from files only; the file lives for this call, readable by us alone.
    with tempfile.TemporaryDirectory() as folder:
        pair = Path(folder) / "pair.pem"
        pair.touch(mode=0o600)
        pair.write_bytes(cert + b"\n" + key)
        try:
            context.load_cert_chain(pair)
        except ssl.SSLError as error:
            raise ConfigError(f"kubeconfig: client-certificate and client-key do not fit: {error}") from error
