"""What this machine has. `describe()` gives it as one dictionary, for run logs, benchmarks and `minga doctor`.

Sizes are bytes. What cannot be found out is None, never a guess. Containers count: cores and memory are what this
process may use, not what the host has. torch is imported late, only to ask it for a GPU.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

PACKAGES = (
    *("minga", "torch", "numpy", "safetensors", "tokenizers", "jinja2", "rich", "shtab", "triton"),
    *("starlette", "uvicorn", "httptools", "uvloop", "pydantic", "llguidance", "prometheus-client"),
    *("transformers", "openai", "anthropic", "httpx", "jsonschema"),
    *("ruff", "mypy", "import-linter", "pre-commit"),
    *("pytest", "pytest-cov", "pytest-timeout", "pytest-xdist", "hypothesis", "gguf", "llama-cpp-python"),
)
# the instructions that kernels are chosen by: x86 names, then Arm names as Linux spells them
SIMD = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
_APPLE_SIMD = {
    "AdvSIMD": "asimd",
    "FEAT_FP16": "asimdhp",
    "FEAT_DotProd": "asimddp",
    "FEAT_I8MM": "i8mm",
    "FEAT_BF16": "bf16",
    "FEAT_SME": "sme",
}
CHECKOUT = Path(__file__).resolve().parents[2]  # or what holds the package, when it is installed
_NO_LIMIT = 2**60  # version 1 control groups write "no limit" as a number of this size
_NO_POWER_LIMIT = 1000.0  # watts; boards that set no limit on a processor write 4095
_SECONDS = 10.0  # for programs that are only asked for their version


def describe(folder: Path | None = None) -> dict[str, Any]:
    """Everything below, in one JSON-able dictionary. `folder` is where free disk is measured (default: here)."""
    name, simd = cpu()
    total, free = memory()
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": {"name": name, "cores": cores(), "simd": simd},
        "memory": {"total": total, "free": free},
        "disk": {"free": free_disk(folder or Path())},
        "gpu": gpu(),
        "compiler": compiler(),
        "versions": versions(),
        "commit": commit(),
    }


def cores(control_groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: its affinity, cut by a container's quota (2.5 cores of quota are 2)."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota, _, period = _text(control_groups / "cpu.max").partition(" ")
    if not period:
        quota = _text(control_groups / "cpu/cpu.cfs_quota_us")
        period = _text(control_groups / "cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period):
        allowed = min(allowed, max(1, int(quota) // int(period)))
    return allowed


def memory(
    meminfo: Path = Path("/proc/meminfo"), control_groups: Path = Path("/sys/fs/cgroup")
) -> tuple[int | None, int | None]:
    """(total, free) bytes of main memory. Free counts file caches, which the system gives up when asked."""
    if sys.platform == "darwin":
        return _apple_memory()
    kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(meminfo), re.MULTILINE))
    total, free = (int(kilobytes[key]) * 1024 if key in kilobytes else None for key in ("MemTotal", "MemAvailable"))
    for limit_file, usage_file, parts_file, idle in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        limit, usage = _text(control_groups / limit_file), _text(control_groups / usage_file)
        if limit.isdigit() and int(limit) < _NO_LIMIT:
            total = min(int(limit), total or int(limit))
            if usage.isdigit():
                cached = re.search(rf"^{idle} (\d+)$", _text(control_groups / parts_file), re.MULTILINE)
                left = max(0, int(limit) - int(usage) + (int(cached[1]) if cached else 0))
                free = left if free is None else min(left, free)
    return total, free


def free_memory(device: Any) -> int:
    """Bytes that a torch device has free, 2 GiB where the system does not say."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return memory()[1] or 2 * 2**30


def memory_used() -> tuple[int | None, int | None]:
    """Bytes that this process holds: (main memory, the GPU's by torch; None without one)."""
    pages = _text(Path("/proc/self/statm")).split()
    resident = int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else _peak_memory()
    import torch

    return resident, torch.cuda.memory_allocated() if torch.cuda.is_available() else None


