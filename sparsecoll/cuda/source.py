"""The text of the CUDA kernels, installed beside the native module, and its compilation at run time.

[Note: own compilation] CuPy's RawModule would compile as well, but with subnormal numbers flushed to zero, which is not
what the CPU's kernels do. So its compiler is called directly, and machine code is kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparsecoll.errors import BackendUnavailable

__all__ = ["SOURCES", "cached_kernels", "compile_kernels", "default_cache", "kernels_folder"]

SOURCES = ("combine", "pack", "permute_rows", "sort_by_expert", "sum_replicas")
"""Names of the files that hold kernels."""

# Contraction to fused multiply-add would give other bits than the CPU's kernels.
_OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true")


def kernels_folder() -> Path:
    """Where ``*.cu`` and ``*.cuh`` are installed: beside the native module, in a wheel and in an editable install."""
    spec = find_spec("sparsecoll._native")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "kernels"


def compile_kernels(name: str, arch: int) -> bytes:
    """Machine code of all kernels of a file, in some tenths of a second to two seconds; needs no GPU.

    Args:
        name: one of `SOURCES`.
        arch: compute capability without its dot: 80, 90.

    Raises:
        BackendUnavailable: CuPy is not installed, or its compiler refuses the kernels or warns of them.
    """
    nvrtc = _compiler()
    text, headers = _read(name)
    program = nvrtc.createProgram(text, f"{name}.cu", list(headers.values()), [file.encode() for file in headers])
    try:
        failure = ""
        try:
            nvrtc.compileProgram(program, [*_OPTIONS, f"-arch=sm_{arch}"])
        except nvrtc.NVRTCError as error:
            failure = str(error)
        log = nvrtc.getProgramLog(program).strip("\0 \n")
        if failure or log:
            raise BackendUnavailable(
                f"compile_kernels: expected {name}.cu to compile for sm_{arch}, got {failure or 'a warning'}\n{log}"
            )
        return bytes(nvrtc.getCUBIN(program))
    finally:
        nvrtc.destroyProgram(program)


def default_cache() -> Path:
    """The folder that keeps machine code from one process to the next. It may be deleted at any time."""
    return Path("~/.cache/sparsecoll").expanduser()


def cached_kernels(name: str, arch: int, cache: Path) -> bytes:
    """`compile_kernels`, or what it gave before for the same text, options and compiler.

    Args:
        cache: folder to read from and write to; where that is not allowed, nothing is kept.
    """
    text, headers = _read(name)
    key = repr((text, headers, _OPTIONS, arch, _compiler().getVersion()))
    path = cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        code = compile_kernels(name, arch)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Other processes see the whole file or none.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            (Path(folder) / path.name).write_bytes(code)
            (Path(folder) / path.name).replace(path)
    except OSError:
        pass
    return code


def _read(name: str) -> tuple[str, dict[str, bytes]]:
    folder = kernels_folder()
    return (folder / f"{name}.cu").read_text(), {file.name: file.read_bytes() for file in sorted(folder.glob("*.cuh"))}


def _compiler() -> Any:
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        raise BackendUnavailable(
            f"compile_kernels: expected CuPy, which pip install 'sparsecoll[cuda13]' brings, got: {error}"
        ) from None
    return nvrtc
