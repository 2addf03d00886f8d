"""Kubeconfig files: what is read, in which order, and that a bad one is named."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.cluster_client import ConfigError, load_config
from baton.cluster_client.config import load_kubeconfig


def write(path: Path, user: dict[str, Any] | None = None, cluster: dict[str, Any] | None = None) -> Path:
    content = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "ns"}}],
        "clusters": [{"name": "k", "cluster": {"server": "http://127.0.0.1:1/", **(cluster or {})}}],
        "users": [{"name": "u", "user": user or {}}],
    }
    path.write_text(yaml.safe_dump(content))
    return path


async def test_server_namespace_and_token(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "k", {"token": "t"}))
    assert (config.server, config.namespace) == ("http://127.0.0.1:1", "ns")
    assert await config.auth_headers() == {"Authorization": "Bearer t"}
    assert "Bearer" not in repr(config) and "'t'" not in repr(config)


async def test_files_are_relative_to_the_kubeconfig(tmp_path: Path) -> None:
    (tmp_path / "tok").write_text("from-file\n")
    (tmp_path / "ca").write_bytes(b"PEM")
    config = load_config(write(tmp_path / "k", {"tokenFile": "tok"}, {"certificate-authority": "ca"}))
    assert await config.auth_headers() == {"Authorization": "Bearer from-file"}
    assert config.ca_pem == b"PEM"
    inline = base64.b64encode(b"INLINE").decode()
    both = write(tmp_path / "k2", None, {"certificate-authority": "ca", "certificate-authority-data": inline})
    assert load_config(both).ca_pem == b"INLINE"


async def test_a_credential_plugin_is_run_once_and_its_failure_names_it(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    code = (
        f"import json,os; open({str(ran)!r},'a').write('x'); assert os.environ['A']=='b'; "
        "print(json.dumps({'status': {'token': 'from-plugin'}}))"
    )
    plugin = {"command": sys.executable, "args": ["-c", code], "env": [{"name": "A", "value": "b"}]}
    config = load_config(write(tmp_path / "k", {"exec": plugin}))
    for _ in range(2):
        assert await config.auth_headers() == {"Authorization": "Bearer from-plugin"}
    assert ran.read_text() == "x"
    broken = write(tmp_path / "k2", {"exec": {"command": sys.executable, "args": ["-c", "raise SystemExit(3)"]}})
    with pytest.raises(ConfigError, match="ended with 3"):
        await load_config(broken).auth_headers()


def test_first_file_wins_and_environment_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = write(tmp_path / "one", None, {"server": "http://one"})
    two = write(tmp_path / "two", None, {"server": "http://two"})
    monkeypatch.setenv("KUBECONFIG", f"{one}:{two}")
    assert load_config().server == "http://one"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "not a mapping"),
        ("a: [", "kubeconfig"),
        ("current-context: x", "no entry 'x' in contexts"),
        ("clusters: []", "no current-context"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "k"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_kubeconfig([path])


@pytest.mark.parametrize(
    ("user", "cluster", "message"),
    [
        ({}, {"server": "ftp://x"}, r"cluster\.server is 'ftp://x'"),
        ({}, {"proxy-url": "http://p"}, "proxy-url is not supported"),
        ({"auth-provider": {"name": "gcp"}}, {}, "auth-provider is not supported"),
        ({"client-certificate-data": "%%%"}, {}, "client-certificate-data is not base64"),
        ({"client-key": "nowhere"}, {}, "client-key"),
    ],
)
def test_unusable_entries_are_named(
    tmp_path: Path, user: dict[str, Any], cluster: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "k", user, cluster))
