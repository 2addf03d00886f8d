"""What a Python program in a pod finds when it binds "all addresses" and looks up the cluster's names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.cluster.node.runtime import PYHOOK

IP = "127.251.3.4"


def run(code: str, tmp_path: Path, *, hosts: bool = True, more_path: str = "", **env: str) -> object:
    (tmp_path / "hosts").write_text(f"{IP}\tlocalhost pod-0\n127.251.3.9\tweb web.default.svc\n127.251.3.8\tweb\n")
    variables = {
        "PATH": os.environ["PATH"], "PYTHONPATH": f"{PYHOOK}{more_path}", "BATON_POD_IP": IP, "HOSTNAME": "pod-0",
        "PYTHONDEVMODE": "1", **({"BATON_HOSTS_FILE": str(tmp_path / "hosts")} if hosts else {}), **env,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "import json, socket\n" + code], env=variables, capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "code",
    [
        "s = socket.socket(); s.bind(('', 0)); print(json.dumps(s.getsockname()[0])); s.close()",
        "s = socket.create_server(('0.0.0.0', 0)); print(json.dumps(s.getsockname()[0])); s.close()",
        "import http.server as h; s = h.ThreadingHTTPServer(('', 0), h.BaseHTTPRequestHandler); "
        "print(json.dumps(s.socket.getsockname()[0])); s.server_close()",
    ],
)
def test_all_addresses_is_the_pods_own(tmp_path: Path, code: str) -> None:
    assert run(code, tmp_path) == IP


def test_a_dual_stack_socket_is_mapped(tmp_path: Path) -> None:
    code = (
        "s = socket.create_server(('::', 0), family=socket.AF_INET6, dualstack_ipv6=True)\n"
        "print(json.dumps(s.getsockname()[0])); s.close()"
    )
    assert run(code, tmp_path) == f"::ffff:{IP}"


ASYNC = """
import asyncio
{setup}
async def main():
    server = await asyncio.get_running_loop().create_server(asyncio.Protocol, {host}, 0)
    print(json.dumps(sorted({{s.getsockname()[0] for s in server.sockets}})))
    server.close()
{run}
"""


@pytest.mark.parametrize("host", ["None", "'0.0.0.0'", "'::'"])
@pytest.mark.parametrize(("setup", "start"), [("", "asyncio.run(main())"), ("import uvloop", "uvloop.run(main())")])
def test_event_loops_listen_on_the_pods_own(tmp_path: Path, host: str, setup: str, start: str) -> None:
    assert run(ASYNC.format(setup=setup, host=host, run=start), tmp_path) == [IP]


def test_the_clusters_names_resolve(tmp_path: Path) -> None:
    code = (
        "found = sorted({a[4][0] for a in socket.getaddrinfo('web', 80, type=socket.SOCK_STREAM)})\n"
        "print(json.dumps([found, socket.gethostbyname('WEB.default.svc'), socket.gethostname(),"
        " socket.gethostbyname('127.0.0.1')]))"
    )
    assert run(code, tmp_path) == [["127.251.3.8", "127.251.3.9"], "127.251.3.9", "pod-0", "127.0.0.1"]


def test_names_resolve_in_both_event_loops(tmp_path: Path) -> None:
    code = (
        "import asyncio, uvloop\n"
        "async def main():\n"
        "    found = await asyncio.get_running_loop().getaddrinfo('web.default.svc', 80, type=socket.SOCK_STREAM)\n"
        "    return found[0][4][0]\n"
        "print(json.dumps([asyncio.run(main()), uvloop.run(main())]))"
    )
    assert run(code, tmp_path) == ["127.251.3.9", "127.251.3.9"]


def test_a_name_that_comes_later_is_found(tmp_path: Path) -> None:
    code = (
        "import os\n"
        "path = os.environ['BATON_HOSTS_FILE']; socket.gethostbyname('web')\n"
        "open(path, 'a').write('127.251.3.7 late\\n')\n"
        "print(json.dumps(socket.gethostbyname('late')))"
    )
    assert run(code, tmp_path, PYTHONDEVMODE="0") == "127.251.3.7"


def test_another_sitecustomize_is_still_run(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sitecustomize.py").write_text("import builtins; builtins.other_ran = True")
    code = "import builtins; print(json.dumps(getattr(builtins, 'other_ran', False)))"
    assert run(code, tmp_path, more_path=f":{tmp_path / 'other'}") is True
