"""Every CUDA kernel compiles for the devices that it is meant for, without warnings, spills and a GPU."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsecoll.cuda import source
from sparsecoll.cuda.kernels import Kernels
from sparsecoll.cuda.tables import CASTS
from sparsecoll.errors import BackendUnavailable
from sparsecoll.native import REDUCIBLE

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ARCHS = [80, 90]
compiled = cache(source.compile_kernels)


class Recorder:
    """A launcher that notes which kernels are asked for."""

    num_multiprocessors = 132

    def __init__(self) -> None:
        self.launched: set[tuple[str, str]] = set()

    def launch(
        self, name: str, kernel: str, grid: int, block: int, shared: int, arguments: NDArray[np.int64], stream: int
    ) -> None:
        self.launched.add((name, kernel))


def launched() -> set[tuple[str, str]]:
    """File and name of all kernels that `Kernels` can ask for, at addresses that nobody reads."""
    recorder = Recorder()
    kernels = Kernels(recorder)
    for word in (16, 8, 4, 2, 1):
        kernels.permute_rows(16, 16, 16, 4, word, 0)
    for address in (16, 2):
        for dtype in ("float32", "float64", "bfloat16", "float16"):
            kernels.combine(address, 16, 16, 16, 1, 1, 8, dtype, 0)
            kernels.combine_backward(address, 16, 16, 16, 16, 16, 1, 1, 8, dtype, 0)
    for dtype in REDUCIBLE:
        kernels.sum_replicas(16, 1, [16], dtype, 0)
    for dtypes in [*CASTS, ("uint8", "uint8")]:
        kernels.pack(16, 1, [16, 16], *dtypes, 0)
    for num_assignments in (8, 1 << 20):
        kernels.sort_by_expert(16, num_assignments, 8, 16, 16, 16, 16, 0)
    return recorder.launched


def defined() -> set[tuple[str, str]]:
    return {
        (path.stem, name)
        for path in CSRC.glob("*.cu")
        for name in re.findall(r"^SPARSECOLL_KERNEL\((\w+),", path.read_text(), re.MULTILINE)
    }


def assembly(name: str, arch: int) -> tuple[dict[str, str], str]:
    """PTX by kernel, and what the assembler says of registers."""
    from cupy.cuda import nvrtc

    text, headers = source._read(name)
    program = nvrtc.createProgram(text, f"{name}.cu", list(headers.values()), [file.encode() for file in headers])
    nvrtc.compileProgram(program, [*source._OPTIONS, f"-arch=sm_{arch}", "--ptxas-options=-v"])
    ptx = nvrtc.getPTX(program)
    ptx = ptx.decode() if isinstance(ptx, bytes) else ptx
    entries = re.split(r"^\.visible \.entry ", ptx, flags=re.MULTILINE)[1:]
    return {entry.partition("(")[0]: entry for entry in entries}, nvrtc.getProgramLog(program)


def test_the_installed_text_is_that_of_the_sources() -> None:
    """If this fails, install again: pip install -e ."""
    installed = {path.name: path.read_text() for path in source.kernels_folder().iterdir()}
    assert installed == {path.name: path.read_text() for path in CSRC.glob("*.cu*")}
    assert {path.stem for path in CSRC.glob("*.cu")} == set(source.SOURCES)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", source.SOURCES)
def test_every_file_compiles_and_holds_what_is_launched(name: str, arch: int) -> None:
    code = compiled(name, arch)
    assert code[:4] == b"\x7fELF"
    kernels = [kernel for file, kernel in launched() if file == name]
    assert kernels
    for kernel in kernels:
        assert f".text.{kernel}\0".encode() in code


def test_no_kernel_is_without_a_caller() -> None:
    assert defined() == launched()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", source.SOURCES)
def test_wide_kernels_keep_loads_in_flight_and_registers_in_place(name: str, arch: int) -> None:
    """Four loads of 16 bytes, or eight of eight where the other side is wider, without a branch or store between."""
    entries, log = assembly(name, arch)
    assert set(entries) == {kernel for file, kernel in defined() if file == name}
    for kernel, entry in entries.items():
        if re.search(r"wide|sum_replicas|permute_rows_16|pack_copy|pack_float32", kernel):
            assert loads_in_flight(entry, "v4.u32") >= 4
        elif kernel.startswith("pack"):
            assert loads_in_flight(entry, "u64") >= 8
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= len(entries) and set(spills) == {("0", "0", "0")}


def loads_in_flight(entry: str, kind: str) -> int:
    """The longest run of such loads that nothing else of its kind interrupts."""
    longest = run = 0
    for line in entry.splitlines():
        if f"ld.global.{kind} " in line:
            run += 1
            longest = max(longest, run)
        elif re.search(r"st\.global|bra|^\$", line):
            run = 0
    return longest


def test_code_is_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = source.cached_kernels("permute_rows", 90, tmp_path / "new")
    (kept,) = (tmp_path / "new").iterdir()
    assert kept.read_bytes() == first
    monkeypatch.setattr(source, "compile_kernels", lambda name, arch: b"compiled again")
    assert source.cached_kernels("permute_rows", 90, tmp_path / "new") == first
    assert source.cached_kernels("permute_rows", 80, tmp_path / "new") == b"compiled again"
    (tmp_path / "file").touch()
    assert source.cached_kernels("permute_rows", 90, tmp_path / "file") == b"compiled again"


def test_without_cupy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(BackendUnavailable, match=r"sparsecoll\[cuda13\]"):
        source.compile_kernels("permute_rows", 90)


def test_a_broken_kernel_is_refused_with_what_the_compiler_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "kernels_folder", lambda: tmp_path)
    (tmp_path / "odd.cu").write_text('extern "C" __global__ void odd(long long* p) { int unused; *q = 1; }')
    with pytest.raises(BackendUnavailable, match=r'odd.cu.*sm_90(.|\n)*"q" is undefined'):
        source.compile_kernels("odd", 90)
    (tmp_path / "odd.cu").write_text('extern "C" __global__ void odd(long long* p) { int unused; *p = 1; }')
    with pytest.raises(BackendUnavailable, match=r"a warning\n(.|\n)*unused"):
        source.compile_kernels("odd", 90)