def gemm_peak(size: int = 1024, repeats: int = 5, product: Callable[[Any, Any], Any] | None = None) -> float:
    """FLOP/s of the best of a few float32 products of two square matrices, on the GPU if torch has one.

    product: another way to multiply a by the transpose of b, whose peak is asked for.

    What utilisation is measured against: it is reached here, with this number of threads, and not a data sheet's. On an
    NVIDIA GPU it is full float32 unless torch is allowed TF32. Draws no random number, so a run is the same without it.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size *= 8 if device.type == "cuda" else 1
    a = torch.linspace(-1, 1, size * size, device=device).view(size, size)
    best = float("inf")
    for _ in range(repeats + 1):
        began = perf_counter()
        result = a @ a.T if product is None else product(a, a)
        float(result[0, 0])  # waits for a GPU
        best = min(best, perf_counter() - began)
    return 2 * size**3 / best


def free_disk(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str | None, list[str]]:
    """The processor's name and which of `SIMD` it has."""
    if sys.platform == "darwin":
        return _apple_cpu()
    text = _text(cpuinfo)
    name = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    found = set(flags[1].split()) if flags else set()
    return (name[1].strip() if name else platform.processor() or None), [flag for flag in SIMD if flag in found]


def gpu() -> dict[str, Any] | None:
    """The first GPU that torch can use and how many there are, or None."""
    try:
        import torch
    except (ImportError, OSError):  # OSError: a shared library of torch does not load
        return None
    if torch.cuda.is_available():
        first = torch.cuda.get_device_properties(0)
        capability = f"{first.major}.{first.minor}"
        count = torch.cuda.device_count()
        return {"name": first.name, "memory": first.total_memory, "count": count, "capability": capability}
    if torch.backends.mps.is_available():
        return {"name": "Apple GPU", "memory": None, "count": 1, "capability": None}
    return None


def nvidia_card() -> str | None:
    """The name of an NVIDIA card as its driver gives it, whether or not torch can use it."""
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return names.splitlines()[0].strip() if names else None


def cpu_power_limit(powercap: Path = Path("/sys/class/powercap")) -> float | None:
    """Watts that the processors may draw for long, by Intel's RAPL. Reading what they draw takes root's rights."""
    total = 0.0
    for zone in sorted(powercap.glob("intel-rapl:*")):
        limit = _text(zone / "constraint_0_power_limit_uw")
        if _text(zone / "name").startswith("package") and limit.isdigit() and int(limit) / 1e6 < _NO_POWER_LIMIT:
            total += int(limit) / 1e6
    return total or None


def gpu_power_limit() -> float | None:
    """Watts that all NVIDIA cards together may draw, by their driver."""
    limits = (_output("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits") or "").split()
    numbers = [float(limit) for limit in limits if re.fullmatch(r"\d+(\.\d+)?", limit)]
    return sum(numbers) or None


def compiler() -> dict[str, str] | None:
    """The first C++ compiler that answers: `CXX`, then the usual names."""
    for command in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        version = _output(*command.split(), "--version") if command.strip() else None
        if version:
            return {"command": command, "version": version.splitlines()[0].strip()}
    return None


def version(package: str) -> str | None:
    """The installed version of a package, or None. Nothing is imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Of `PACKAGES`, those that are installed."""
    return {package: found for package in PACKAGES if (found := version(package)) is not None}


def commit(checkout: Path = CHECKOUT) -> str | None:
    """The git commit of the checkout that runs, or None for an installed package."""
    if not (checkout / ".git").exists():  # a folder above an installed package may be somebody else's repository
        return None
    return _output("git", "-C", str(checkout), "rev-parse", "--verify", "HEAD")


def _apple_cpu() -> tuple[str | None, list[str]]:
    name = _output("sysctl", "-n", "machdep.cpu.brand_string")
    arm = _output("sysctl", "hw.optional") or ""
    found = {ours for theirs, ours in _APPLE_SIMD.items() if re.search(rf"\b{theirs}: 1$", arm, re.MULTILINE)}
    intel = _output("sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features") or ""
    spelled = {"sse4.2": "sse4_2", "avx1.0": "avx"}
    found |= {spelled.get(flag, flag) for flag in intel.lower().split()}
    return name, [flag for flag in SIMD if flag in found]


def _peak_memory() -> int | None:
    """Where the system does not tell what is held now: the most that has been."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _apple_memory() -> tuple[int | None, int | None]:
    total, pages = _output("sysctl", "-n", "hw.memsize"), _output("vm_stat") or ""
    size = re.search(r"page size of (\d+) bytes", pages)
    counts = [int(n) for n in re.findall(r"^Pages (?:free|inactive|speculative):\s+(\d+)\.", pages, re.MULTILINE)]
    free = int(size[1]) * sum(counts) if size and counts else None
    return (int(total) if total and total.isdigit() else None), free


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _output(*command: str) -> str | None:
    """What a program prints, or None if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
