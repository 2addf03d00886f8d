"""From flags to an open store: reads --hicache-storage-backend-extra-config and chooses the back end.

The only place of the room that reads the environment for the file store; `mooncake_config` does for Mooncake.
"""

import json
import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from baton.kvcache.stores.base import Store, StoreConfig, StoreError
from baton.kvcache.stores.dynamic import open_dynamic
from baton.kvcache.stores.fallback import open_with_fallback
from baton.kvcache.stores.file import FileStore
from baton.kvcache.stores.mooncake import MooncakeStore

FLAG = "--hicache-storage-backend-extra-config"
FILE_PATH_VARIABLE = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"
DEFAULT_FILE_PATH = "~/.cache/baton/kv"
_NOT_OURS = ("nixl", "hf3fs", "aibrix", "eic", "simm", "lmcache")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefetchSettings:
    """What the cache understands of the extra config. Names and defaults are SGLang's, with the unit added."""

    prefetch_threshold: int = 256
    """Tokens: shorter misses are not looked up."""
    prefetch_timeout_base_s: float = 1.0
    prefetch_timeout_per_ki_token_s: float = 0.25
    hicache_storage_pass_prefix_keys: bool = False
    """No effect: the key of a page is a hash over its whole prefix, so no store needs the keys before it."""


_SETTINGS = {field.name.removesuffix("_s"): field.name for field in fields(PrefetchSettings)}
"""The key in the extra config -> our field."""


def parse_extra_config(text: str | None) -> tuple[PrefetchSettings, dict[str, Any]]:
    """The cache's settings, and the rest: the back end's own. `text` is a JSON object, or @FILE with one (.json, .yaml or
    .toml). Raises `StoreError` naming flag or file, and the key."""
    where, values = _read(text) if text and text.strip() else (FLAG, {})
    ours: dict[str, Any] = {}
    for key, name in _SETTINGS.items():
        if key in values:
            ours[name] = _checked(where, key, values[key], getattr(PrefetchSettings(), name))
    return PrefetchSettings(**ours), {key: value for key, value in values.items() if key not in _SETTINGS}


def open_store(backend: str, config: StoreConfig, environ: Mapping[str, str] = os.environ) -> Store:
    """The store that --hicache-storage-backend names. Raises `StoreError`."""
    if "fallback" in config.extra:
        return open_with_fallback(backend, config, lambda name, own: open_store(name, own, environ))
    if backend == "file":
        path = environ.get(FILE_PATH_VARIABLE) or DEFAULT_FILE_PATH
        return FileStore(replace(config, extra={"path": path, **config.extra}))
    if backend == "dynamic":
        return open_dynamic(config)
    if backend == "mooncake":
        return MooncakeStore(config)
    if backend in _NOT_OURS:
        raise StoreError(
            f"--hicache-storage-backend {backend} is not served; use file, mooncake, or dynamic with a class of yours"
        )
    raise StoreError(f"--hicache-storage-backend {backend!r} is unknown; it is one of file, mooncake, dynamic")


def _read(text: str) -> tuple[str, dict[str, Any]]:
    """Where it came from, for messages, and the object."""
    where, suffix = FLAG, ".json"
    try:
        if text.startswith("@"):
            path = Path(text[1:]).expanduser()
            where, suffix = f"{FLAG} {text}", path.suffix
            text = path.read_text()
        values = _parse(text, suffix)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StoreError(f"{where}: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise StoreError(f"{where}: wants an object with names and values")
    return where, values


def _parse(text: str, suffix: str) -> Any:
    match suffix:
        case ".json":
            return json.loads(text)
        case ".yaml" | ".yml":
            return yaml.safe_load(text)
        case ".toml":
            return tomllib.loads(text)
    raise ValueError(f"the file's name ends in {suffix!r}; .json, .yaml, .yml and .toml are read")


def _checked(where: str, key: str, value: object, default: bool | int | float) -> bool | int | float:
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise StoreError(f"{where}: {key} is {value!r}; it wants true or false")
    kinds, wanted = ((int, float), "a number") if isinstance(default, float) else ((int,), "a whole number")
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < math.inf:
        raise StoreError(f"{where}: {key} is {value!r}; it wants {wanted} of at least 0")
    assert isinstance(value, int | float)
    return type(default)(value)
