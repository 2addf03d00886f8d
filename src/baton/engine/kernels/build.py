"""Builds the C kernels once per machine and finds them again.

The library lies in the user's cache directory under a name that is a hash of sources, flags and CPU, so a changed kernel
or another machine never meets an old build. Concurrent builders wait for one another; a build appears whole or not at
all. Not here: what the kernels do (csrc/) and how they are called (`native`).
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
# No contraction of a * b + c by the compiler: the same source expression must round the same way in every function.
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
REQUIRED_CPU_FLAGS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"})
BUILD_TIMEOUT_S = 120.0


class KernelsUnavailableError(Exception):
    """The C kernels cannot run here; the text says why. The torch path serves instead."""


def default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "baton" / "kernels"


def build_library(cache_dir: Path | None = None, compiler: str | None = None) -> Path:
    """The path of the shared library, built now if this machine has none.

    `compiler`: name or path of a C compiler; default the first of cc, gcc, clang. Raises `KernelsUnavailableError`.
    """
    cpu = _cpu_model()
    cache = cache_dir or default_cache_dir()
    sources = sorted(SOURCES.glob("*.c"))
    digest = hashlib.sha256(repr((FLAGS, cpu)).encode())
    for file in sorted(SOURCES.iterdir()):
        if file.suffix in (".c", ".h"):
            digest.update(file.name.encode() + file.read_bytes())
    library = cache / f"{digest.hexdigest()[:20]}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{library.stem}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _compile(_find_compiler(compiler), sources, library)
    except OSError as error:
        raise KernelsUnavailableError(f"cannot write kernels to {cache}: {error}") from error
    return library


def _cpu_model() -> str:
    """Model name and flags of this CPU; raises when it lacks an instruction set that the kernels use."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise KernelsUnavailableError(
            f"the kernels need Linux on x86_64, this is {platform.system()} {platform.machine()}"
        )
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if not line.strip():
            break  # the first processor is enough
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    missing = REQUIRED_CPU_FLAGS - set(fields.get("flags", "").split())
    if missing:
        raise KernelsUnavailableError(f"this CPU has no {', '.join(sorted(missing))}")
    return f"{fields.get('model name')}/{fields.get('cpu family')}/{fields.get('model')}/{fields['flags']}"


def _find_compiler(compiler: str | None) -> str:
    for name in (compiler,) if compiler else ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return found
    raise KernelsUnavailableError("no C compiler found (looked for " + (compiler or "cc, gcc, clang") + ")")


def _compile(compiler: str, sources: list[Path], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        target = Path(scratch) / library.name
        command = [compiler, *FLAGS, "-o", str(target), *map(str, sources), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise KernelsUnavailableError(f"{compiler} took more than {BUILD_TIMEOUT_S:.0f} s") from error
        if done.returncode != 0:
            raise KernelsUnavailableError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        target.replace(library)
