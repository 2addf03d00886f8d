"""`--hicache-storage-backend dynamic`: a third party's store, named by module and class in the extra config (as SGLang does).

The class follows `base.Store` and is opened as `Class(StoreConfig)`. Whoever may set flags may run code: nothing else is checked
than that the class has the methods, so that a mistake is found at the start and not at the first page.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from baton.kvcache.stores.base import Store, StoreConfig, StoreError

_KEYS = ("backend_name", "module_path", "class_name")
_METHODS = {"register": 1, "batch_exists": 1, "batch_get": 2, "batch_put": 2, "clear": 0, "stats": 0, "close": 0}
"""Name and number of arguments of what `base.Store` asks for."""


def open_dynamic(config: StoreConfig) -> Store:
    """Raises `StoreError` when the extra config does not name a module and a class, or the class is no store. Further keys are
    handed to the class."""
    missing = [key for key in _KEYS if not isinstance(config.extra.get(key), str)]
    if missing:
        raise StoreError(f"dynamic: --hicache-storage-backend-extra-config wants the texts {', '.join(missing)}")
    if config.extra.get("interface_v1"):
        raise StoreError(
            "dynamic: interface_v1 (SGLang's tensors) is not served; the class follows baton.kvcache.stores.base.Store"
        )
    name, module_path, class_name = (config.extra[key] for key in _KEYS)
    where = f"dynamic: {name}: class_name {class_name!r} of module_path {module_path!r}"
    module = _import(module_path)
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        raise StoreError(f"{where}: there is no such class")
    for method, count in _METHODS.items():
        _check_method(where, found, method, count)
    rest = {key: value for key, value in config.extra.items() if key not in (*_KEYS, "interface_v1")}
    make: Callable[[StoreConfig], Any] = found
    try:
        store: Store = make(replace(config, extra=rest))
    except StoreError:
        raise
    except Exception as error:  # Their code: whatever it raises, the worker cannot start with it.
        raise StoreError(f"{where}: {type(error).__name__}: {error}") from error
    return store


def _import(module_path: str) -> ModuleType:
    """A dotted name, or the path of a .py file."""
    try:
        if not module_path.endswith(".py"):
            return importlib.import_module(module_path)
        spec = importlib.util.spec_from_file_location(Path(module_path).stem, module_path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # Their code again.
        raise StoreError(f"dynamic: module_path {module_path!r}: {type(error).__name__}: {error}") from error


def _check_method(where: str, found: type, method: str, count: int) -> None:
    function = getattr(found, method, None)
    if not callable(function):
        raise StoreError(f"{where}: has no method {method}")
    try:
        inspect.signature(function).bind(None, *range(count))
    except TypeError as error:
        raise StoreError(
            f"{where}: {method} wants other arguments than baton.kvcache.stores.base.Store: {error}"
        ) from error
