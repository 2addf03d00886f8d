"""Logs outlive their pod until the next pod of its name has gone too."""

from __future__ import annotations

import os
from pathlib import Path

from baton.cluster.node.ended import MAX_PODS, EndedLogs
from baton.cluster.node.slots import SlotStore


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_removed_slot_leaves_the_logs_of_all_attempts_in_order(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    for uid, words in (("a", "old"), ("b", "new")):
        slot = store.open(uid, "default", "x-0-1", "node-0")
        for attempt, suffix in ((10, ""), (2, ""), (2, ".1")):
            path = slot.log_path("main", attempt)
            write(path.with_name(path.name + suffix), f"{words} {attempt}{suffix}\n")
        write(slot.log_path("silent", 1), "")
        store.remove(slot)
        assert not slot.directory.exists()
    path = store.ended.path("default", "x-0-1", "main")
    assert path is not None and path.read_text() == "new 2.1\nnew 2\nnew 10\n"
    assert store.ended.path("default", "x-0-1", "silent") is None
    assert store.ended.path("other", "x-0-1", "main") is None


def test_the_oldest_logs_go_when_there_are_too_many(tmp_path: Path) -> None:
    ended = EndedLogs(tmp_path / "ended")
    for number in range(MAX_PODS + 3):
        write(tmp_path / "logs" / "main" / "1.log", f"{number}\n")
        ended.keep("default", f"pod-{number}", tmp_path / "logs")
        os.utime(tmp_path / "ended" / "default" / f"pod-{number}", (number, number))
    assert len(list((tmp_path / "ended" / "default").iterdir())) == MAX_PODS
    assert ended.path("default", "pod-0", "main") is None
    assert ended.path("default", f"pod-{MAX_PODS + 2}", "main") is not None


def test_a_pod_that_never_logged_leaves_nothing(tmp_path: Path) -> None:
    store = SlotStore(tmp_path)
    store.remove(store.open("a", "default", "quiet", "node-0"))
    assert store.ended.path("default", "quiet", "main") is None
