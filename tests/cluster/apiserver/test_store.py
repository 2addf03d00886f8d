"""Storage: order, history, compaction, and that SIGKILL loses no acknowledged write."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.cluster.apiserver import Key, Store
from baton.cluster.apiserver.store import ADDED, DELETED, MODIFIED, StoreClosedError

JSON = dict[str, Any]


def obj(name: str, value: int) -> JSON:
    return {"metadata": {"name": name, "uid": name}, "value": value}


def key(name: str) -> Key:
    return Key("things", "ns", name)


async def write(store: Store, kind: str, name: str, value: int = 0) -> int:
    _, done = store.put(kind, key(name), obj(name, value))
    return await done


async def test_what_is_acknowledged_is_readable_and_survives_reopening(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    assert [await write(store, ADDED, "a", 1), await write(store, ADDED, "b", 2)] == [1, 2]
    await write(store, MODIFIED, "a", 3)
    await write(store, DELETED, "b")
    await store.close()
    store = Store(tmp_path / "db")
    store.check_integrity()
    found = list(store.resource("things").select("ns"))
    assert [(o["metadata"]["name"], o["value"], o["metadata"]["resourceVersion"]) for o in found] == [("a", 3, "3")]
    assert store.committed_revision == 4
    assert [(c.type, c.previous and c.previous["value"]) for c in store.resource("things").since(0)] == [
        (ADDED, None),
        (ADDED, None),
        (MODIFIED, 1),
        (DELETED, 2),
    ]
    await store.close()


async def test_writers_see_each_other_before_readers_do(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    _, done = store.put(ADDED, key("a"), obj("a", 1))
    assert store.get(key("a")) is None
    latest = store.latest(key("a"))
    assert latest is not None and latest["value"] == 1
    await done
    assert store.get(key("a")) == latest
    await store.close()


async def test_a_failed_commit_fails_every_write_that_waited_and_leaves_no_trace(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    await write(store, ADDED, "a", 1)
    _, bad = store.put(MODIFIED, key("a"), {"metadata": {"name": "a"}, "value": object()})  # cannot be encoded
    _, next_one = store.put(ADDED, key("b"), obj("b", 1))
    with pytest.raises(TypeError):
        await bad
    with pytest.raises(TypeError):
        await next_one
    assert store.latest(key("b")) is None
    latest = store.latest(key("a"))
    assert latest is not None and latest["value"] == 1
    await write(store, ADDED, "b", 2)
    store.check_integrity()
    await store.close()


async def test_history_answers_exact_lists_until_compacted(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    await write(store, ADDED, "a", 1)
    at = await write(store, ADDED, "b", 1)
    await write(store, MODIFIED, "a", 2)
    await write(store, DELETED, "b")
    then = {name: o["value"] for (_, name), o in store.resource("things").at(at).items()}
    assert then == {"a": 1, "b": 1}
    await store.compact(at)
    assert store.floor == at
    assert [c.revision for c in store.resource("things").since(0)] == [3, 4]
    await store.close()
    store = Store(tmp_path / "db")
    assert store.floor == at
    assert [c.previous and c.previous["value"] for c in store.resource("things").since(0)] == [1, 1]
    store.check_integrity()
    await store.close()


async def test_the_log_stays_bounded(tmp_path: Path) -> None:
    store = Store(tmp_path / "db", history_limit=100)
    await write(store, ADDED, "a", 0)
    for value in range(500):
        await write(store, MODIFIED, "a", value)
    assert len(store.resource("things").changes) <= 101
    await store.close()
    rows = sqlite3.connect(tmp_path / "db").execute("SELECT count(*) FROM log").fetchone()[0]
    assert rows <= 110


async def test_a_second_daemon_cannot_open_the_same_state(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    await write(store, ADDED, "a", 0)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        Store(tmp_path / "db")
    await store.close()
    with pytest.raises(StoreClosedError):
        store.put(ADDED, key("b"), obj("b", 0))


STEP = st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.sampled_from(["write", "delete", "compact", "reopen"]))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEP, max_size=25))
def test_any_history_equals_a_dict(tmp_path: Path, steps: list[tuple[str, int, str]]) -> None:
    async def run() -> None:
        path = tmp_path / "db"
        path.unlink(missing_ok=True)
        store, model = Store(path), {}
        for name, value, what in steps:
            if what == "write":
                await write(store, MODIFIED if name in model else ADDED, name, value)
                model[name] = value
            elif what == "delete" and name in model:
                await write(store, DELETED, name)
                del model[name]
            elif what == "compact":
                await store.compact(store.committed_revision - value)
            elif what == "reopen":
                revision = store.revision
                await store.close()
                store = Store(path)
                assert store.revision == revision
            store.check_integrity()
            found = {o["metadata"]["name"]: o["value"] for o in store.resource("things").select("ns")}
            assert found == model
        await store.close()

    asyncio.run(run())


WRITER = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from baton.cluster.apiserver import Key, Store
from baton.cluster.apiserver.store import ADDED, MODIFIED

async def main():
    store = Store(sys.argv[1])
    async def client(name):
        known = store.latest(Key("things", "ns", name))
        value = known["value"] if known else 0
        while True:
            value += 1
            body = {"metadata": {"name": name, "uid": name}, "value": value}
            kind = MODIFIED if store.latest(Key("things", "ns", name)) else ADDED
            _, done = store.put(kind, Key("things", "ns", name), body)
            await done
            print(name, value, flush=True)
    await asyncio.gather(*(client(f"c{i}") for i in range(8)))

asyncio.run(main())
"""


