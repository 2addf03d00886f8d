"""What is free: the system's word, and a container's limit."""

from pathlib import Path

import pytest

from baton.engine.free_memory import free_memory_bytes

MIB = 1 << 20


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       8192 kB\nMemFree:        1024 kB\nMemAvailable:   4096 kB\n")
    return path


def test_what_the_page_cache_holds_is_free(meminfo: Path, tmp_path: Path) -> None:
    assert free_memory_bytes(meminfo, tmp_path / "none") == 4 * MIB


def test_a_containers_limit_counts_without_its_page_cache(meminfo: Path, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{3 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{2 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {MIB}\nactive_file 5\ninactive_file {MIB}\n")
    assert free_memory_bytes(meminfo, tmp_path) == 2 * MIB
    (tmp_path / "memory.current").write_text(f"{9 * MIB}\n")
    assert free_memory_bytes(meminfo, tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_bytes(meminfo, tmp_path) == 4 * MIB


def test_this_machine_has_some(tmp_path: Path) -> None:
    assert free_memory_bytes() > 0
    assert free_memory_bytes(tmp_path / "none", tmp_path) > 0
