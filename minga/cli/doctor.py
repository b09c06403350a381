"""minga doctor: what this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minga.runtime import machine

DESCRIPTION = """\
Shows what this machine has and what Minga misses on it, with the command that mends it.
Ends with 0 if nothing essential is missing, else with 1."""

EXAMPLE = """\
examples:
  minga doctor
  minga doctor --quick --json
"""

PYTHON = (3, 11)
TORCH = "2.13.0"
CORE = ("numpy", "safetensors", "tokenizers", "jinja2", "rich", "shtab")
EXTRAS = {
    "serve": ("starlette", "uvicorn", "httptools", "uvloop", "pydantic", "llguidance", "prometheus-client"),
    "dev": (
        *("pytest", "pytest-cov", "pytest-timeout", "pytest-xdist", "hypothesis", "import-linter", "pre-commit"),
        *("ruff", "mypy", "transformers", "openai", "anthropic", "httpx", "jsonschema"),
    ),
}
GB = 10**9
ENOUGH_MEMORY, ENOUGH_DISK = 4 * GB, 5 * GB  # the demo's training takes under 2 GB of either
_COMPILERS = {
    "apt-get": "apt-get install g++",
    "dnf": "dnf install gcc-c++",
    "pacman": "pacman -S gcc",
    "apk": "apk add g++",
}


@dataclass(frozen=True)
class Check:
    """One line of the table. `mend` is empty exactly when `ok`; only an essential check decides the exit status."""

    name: str
    found: str
    ok: bool = True
    essential: bool = False
    mend: str = ""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="what this machine has and what is missing",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="leave out the measurement of speed (about a second)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    found = machine.describe()
    checks = examine(found)
    torch_works = all(check.ok for check in checks if check.name == "torch")
    speed = None if args.quick or not torch_works else measure(found["memory"]["free"])
    healthy = all(check.ok for check in checks if check.essential)
    if args.json:
        print(json.dumps({"ok": healthy, "checks": [asdict(c) for c in checks], "machine": found, "speed": speed}))
    else:
        print(in_words(checks, speed))
    return 0 if healthy else 1


# ---------------------------------------------------------------------- the checks


def examine(found: dict[str, Any], folder: Path | None = None) -> list[Check]:
    """Judges what `machine.describe` found. `folder` is where the user works (default: here)."""
    return [
        _python(),
        _torch(found["versions"].get("torch")),
        _packages(found["versions"]),
        _processor(found["cpu"]),
        _room("memory", found["memory"]["free"], found["memory"]["total"], ENOUGH_MEMORY, "close other programs"),
        _room("disk", found["disk"]["free"], None, ENOUGH_DISK, "free some space, or work in another folder"),
        _folder(folder or Path()),
        _gpu(found["gpu"]),
        _compiler(found["compiler"]),
        _triton(found["gpu"], found["versions"].get("triton")),
        *(_extra(name, found["versions"]) for name in EXTRAS),
    ]


def _python() -> Check:
    wanted = ".".join(map(str, PYTHON))
    ok = sys.version_info >= PYTHON
    mend = "" if ok else f"install Python {wanted} or newer"
    return Check("Python", platform.python_version(), ok, essential=True, mend=mend)


def _torch(version: str | None) -> Check:
    mend = f"pip install torch=={TORCH}"
    if version is None:
        return Check("torch", "not installed", ok=False, essential=True, mend=mend)
    try:
        import torch  # noqa: F401  installed is not enough: its libraries must load
    except (ImportError, OSError) as error:
        return Check("torch", f"{version} does not load: {error}", ok=False, essential=True, mend=mend)
    if version.partition("+")[0] != TORCH:
        return Check("torch", f"{version}, tested with {TORCH}", ok=False, essential=True, mend=mend)
    return Check("torch", version, essential=True)


def _packages(versions: dict[str, str]) -> Check:
    missing = [name for name in CORE if name not in versions]
    if missing:
        mend = f"pip install {' '.join(missing)}"
        return Check("packages", f"{', '.join(missing)} not installed", ok=False, essential=True, mend=mend)
    return Check("packages", ", ".join(f"{name} {versions[name]}" for name in CORE), essential=True)


def _processor(cpu: dict[str, Any]) -> Check:
    simd = " ".join(cpu["simd"])
    found = f"{cpu['name'] or platform.machine()}, {cpu['cores']} core{'s' * (cpu['cores'] != 1)}, {simd or 'no SIMD'}"
    if "avx2" in cpu["simd"] or "asimd" in cpu["simd"]:
        return Check("processor", found)
    return Check("processor", found, ok=False, mend="everything runs, slowly; a processor with AVX2 or NEON is faster")


def _room(name: str, free: int | None, total: int | None, enough: int, mend: str) -> Check:
    """Memory or disk; little of it is worth a word and stops nobody, since small models fit."""
    if free is None:
        return Check(name, "not known")
    found = f"{size(free)} free" + ("" if total is None else f" of {size(total)}")
    return Check(name, found) if free >= enough else Check(name, found, ok=False, mend=mend)


def _folder(folder: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Check("folder", f"{folder.absolute()} is writable", essential=True)
    except OSError as error:
        found = f"{folder}: {error.strerror}"
        return Check("folder", found, ok=False, essential=True, mend="cd to a folder of your own")


def _gpu(gpu: dict[str, Any] | None) -> Check:
    if gpu is not None:
        memory = "" if gpu["memory"] is None else f", {size(gpu['memory'])}"
        return Check("GPU", f"{gpu['count']} x {gpu['name']}{memory}")
    card = machine.nvidia_card()
    if card is None:
        return Check("GPU", "none (not needed)")
    mend = f"pip install --force-reinstall torch=={TORCH}"
    return Check("GPU", f"{card}, which this build of torch cannot use", ok=False, mend=mend)


def _compiler(compiler: dict[str, str] | None) -> Check:
    if compiler is None:
        return Check("C++ compiler", "none: compiled kernels are left out", ok=False, mend=_install_compiler())
    return Check("C++ compiler", f"{compiler['command']}: {compiler['version']}")


def _install_compiler() -> str:
    if sys.platform == "darwin":
        return "xcode-select --install"
    sudo = "" if os.geteuid() == 0 else "sudo "
    for manager, command in _COMPILERS.items():
        if shutil.which(manager):
            return sudo + command
    return "install g++ or clang++"


def _triton(gpu: dict[str, Any] | None, version: str | None) -> Check:
    if version is not None:
        return Check("Triton", version)
    if gpu is None or gpu["capability"] is None:
        return Check("Triton", "none (only CUDA and ROCm GPUs use it)")
    return Check("Triton", "none: GPU kernels are left out", ok=False, mend="pip install triton")


def _extra(name: str, versions: dict[str, str]) -> Check:
    missing = [package for package in EXTRAS[name] if package not in versions]
    if not missing:
        return Check(f"extra {name}", "installed")
    source = (
        f'-e "{machine.CHECKOUT}[{name}]"' if (machine.CHECKOUT / "pyproject.toml").exists() else f'"minga[{name}]"'
    )
    return Check(f"extra {name}", f"{', '.join(missing)} not installed", ok=False, mend=f"pip install {source}")


# ---------------------------------------------------------------------- the measurement


def measure(free: int | None, *, seconds: float = 0.5) -> dict[str, float]:
    """Best of repeated runs, `seconds` each: float32 matrix product and a read of main memory."""
    import torch

    side = 1024
    a, b = torch.randn(side, side), torch.randn(side, side)
    words = min(256 * 2**20, (free or 2**30) // 8) // 4  # well beyond any cache, and never the machine's last bytes
    block = torch.ones(words)
    return {
        "threads": torch.get_num_threads(),
        "gemm_gflops": 2 * side**3 / _best_time(lambda: torch.mm(a, b), seconds) / 1e9,
        "read_gb_per_second": 4 * words / _best_time(block.sum, seconds) / 1e9,
    }


def _best_time(work: Callable[[], object], seconds: float) -> float:
    work()  # the first run pays for threads and buffers
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


# ---------------------------------------------------------------------- in words


def in_words(checks: list[Check], speed: dict[str, float] | None) -> str:
    width = max(len(check.name) for check in checks) + 2
    lines = []
    for check in checks:
        mark = "ok  " if check.ok else "MISS" if check.essential else "note"
        lines.append(f"{mark}  {check.name:<{width}}{check.found}")
        if check.mend:
            lines.append(f"{'':{width + 6}}-> {check.mend}")
    if speed is not None:
        found = f"{speed['gemm_gflops']:.0f} GFLOP/s float32, {speed['read_gb_per_second']:.1f} GB/s read"
        lines.append(f"ok    {'speed':<{width}}{found} ({speed['threads']:.0f} threads)")
    missing = [check.name for check in checks if check.essential and not check.ok]
    lines.append(f"\nmissing: {', '.join(missing)}" if missing else "\nnothing essential is missing")
    return "\n".join(lines)


def size(count: int) -> str:
    return f"{count / GB:.1f} GB"