def test_sigkill_in_a_write_storm_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    source = str(Path(__file__).parents[3] / "src")
    acknowledged: dict[str, int] = {}
    for round_number in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "db"), source], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout
        for line, _ in zip(writer.stdout, range(120 + 37 * round_number), strict=False):
            name, value = line.split()
            acknowledged[name] = int(value)
        os.kill(writer.pid, signal.SIGKILL)
        for line in writer.stdout.read().splitlines():  # acknowledged before the kill, read after it
            if len(parts := line.split()) == 2:
                acknowledged[parts[0]] = int(parts[1])
        writer.stdout.close()
        writer.wait()
        found = dict(stored_values(tmp_path / "db"))
        assert len(acknowledged) == 8
        for name, value in acknowledged.items():
            assert found[name] >= value, f"round {round_number}: {name}"


def stored_values(path: Path) -> list[tuple[str, int]]:
    async def read() -> list[tuple[str, int]]:
        store = Store(path)
        store.check_integrity()
        out = [(o["metadata"]["name"], o["value"]) for o in store.resource("things").select("ns")]
        await store.close()
        return json.loads(json.dumps(out))

    return asyncio.run(read())


SERVER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
sys.path.insert(0, str(Path(sys.argv[2]).parent))
from baton.cluster.apiserver import ApiServer, Store, serve
from tests.fakes.node_connector import FakeNodes

async def main():
    serving = await serve(ApiServer(Store(sys.argv[1]), FakeNodes(), token=None))
    print(serving.port, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_sigkill_of_the_server_loses_no_answered_create(tmp_path: Path) -> None:
    source = str(Path(__file__).parents[3] / "src")
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path / "db"), source], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout
    port = int(server.stdout.readline())
    answered: list[str] = []
    enough = threading.Event()

    def storm(client: int) -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            for number in range(10_000):
                name = f"c{client}-{number}"
                body = json.dumps({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}})
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/api/v1/namespaces/default/configmaps", body, headers)
                response = connection.getresponse()
                response.read()
                if response.status == 201:
                    answered.append(name)
                if len(answered) > 300:
                    enough.set()
        except (OSError, HTTPException):
            pass  # the server is gone, as it should be
        finally:
            connection.close()

    threads = [threading.Thread(target=storm, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    assert enough.wait(30)
    server.kill()
    server.stdout.close()
    server.wait()
    for thread in threads:
        thread.join(20)

    async def names() -> set[str]:
        store = Store(tmp_path / "db")
        store.check_integrity()
        found = {o["metadata"]["name"] for o in store.resource("configmaps").select("default")}
        await store.close()
        return found

    assert set(answered) <= asyncio.run(names())
    assert len(answered) > 300
