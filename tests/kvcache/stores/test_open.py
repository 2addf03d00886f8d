"""From flags to a store: what is read, what is refused, and that each message names what to change."""

import sys
from pathlib import Path

import pytest

from baton.kvcache.stores.base import StoreConfig, StoreError
from baton.kvcache.stores.file import FileStore
from baton.kvcache.stores.open import PrefetchSettings, open_store, parse_extra_config
from baton.kvcache.stores.sizes import parse_size

SIZE = 5000
DICT_STORE = str(Path(__file__).parents[2] / "fakes" / "dict_store.py")


def config(**extra: object) -> StoreConfig:
    return StoreConfig(object_bytes=SIZE, extra=extra)


def test_the_caches_settings_are_split_from_the_back_ends() -> None:
    text = (
        '{"prefetch_threshold": 64, "prefetch_timeout_base": 2, "hicache_storage_pass_prefix_keys": true, "path": "/x"}'
    )
    settings, rest = parse_extra_config(text)
    assert settings == PrefetchSettings(
        prefetch_threshold=64, prefetch_timeout_base_s=2.0, hicache_storage_pass_prefix_keys=True
    )
    assert rest == {"path": "/x"}
    assert parse_extra_config(None) == parse_extra_config(" ") == (PrefetchSettings(), {})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", '{"prefetch_threshold": 8, "capacity": "1gb"}'),
        ("c.yaml", "prefetch_threshold: 8\ncapacity: 1gb\n"),
        ("c.toml", 'prefetch_threshold = 8\ncapacity = "1gb"\n'),
    ],
)
def test_it_may_come_from_a_file(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    settings, rest = parse_extra_config(f"@{tmp_path / name}")
    assert settings.prefetch_threshold == 8 and rest == {"capacity": "1gb"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "extra-config: Expecting property name"),
        ("[1]", "extra-config: wants an object"),
        ("@/nowhere.json", "/nowhere.json"),
        ("@/nowhere.ini", "nowhere.ini"),
        ('{"prefetch_threshold": "many"}', "prefetch_threshold is 'many'; it wants a whole number"),
        ('{"prefetch_timeout_base": Infinity}', "prefetch_timeout_base is inf"),
        ('{"prefetch_threshold": 1.5}', "prefetch_threshold is 1.5"),
        ('{"prefetch_timeout_base": -1}', "prefetch_timeout_base is -1"),
        ('{"prefetch_timeout_base": true}', "prefetch_timeout_base is True"),
        ('{"prefetch_timeout_base": NaN}', "prefetch_timeout_base is nan"),
        ('{"hicache_storage_pass_prefix_keys": 1}', "hicache_storage_pass_prefix_keys is 1"),
    ],
)
def test_an_extra_config_that_makes_no_sense_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        parse_extra_config(text)


def test_the_file_stores_path_comes_from_the_config_or_else_from_sglangs_variable(tmp_path: Path) -> None:
    environ = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(tmp_path / "variable")}
    for extra, expected in (({}, "variable"), ({"path": str(tmp_path / "config")}, "config")):
        store = open_store("file", config(capacity="1mb", **extra), environ)
        assert isinstance(store, FileStore) and store.directory.parent == tmp_path / expected
        store.close()


def test_without_a_capacity_it_takes_a_share_of_the_free_disk(tmp_path: Path) -> None:
    store = open_store("file", config(path=str(tmp_path)))
    assert SIZE < store.stats()["capacity_bytes"] < 1e15
    store.close()


@pytest.mark.parametrize("backend", ["nixl", "hf3fs", "aibrix", "eic", "simm", "lmcache", "fiel"])
def test_other_back_ends_are_refused_by_name(backend: str) -> None:
    with pytest.raises(StoreError, match=backend):
        open_store(backend, config())


def dynamic(module: str = DICT_STORE, name: str = "DictStore", **more: object) -> StoreConfig:
    return config(backend_name="mine", module_path=module, class_name=name, **more)


@pytest.mark.parametrize("module", [DICT_STORE, "tests.fakes.dict_store"])
def test_a_class_of_a_third_party_is_a_store(module: str) -> None:
    store = open_store("dynamic", dynamic(module, greeting="hello"))
    assert type(store).__name__ == "DictStore" and store.batch_exists(["a"]) == 0


BROKEN = """
class NoStore: pass
class Short:
    def __init__(self, config): pass
    def register(self, memory): pass
    def batch_exists(self, names): pass
    def batch_get(self, names): pass
class Fails:
    def __init__(self, config): raise KeyError("endpoint")
    def register(self, memory): pass
    def batch_exists(self, names): pass
    def batch_get(self, names, targets): pass
    def batch_put(self, names, objects): pass
    def clear(self): pass
    def stats(self): pass
    def close(self): pass
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nobody", "'Nobody' of module_path .*there is no such class"),
        ("NoStore", "has no method register"),
        ("Short", "batch_get wants other arguments"),
        ("Fails", "KeyError: 'endpoint'"),
    ],
)
def test_a_class_that_is_no_store_is_refused(name: str, message: str, tmp_path: Path) -> None:
    module = tmp_path / "broken_store.py"
    module.write_text(BROKEN)
    with pytest.raises(StoreError, match=message):
        open_store("dynamic", dynamic(str(module), name))
    sys.modules.pop("broken_store", None)


def test_dynamic_says_what_it_misses() -> None:
    with pytest.raises(StoreError, match="module_path, class_name"):
        open_store("dynamic", config(backend_name="mine"))
    with pytest.raises(StoreError, match="no_such_module"):
        open_store("dynamic", dynamic("no_such_module"))
    with pytest.raises(StoreError, match="colour"):
        open_store("dynamic", dynamic(colour="red"))
    with pytest.raises(StoreError, match="interface_v1"):
        open_store("dynamic", dynamic(interface_v1=1))


@pytest.mark.parametrize(
    ("value", "expected"), [(5, 5), ("7", 7), ("16mb", 16 << 20), ("1.5 GB", 3 << 29), ("2T", 2 << 40)]
)
def test_sizes(value: object, expected: int) -> None:
    assert parse_size(value) == expected


@pytest.mark.parametrize("value", [True, -1, "-1", "gb", "1pb", 1.5, None])
def test_sizes_that_are_none(value: object) -> None:
    with pytest.raises(ValueError, match="4gb"):
        parse_size(value)
