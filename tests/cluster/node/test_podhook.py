"""What a C program in a pod finds when it binds "all addresses": Python's own C code stands for it, without the Python hook."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from baton.cluster.node import podhook

IP = "127.251.3.5"
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")), reason="no C compiler"
)


def bound(tmp_path: Path, code: str, **env: str) -> str:
    """What `code` printed, run under the hook."""
    hook = podhook.library(tmp_path)
    assert hook is not None
    done = subprocess.run(
        [sys.executable, "-I", "-c", "import socket\n" + code],
        env={"PATH": os.environ["PATH"], "LD_PRELOAD": str(hook), "BATON_POD_IP": IP, **env},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_compiler
@pytest.mark.parametrize(
    ("family", "kind", "address", "found"),
    [
        ("AF_INET", "SOCK_STREAM", "0.0.0.0", IP),
        ("AF_INET6", "SOCK_STREAM", "::", f"::ffff:{IP}"),
        ("AF_INET", "SOCK_STREAM", "127.0.0.1", "127.0.0.1"),
        ("AF_INET6", "SOCK_STREAM", "::1", "::1"),
        ("AF_INET", "SOCK_DGRAM", "0.0.0.0", "0.0.0.0"),
    ],
)
def test_all_addresses_is_the_pods_own(tmp_path: Path, family: str, kind: str, address: str, found: str) -> None:
    code = (
        f"s = socket.socket(socket.{family}, socket.{kind})\n"
        f"if s.family == socket.AF_INET6: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)\n"
        f"s.bind(({address!r}, 0)); print(s.getsockname()[0])"
    )
    assert bound(tmp_path, code) == found


@needs_compiler
def test_names_of_the_cluster_are_found_in_the_slots_hosts_file(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"# none\n{IP}\tlocalhost pod-0 # pod-1\n127.251.3.9 Web.default.svc web\n\n127.251.3.8\tweb\n")
    code = (
        "def found(name):\n"
        "    try: return socket.getaddrinfo(name, 80, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]\n"
        "    except socket.gaierror: return None\n"
        "print(*[found(one) for one in ('web', 'WEB.default.svc', 'pod-0', 'pod-1', '127.0.0.9', None)])"
    )
    wanted = f"127.251.3.9 127.251.3.9 {IP} None 127.0.0.9 127.0.0.1"
    assert bound(tmp_path, code, BATON_HOSTS_FILE=str(hosts)) == wanted
    assert bound(tmp_path, code, BATON_HOSTS_FILE="/no/such").split()[0] == "None"


@needs_compiler
def test_other_sockets_bind_as_ever(tmp_path: Path) -> None:
    code = f"s = socket.socket(socket.AF_UNIX); s.bind({str(tmp_path / 's')!r}); print(s.getsockname())"
    assert bound(tmp_path, code) == str(tmp_path / "s")
    code = "s = socket.socket(); s.bind(('0.0.0.0', 0)); print(s.getsockname()[0])"
    assert bound(tmp_path, code, BATON_POD_IP="") == "0.0.0.0", "not in a pod"


@needs_compiler
def test_without_a_compiler_pods_run_without_the_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert podhook.library(tmp_path / "cache") is None
