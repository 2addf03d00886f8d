"""Where a Mooncake store is and how to reach it: three sources, one result.

Names, order and defaults are SGLang's: `--hicache-storage-backend-extra-config` wins over the file named by
SGLANG_HICACHE_MOONCAKE_CONFIG_PATH, which wins over MOONCAKE_* variables. Sources are not mixed: the first one that names a
master is the whole configuration, as with SGLang. One default is ours: a worker lends Mooncake no memory of its own
(`global_segment_size` 0; SGLang: 4 GB), since what lies there is lost with the worker.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.kvcache.stores.base import StoreError
from baton.kvcache.stores.sizes import parse_size
from baton.protocol.pod import listen_host

CONFIG_PATH_VARIABLE = "SGLANG_HICACHE_MOONCAKE_CONFIG_PATH"
_VARIABLES = {
    "master_server_address": "MOONCAKE_MASTER",
    "metadata_server": "MOONCAKE_TE_META_DATA_SERVER",
    "global_segment_size": "MOONCAKE_GLOBAL_SEGMENT_SIZE",
    "local_buffer_size": "MOONCAKE_LOCAL_BUFFER_SIZE",
    "protocol": "MOONCAKE_PROTOCOL",
    "device_name": "MOONCAKE_DEVICE",
    "local_hostname": "MOONCAKE_LOCAL_HOSTNAME",
    "check_server": "MOONCAKE_CHECK_SERVER",
    "master_metrics_port": "MOONCAKE_MASTER_METRICS_PORT",
    "extra_backend_tag": "MOONCAKE_EXTRA_BACKEND_TAG",
}
_YES, _NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakeConfig:
    """A checked configuration. Sizes in bytes."""

    master_server_address: str
    """host:port of the master's RPC."""
    metadata_server: str = "P2PHANDSHAKE"
    global_segment_size: int = 0
    """Memory that this rank lends to the store."""
    local_buffer_size: int = 16 << 20
    protocol: str = "tcp"
    device_name: str = ""
    local_hostname: str = ""
    """Address under which other clients reach this one; matters only when memory is lent."""
    check_server: bool = False
    """Refuse to start when the master does not answer."""
    extra_backend_tag: str = ""
    """Part of every name: stores with different tags share nothing."""


def read_config(extra: Mapping[str, Any], num_ranks: int, environ: Mapping[str, str] = os.environ) -> MooncakeConfig:
    """The configuration of one rank. Raises `StoreError` naming source and key."""
    if extra.get("master_server_address"):
        return _checked("--hicache-storage-backend-extra-config", extra, num_ranks)
    path = environ.get(CONFIG_PATH_VARIABLE)
    if path:
        return _checked(f"{path} ({CONFIG_PATH_VARIABLE})", {**_file(path), **extra}, num_ranks)
    found = {key: environ[name] for key, name in _VARIABLES.items() if name in environ}
    if not found.get("master_server_address"):
        raise StoreError(
            "mooncake: which master? Give master_server_address (host:port) in --hicache-storage-backend-extra-config, "
            f"in the JSON file named by {CONFIG_PATH_VARIABLE}, or as MOONCAKE_MASTER"
        )
    return _checked("environment", {**found, **extra}, num_ranks)


def _file(path: str) -> Mapping[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"mooncake: {CONFIG_PATH_VARIABLE}={path}: {error}") from error
    if not isinstance(content, dict):
        raise StoreError(f"mooncake: {CONFIG_PATH_VARIABLE}={path}: wants a JSON object")
    return content


def _checked(source: str, values: Mapping[str, Any], num_ranks: int) -> MooncakeConfig:
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in _VARIABLES:
            raise StoreError(f"mooncake: {source}: unknown key {key!r}; known are {', '.join(sorted(_VARIABLES))}")
        try:
            checked[key] = _value(key, value)
        except ValueError as error:
            raise StoreError(f"mooncake: {source}: {key} is {value!r}: {error}") from error
    checked.pop(
        "master_metrics_port", None
    )  # SGLang polls it to see that the store is up; `check_server` asks the master
    checked["global_segment_size"] = checked.get("global_segment_size", 0) // num_ranks
    checked["local_hostname"] = checked.get("local_hostname") or listen_host("") or "127.0.0.1"
    if ":" not in checked.get("master_server_address", ""):
        raise StoreError(f"mooncake: {source}: master_server_address wants host:port")
    return MooncakeConfig(**checked)


def _value(key: str, value: object) -> object:
    if key.endswith("_size"):
        return parse_size(value)
    if key == "check_server":
        text = str(value).lower()
        if text not in (*_YES, *_NO):
            raise ValueError("wants true or false")
        return text in _YES
    if key == "master_metrics_port":
        return value
    if not isinstance(value, str):
        raise ValueError("wants a text")
    return value
