"""Tiers of ranks with a pool each, as processes over gloo: what one rank computes alone is what they load, and what one of them
lost is lost to all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakes.dict_store import DictStore
from tests.fakes.models import hf_model
from tests.fakes.rank_group import PAGE_SIZE, random_prompts
from tests.fakes.rank_workers import GroupWorker, Worker
from tests.fakes.thread_ranks import ThreadRanks

from baton.engine.distributed.connect import COLLECTIVE
from baton.engine.distributed.control import GroupError
from baton.engine.models.config import load_config
from baton.engine.models.shard import Shard
from baton.engine.page_copies import PageCopier
from baton.engine.tiers import OwnTiers, is_replica
from baton.engine.weights.fingerprint import model_fingerprint
from baton.kvcache.page_keys import PageKeys
from baton.kvcache.page_memory import PageMemory
from baton.kvcache.stores.base import StoreConfig
from baton.kvcache.stores.file import FileStore
from baton.kvcache.stores.objects import ObjectScheme, PageShape
from baton.kvcache.stores.seal import SEAL_BYTES
from baton.kvcache.stores.worker import StoreWorker
from baton.kvcache.tiers import Copies, Write, Written
from baton.protocol.rank import CheckIntegrity, ClearStore, FlushCache, GetState

A, B, C = random_prompts(68, 70, 67)
"""Four whole pages and a bit each; the device holds ten."""
NUM_CACHED = 64
FLAGS = ["--dtype", "float32", "--max-total-tokens", "160"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    hf_model("qwen2").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Any]:
    """Of one rank without tiers."""
    with Worker(model, *FLAGS) as alone:
        return [pytest.approx(alone.generate(prompt)[0], abs=1e-4) for prompt in (A, B, C)]


@pytest.fixture(autouse=True)
def gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COLLECTIVE, "gloo")


def tiers(*more: str) -> list[str]:
    return [*FLAGS, "--enable-hierarchical-cache", "--hicache-ratio", "4", *more]


def at(path: Path) -> list[str]:
    extra = {"path": str(path), "capacity": "10mb", "prefetch_threshold": PAGE_SIZE}
    return ["--hicache-storage-backend-extra-config", json.dumps(extra)]


def store(path: Path, *more: str) -> list[str]:
    policy = ["--hicache-storage-prefetch-policy", "wait_complete"]
    return tiers("--hicache-storage-backend", "file", *policy, *at(path), *more)


@pytest.mark.parametrize(("size", "pp_size"), [(2, 1), (1, 2)])
def test_pages_that_left_the_device_come_back_from_every_ranks_host_memory(
    model: Path, expected: list[Any], size: int, pp_size: int
) -> None:
    with GroupWorker(model, size, *tiers(), pp_size=pp_size) as group:
        worker = group.worker
        assert [worker.generate(prompt)[0] for prompt in (A, B, C)] == expected
        answer, first = worker.generate(A)
        assert (answer, first.cached_tokens) == (expected[0], NUM_CACHED)
        assert first.cached_host == NUM_CACHED - PAGE_SIZE, "the device has room for B, C and the first page of A"
        assert worker.ask(CheckIntegrity(1)).ok
        assert worker.ask(FlushCache(2)).ok
        assert worker.generate(A)[1].cached_tokens == 0, "host pages are forgotten too"


def test_a_new_start_finds_in_the_stores_what_the_last_one_wrote(
    model: Path, expected: list[Any], tmp_path: Path
) -> None:
    flags = store(tmp_path, "--hicache-storage-key-scheme", "unified")
    with GroupWorker(model, 2, *flags) as group:
        assert group.worker.generate(A)[0] == expected[0]
        group.worker.drain()
        assert group.worker.ask(GetState(1)).store["up"] == 1
    with GroupWorker(model, 2, *flags) as group:
        answer, first = group.worker.generate(A)
        assert (answer, first.cached_store) == (expected[0], NUM_CACHED)
    with Worker(model, *flags) as alone:  # ranks wrote one head each; one rank has both
        answer, first = alone.generate(A)
        assert (answer, first.cached_store) == (expected[0], NUM_CACHED)
    with GroupWorker(model, 2, *flags) as group:
        assert group.worker.ask(ClearStore(1)).ok
        assert group.worker.ask(FlushCache(2)).ok
        answer, first = group.worker.generate(A)
        assert (answer, first.cached_tokens) == (expected[0], 0)


def test_stages_find_their_layers_in_the_store_again_and_other_layouts_find_nothing(
    model: Path, expected: list[Any], tmp_path: Path
) -> None:
    flags = store(tmp_path)
    with GroupWorker(model, 1, *flags, pp_size=2) as group:
        assert group.worker.generate(A)[0] == expected[0]
        group.worker.drain()
    with GroupWorker(model, 1, *flags, pp_size=2) as group:
        answer, first = group.worker.generate(A)
        assert (answer, first.cached_store) == (expected[0], NUM_CACHED)
    with Worker(model, *flags) as alone:
        answer, first = alone.generate(A)
        assert (answer, first.cached_store) == (expected[0], 0)


def test_what_one_ranks_store_lost_is_a_miss_on_all(model: Path, expected: list[Any], tmp_path: Path) -> None:
    flags, follower = store(tmp_path / "0"), at(tmp_path / "1")
    with GroupWorker(model, 2, *flags, follower_flags=follower) as group:
        assert group.worker.generate(A)[0] == expected[0]
        group.worker.drain()
    scheme = ObjectScheme("default", PageShape(
        layers=range(2), kv_heads=range(1, 2), page_size=PAGE_SIZE, head_dim=16, dtype="float32", dtype_bytes=4,
    ))  # fmt: skip
    keys = PageKeys(model_fingerprint(model, load_config(model)), "float32", PAGE_SIZE)
    pages = [scheme.names(key) for key in keys.extend(keys.root(None), A)]
    of_follower = FileStore(StoreConfig(object_bytes=scheme.object_bytes, extra={"path": str(tmp_path / "1")}))
    assert of_follower.batch_exists([name for names in pages for name in names]) == 4
    of_follower.discard(pages[2])
    of_follower.close()
    with GroupWorker(model, 2, *flags, follower_flags=follower) as group:
        answer, first = group.worker.generate(A)
        assert (answer, first.cached_store) == (expected[0], 2 * PAGE_SIZE)


def test_replicas_of_a_head_have_tiers_too(model: Path, expected: list[Any], tmp_path: Path) -> None:
    """Four ranks over two heads; the smallest host tier counts for all."""
    with GroupWorker(model, 4, *store(tmp_path), follower_flags=["--hicache-ratio", "2"]) as group:
        assert [group.worker.generate(prompt)[0] for prompt in (A, B, A)] == [expected[0], expected[1], expected[0]]
        assert group.worker.ask(GetState(1)).tiers["host_pages_total"] == 20


def test_ranks_with_other_tiers_are_refused(model: Path) -> None:
    group = GroupWorker(model, 2, *FLAGS, follower_flags=["--enable-hierarchical-cache"])
    with pytest.raises(GroupError, match=r"--enable-hierarchical-cache: False on rank 0 and True on rank 1"), group:
        pass


def test_of_replicas_the_first_writes_to_a_store_that_all_share(model: Path) -> None:
    config = load_config(model)
    ranks = [Shard(rank, 4, ThreadRanks[None](4).of_rank(rank)) for rank in range(4)]
    assert [is_replica(config, shard) for shard in ranks] == [False, True, False, True]
    shape = PageShape(layers=range(1), kv_heads=range(1), page_size=1, head_dim=2, dtype="float32", dtype_bytes=4)
    woken: list[None] = []
    store = DictStore(StoreConfig(object_bytes=shape.page_bytes + SEAL_BYTES, extra={}))
    with PageMemory.create(2, shape.page_bytes + SEAL_BYTES) as host:
        worker = StoreWorker(store, ObjectScheme("default", shape), host, lambda: None)
        replica = OwnTiers(PageCopier(torch.zeros(1, 4), host), worker, lambda: woken.append(None), writes=False)
        replica.move(Copies(), [Write(7, [b"a", b"b"], [0, 1])])
        assert (replica.poll(), len(woken)) == ([Written(7, [True, True])], 1)
        replica.close()
    assert "put" not in store.calls
