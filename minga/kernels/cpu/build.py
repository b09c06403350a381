"""Compiles the kernels at first use, for the very machine they run on, and opens the result.

`load()` compiles `kernels.cpp` (training) and `net.cpp` (the engine) with the machine's C++ compiler (some seconds, once;
the result is kept in the user's cache folder) and returns whether the kernels are there. Without a compiler everything
runs on torch's own operations, slower, and that is said once. Training and the engine call `load`; nothing else makes
anyone wait for a compiler. CXX names another compiler, CXXFLAGS adds to its flags.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

UNITS = ("kernels.cpp", "net.cpp")
HEADERS = ("vectors.h", "gemm.h", "panels.h")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-Wno-psabi")

_library: ctypes.CDLL | None = None
_tried = False


def load(note: Callable[[str], None] = lambda line: None, *, keep_memory: bool = True) -> bool:
    """Whether the kernels can be used; compiles them the first time. `note` receives a line if they cannot be had.

    keep_memory: this process trains, and frees what it will need again in the next step (see kernels.cpp).
    """
    global _library, _tried
    if not _tried:
        _tried = True
        try:
            _library = _open(note)
        except (OSError, subprocess.SubprocessError) as error:
            note(f"no compiled kernels ({_reason(error)}): torch's own operations are used, which are slower")
    if _library is not None and keep_memory:
        _library.minga_keep_memory()
    return _library is not None


def available() -> bool:
    """Whether `load` has been called, with success."""
    return _library is not None


def call(name: str, *arguments: Tensor | ctypes.Structure | ctypes.Array[Any] | float | None) -> int:
    """Tensors and structures become pointers, whole numbers int64, others double; None is a null pointer.

    Returns what the function returns, which for most is nothing of meaning.
    """
    return int(_function(name)(*map(_as_c, arguments)))


@cache
def _function(name: str) -> Any:
    assert _library is not None
    function = getattr(_library, name)
    function.restype = ctypes.c_int64
    return function


def _open(note: Callable[[str], None]) -> ctypes.CDLL:
    path = _built(note)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # a damaged file in the cache must not stand in the way for ever
        path.unlink()
        return ctypes.CDLL(str(_built(note)))


def _as_c(argument: Tensor | ctypes.Structure | ctypes.Array[Any] | float | None) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, (ctypes.Structure, ctypes.Array)):
        return ctypes.byref(argument)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_double(argument)


def _built(note: Callable[[str], None]) -> Path:
    """The shared library for these sources, this compiler and this processor; compiled if it is not in the cache."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler: install g++ or clang++")
    folder = Path(__file__).parent
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    identity = hashlib.sha256(version + _processor().encode() + " ".join(flags).encode())
    for name in (*UNITS, *HEADERS):
        identity.update((folder / name).read_bytes())
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minga"
    library = kept / f"kernels-{identity.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    note("compiling the CPU kernels for this machine, once")
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept) as work:
        # Compiled with OpenMP but not linked with it: the calls find torch's own runtime, which is in the process
        # already. Two runtimes would be two pools of threads that wait for each other's cores.
        openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
        objects, linked = [str(Path(work) / f"{unit}.o") for unit in UNITS], Path(work) / "kernels.so"
        jobs = [
            subprocess.Popen(
                [compiler, *flags, *openmp, "-c", str(folder / unit), "-o", made],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for unit, made in zip(UNITS, objects, strict=True)
        ]
        for job in jobs:
            _, stderr = job.communicate(timeout=600)
            if job.returncode:
                raise subprocess.CalledProcessError(job.returncode, job.args, stderr=stderr)
        subprocess.run([compiler, "-shared", *objects, "-o", str(linked)], capture_output=True, check=True, timeout=600)
        os.replace(linked, library)  # whole or not there, also when two processes compile at once
    return library


def _processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared by machines of different kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return platform.machine() + "".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))
    except OSError:
        return platform.machine() + platform.processor() + platform.platform()


def _reason(error: BaseException) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in error.stderr.decode(errors="replace").splitlines() if "error" in line]
        return f"the C++ compiler refused: {lines[0][:160] if lines else error}"
    return str(error)
