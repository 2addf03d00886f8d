"""Plain isolation: volume paths are rewritten on path boundaries, and what cannot be done is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cluster.node.test_bubblewrap import plan

from baton.cluster.node.plain import Plain, rewriter
from baton.cluster.node.runtime import Mount, PlanError

PATHS = {"/models/Qwen3-32B": "/S/models/Qwen3-32B", "/models": "/S/models", "/dev/shm": "/S/dev/shm"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("--model-path /models/Qwen3-32B/", "--model-path /S/models/Qwen3-32B/"),
        ("--model-path=/models/Qwen3-32B --port 8000", "--model-path=/S/models/Qwen3-32B --port 8000"),
        ("cd /models;ls", "cd /S/models;ls"),
        ("'/models/x' \"/dev/shm\"", "'/S/models/x' \"/S/dev/shm\""),
        ("/modelsX /models-old /models.bak", "/modelsX /models-old /models.bak"),
        ("/other/models ~/models ./models", "/other/models ~/models ./models"),
        ("file:/models:/dev/shm", "file:/S/models:/S/dev/shm"),
    ],
)
def test_paths_are_rewritten_on_their_boundaries(before: str, after: str) -> None:
    assert rewriter(PATHS)(before) == after


def test_command_environment_and_directory_follow_the_volume(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w").write_text("x")
    one = plan(
        tmp_path, "sh", "-c", "cat /models/m/w", mounts=(Mount(tmp_path / "model", "/models/m/", True),),
        env={"PATH": "/bin:/usr/bin", "MODEL": "/models/m", "HOME": "/tmp"}, cwd="/models/m",
    )  # fmt: skip
    launch = Plain().launch(one)
    place = launch.env["MODEL"]
    assert (Path(place) / "w").read_text() == "x"
    assert launch.argv == ("sh", "-c", f"cat {place}/w")
    assert launch.cwd == place
    assert launch.env["BATON_VOLUME_PATHS"] == f"{place}=/models/m"
    assert Plain().enter(launch, ["ls", "/models/m"]).argv == ("ls", place)


def test_a_program_that_is_not_there_is_known_before_it_starts(tmp_path: Path) -> None:
    assert "executable file not found" in str(Plain().launch(plan(tmp_path, "no-such-program")).error)


def test_a_mount_inside_a_mount_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    mounts = (Mount(tmp_path / "a", "/data", False), Mount(tmp_path, "/data/sub", False))
    with pytest.raises(PlanError, match=r"'/data/sub' lies inside another volume.*use bubblewrap"):
        Plain().launch(plan(tmp_path, mounts=mounts))
