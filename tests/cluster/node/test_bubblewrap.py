"""What is mounted, as a function of the plan: read off bwrap's own options, and seen from inside a real container."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from baton.cluster.node import isolation
from baton.cluster.node.bubblewrap import Bubblewrap, arguments
from baton.cluster.node.runtime import ContainerPlan, Mount, PlanError

PROGRAM, PROBLEM = isolation.probe()
needs_bwrap = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))


def plan(tmp_path: Path, *argv: str, mounts: tuple[Mount, ...] = (), **options: object) -> ContainerPlan:
    for name in ("shm", "scratch"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "hosts").write_text("127.9.9.9\tlocalhost pod-0\n")
    values: dict[str, object] = {
        "argv": argv or ("true",), "env": {"PATH": "/usr/bin:/bin"}, "cwd": "/", "mounts": mounts, "share": (),
        "keep": (), "hostname": "pod-0", "hosts": tmp_path / "hosts", "shm": tmp_path / "shm",
        "scratch": tmp_path / "scratch", **options,
    }  # fmt: skip
    return ContainerPlan(**values)  # type: ignore[arg-type]


def run(one: ContainerPlan) -> str:
    launch = Bubblewrap(str(PROGRAM)).enter(Bubblewrap(str(PROGRAM)).launch(one), one.argv)
    done = subprocess.run(launch.argv, env=dict(launch.env), capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_bwrap
@pytest.mark.parametrize(
    "target", ["/models/Qwen3-32B/", "/etc/rbg", "/var/lib/etcd", "/usr/share/a/b", "/tmp/x", "/new"]
)
def test_a_volume_can_be_mounted_anywhere(tmp_path: Path, target: str) -> None:
    source = tmp_path / "volume"
    source.mkdir()
    (source / "file").write_text("content")
    said = run(plan(tmp_path, "cat", f"{target}/file", mounts=(Mount(source, target, True),)))
    assert said == "content"


@needs_bwrap
def test_a_volume_inside_a_volume_and_a_single_file_are_mounted(tmp_path: Path) -> None:
    outer, inner, single = tmp_path / "outer", tmp_path / "inner", tmp_path / "single"
    (outer / "sub").mkdir(parents=True)
    inner.mkdir()
    (inner / "deep").write_text("deep ")
    single.write_text("single")
    mounts = (
        Mount(inner, "/data/sub", False), Mount(outer, "/data", False), Mount(single, "/scratch/llm/config.yaml", True)
    )  # fmt: skip
    assert run(plan(tmp_path, "cat", "/data/sub/deep", "/scratch/llm/config.yaml", mounts=mounts)) == "deep single"


@needs_bwrap
def test_the_host_is_read_only_and_scratch_is_private(tmp_path: Path) -> None:
    script = "touch /usr/bin/mine 2>/dev/null || echo refused; echo x > /tmp/f; echo y > /dev/shm/g; hostname"
    assert run(plan(tmp_path, "sh", "-c", script)) == "refused\npod-0\n"
    assert (tmp_path / "scratch" / "f").read_text() == "x\n"
    assert (tmp_path / "shm" / "g").read_text() == "y\n"


@needs_bwrap
def test_the_hosts_file_is_live(tmp_path: Path) -> None:
    from baton.cluster.node.hosts import replace_in_place

    one = plan(tmp_path, "sh", "-c", "read go; getent hosts late.name")
    launch = Bubblewrap(str(PROGRAM)).enter(Bubblewrap(str(PROGRAM)).launch(one), one.argv)
    with subprocess.Popen(
        launch.argv, env=dict(launch.env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        replace_in_place(one.hosts, "127.8.8.8\tlate.name\n")
        out, _ = process.communicate("go\n", timeout=20)
    assert out.split() == ["127.8.8.8", "late.name"]


@needs_bwrap
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_it_works_without_privileges() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o777)
        (place / "volume").mkdir()
        (place / "volume" / "file").write_text("content")
        one = plan(place, "cat", "/models/m/file", mounts=(Mount(place / "volume", "/models/m", True),))
        for path in place.rglob("*"):
            os.chown(path, 65534, 65534)
        done = subprocess.run(
            [str(PROGRAM), *arguments(one), "--", *one.argv], env=dict(one.env), capture_output=True, text=True,
            timeout=20, check=False, user=65534, group=65534, extra_groups=[],
        )  # fmt: skip
    assert (done.stdout, done.stderr) == ("content", "")


def test_our_code_stays_visible_when_it_lies_in_a_private_place(tmp_path: Path) -> None:
    args = arguments(plan(tmp_path, keep=("/tmp/checkout", "/opt/other")))
    joined = " ".join(args)
    assert "--ro-bind /tmp/checkout /tmp/checkout" in joined
    assert "/opt/other /opt/other" not in joined.partition("--dev-bind")[2]


@pytest.mark.parametrize("target", ["relative", "/", "/a/../b"])
def test_a_mount_path_that_makes_no_sense_is_refused_by_name(tmp_path: Path, target: str) -> None:
    with pytest.raises(PlanError, match="mountPath '"):
        arguments(plan(tmp_path, mounts=(Mount(tmp_path, target, True),)))


def test_a_program_on_a_volume_is_looked_for_there(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    mounts = (Mount(tmp_path / "tools", "/tools", True),)
    runtime = Bubblewrap("/usr/bin/bwrap")
    assert "executable file not found" in str(runtime.launch(plan(tmp_path, "/tools/run", mounts=mounts)).error)
    (tmp_path / "tools" / "run").write_text("#!/bin/sh\n")
    assert runtime.launch(plan(tmp_path, "/tools/run", mounts=mounts)).error is None


def test_a_volume_over_our_own_programs_is_refused_to_those_who_run_them(tmp_path: Path) -> None:
    def over(target: str, path: str) -> list[str]:
        mounts = (Mount(tmp_path, target, False),)
        return arguments(plan(tmp_path, mounts=mounts, keep=("/opt/checkout",), env={"PATH": path}))

    for target in ("/opt", "/opt/checkout/", "/opt/checkout/bin"):
        with pytest.raises(PlanError, match="hides /opt/checkout/bin, which Baton runs from"):
            over(target, "/opt/checkout/bin:/bin")
        assert over(target, "/usr/bin:/bin")
    assert over("/opt/data", "/opt/checkout/bin:/bin")
