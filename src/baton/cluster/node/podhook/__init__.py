"""The library that is preloaded into programs of pods (`podhook.c` says what for), built once per machine.

Not here: the same for Python programs (`pyhook`).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("podhook.c")
_FLAGS = ("-O2", "-shared", "-fPIC", "-Wall", "-ldl")
_BUILD_TIMEOUT_S = 30.0


@functools.cache
def library(cache: Path) -> Path | None:
    """The built library in `cache`, where it stays. None, with a logged reason, when it cannot be built: programs that bind all
    addresses in C then do so."""
    target = cache / f"podhook-{hashlib.sha256(repr(_FLAGS).encode() + SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    try:
        if compiler is None:
            raise OSError("no C compiler (cc, gcc, clang)")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            part = os.path.join(scratch, target.name)  # noqa: PTH118  (a path for the compiler)
            subprocess.run(
                [compiler, "-o", part, str(SOURCE), *_FLAGS],
                check=True, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S,
            )  # fmt: skip
            Path(part).replace(target)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning(
            "C programs of pods will listen on all addresses where they ask for them, and know no names in plain isolation: %s",
            detail,
        )
        return None
    return target
