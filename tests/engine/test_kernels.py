"""The C kernels on their own: linear layers against torch, and what happens where they cannot be built."""

import logging
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from baton.engine.kernels import build, native
from baton.engine.kernels.build import KernelsUnavailableError, build_library
from baton.engine.kernels.native import OUT_BF16, OUT_F32, OUT_SILU_MUL, PackedLinear, RowsStruct, load_kernels

needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no C kernels on this machine")


def run_linear(linear: PackedLinear, x: torch.Tensor, epilogue: int, num_threads: int = 2) -> torch.Tensor:
    kernels = load_kernels()
    assert kernels is not None
    y = torch.full((len(x), linear.n), float("nan"), dtype=torch.float32 if epilogue == OUT_F32 else torch.bfloat16)
    rows = RowsStruct(x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), len(x))
    kernels.bt_linear(byref(linear.struct), epilogue, byref(rows), num_threads)
    return y


def packed(weight: torch.Tensor, *, paired: bool = False) -> PackedLinear:
    kernels = load_kernels()
    assert kernels is not None
    return PackedLinear(kernels, weight, paired=paired)


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).bfloat16()


@needs_kernels
@pytest.mark.parametrize("rows", [*range(1, 15), 25, 100, 1000])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_that_of_torch(rows: int, bias: bool) -> None:
    weight, x, offset = random(77, 130, scale=0.1), random(rows, 130), random(77)
    linear = packed(weight)
    if bias:
        linear.set_bias(offset)
    expected = F.linear(x.double(), weight.double(), offset.double() if bias else None)
    torch.testing.assert_close(run_linear(linear, x, OUT_F32).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run_linear(linear, x, OUT_BF16).double(), expected, rtol=1e-2, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 7, 30])
@pytest.mark.parametrize("bias", [False, True])
def test_silu_of_gate_times_up(rows: int, bias: bool) -> None:
    weight, x, offset = random(2 * 41, 64, scale=0.3), random(rows, 64), random(2 * 41)
    linear = packed(weight, paired=True)
    if bias:
        linear.set_bias(offset)
    gate, up = F.linear(x.double(), weight.double(), offset.double() if bias else None).chunk(2, -1)
    torch.testing.assert_close(run_linear(linear, x, OUT_SILU_MUL).double(), F.silu(gate) * up, rtol=1e-2, atol=1e-3)


@needs_kernels
def test_silu_of_extreme_values() -> None:
    """exp overflows for a gate of -1000; the product is next to 0, not NaN."""
    weight = torch.eye(4, dtype=torch.bfloat16)
    x = torch.tensor([[-1000.0, 1000.0, 2.0, 3.0]], dtype=torch.bfloat16)
    y = run_linear(packed(weight, paired=True), x, OUT_SILU_MUL)
    torch.testing.assert_close(y.float(), torch.tensor([[0.0, 3000.0]]), rtol=4e-3, atol=1e-30)


@needs_kernels
def test_rows_do_not_depend_on_their_number_or_the_threads() -> None:
    linear, x = packed(random(100, 96, scale=0.1)), random(200, 96)
    whole = run_linear(linear, x, OUT_F32, num_threads=1)
    for rows in (1, 2, 11, 13, 64):
        for num_threads in (1, 2, 5):
            assert torch.equal(run_linear(linear, x[:rows], OUT_F32, num_threads), whole[:rows])


def test_build_failure_names_the_reason(tmp_path: Path) -> None:
    with pytest.raises(KernelsUnavailableError, match="no C compiler found"):
        build_library(tmp_path, compiler="no-such-compiler")


def test_a_compiler_that_fails_leaves_no_library(tmp_path: Path) -> None:
    if load_kernels() is None:
        pytest.skip("this CPU is refused before a compiler is asked")
    with pytest.raises(KernelsUnavailableError, match="failed"):
        build_library(tmp_path, compiler="false")
    assert not list(tmp_path.glob("*.so"))


def test_an_old_cpu_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "REQUIRED_CPU_FLAGS", frozenset({"avx512_of_the_future"}))
    with pytest.raises(KernelsUnavailableError, match="this CPU has no avx512_of_the_future"):
        build_library(tmp_path)


def test_without_kernels_one_note_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Path:
        raise KernelsUnavailableError("no C compiler found")

    monkeypatch.setattr(native, "build_library", fail)
    load_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert load_kernels() is None
            assert load_kernels() is None
    finally:
        load_kernels.cache_clear()
    (record,) = caplog.records
    assert "torch computes instead" in record.getMessage()


@pytest.fixture
def counting_compiler(tmp_path: Path) -> tuple[Path, Path]:
    """(a compiler that writes its output and a line into a log, the log)."""
    log, script = tmp_path / "compiler.log", tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\necho built >> {log}\nwhile [ "$1" != -o ]; do shift; done\necho library > "$2"\n')
    script.chmod(0o755)
    return script, log


@needs_kernels
def test_builders_wait_for_one_another_and_find_the_build(tmp_path: Path, counting_compiler: tuple[Path, Path]) -> None:
    script, log = counting_compiler
    with ThreadPoolExecutor(4) as executor:
        futures = [executor.submit(build_library, tmp_path / "cache", str(script)) for _ in range(4)]
        libraries = {future.result() for future in futures}
    assert len(libraries) == 1 and libraries.pop().read_text() == "library\n"
    assert log.read_text() == "built\n"
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.suffix not in (".so", ".lock")]


@needs_kernels
def test_changed_sources_are_built_anew(
    tmp_path: Path, counting_compiler: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "a.c").write_text("int a;")
    monkeypatch.setattr(build, "SOURCES", sources)
    first = build_library(tmp_path, str(counting_compiler[0]))
    (sources / "a.c").write_text("int b;")
    assert build_library(tmp_path, str(counting_compiler[0])) != first
