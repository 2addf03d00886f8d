"""The state directory: one process of a role, records that die with it, files that only the owner reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from baton.cluster.home import ClusterHome, DaemonRecord, HomeError, Settings


def test_only_one_process_of_a_role_and_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    home = ClusterHome.find(tmp_path / "home")
    code = (
        "import sys; from pathlib import Path; from baton.cluster.home import ClusterHome\n"
        f"with ClusterHome(Path({str(home.root)!r})).held():\n print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert home.is_held()
        assert not home.is_held("dataplane")
        with pytest.raises(HomeError, match="another daemon runs here"), home.held():
            pass
        DaemonRecord(other.pid, "http://127.0.0.1:1", "plain").write(home)
        record = DaemonRecord.read(home)
        assert record is not None
        assert record.pid == other.pid
        other.kill()
    assert not home.is_held()
    assert DaemonRecord.read(home) is None, "a record is worth nothing without its process"


def test_settings_keep_their_token_and_are_private(tmp_path: Path) -> None:
    home = ClusterHome.find(tmp_path)
    first = Settings.read(home)
    first.write(home)
    assert Settings.read(home) == first
    assert len(first.token) > 30
    assert first.token not in repr(first)
    assert home.settings_file.stat().st_mode & 0o777 == 0o600
    assert home.directory.stat().st_mode & 0o777 == 0o700


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    home = ClusterHome.find(tmp_path)
    home.settings_file.write_text(json.dumps({"isolation": "moon", "token": "x"}))
    with pytest.raises(HomeError, match=r"settings\.json: damaged"):
        Settings.read(home)


def test_a_directory_that_cannot_be_made_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HomeError, match=r"file/home: Not a directory; set BATON_HOME"):
        ClusterHome.find(tmp_path / "file" / "home")
