"""pytest tests/runtime/test_machine.py"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from minga.runtime import machine

X86 = """\
processor\t: 0
model name\t: AMD EPYC 9575F
flags\t\t: fpu sse sse2 sse4_2 avx avx2 fma f16c avx512f avx512_vnni

processor\t: 1
model name\t: AMD EPYC 9575F
flags\t\t: fpu sse sse2 sse4_2 avx avx2 fma f16c avx512f avx512_vnni
"""
ARM = """\
processor\t: 0
Features\t: fp asimd asimdhp asimddp i8mm bf16 sve
Model\t\t: Raspberry Pi 5
"""
MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the files of Linux")


def write(folder, files: dict[str, str]):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_describe_is_complete_and_survives_json():
    found = machine.describe()
    assert json.loads(json.dumps(found)) == found
    assert set(found) >= {"platform", "python", "cpu", "memory", "disk", "gpu", "compiler", "versions", "commit"}
    assert found["cpu"]["cores"] >= 1
    assert found["versions"]["torch"].startswith("2.")
    assert 0 < found["memory"]["free"] <= found["memory"]["total"]
    assert found["disk"]["free"] > 0


def test_importing_it_does_not_import_torch():
    code = "import sys, minga.runtime.machine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@linux
@pytest.mark.parametrize(
    ("text", "name", "simd"),
    [
        (X86, "AMD EPYC 9575F", ["sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512_vnni"]),
        (ARM, "Raspberry Pi 5", ["asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"]),
    ],
)
def test_cpu_reads_name_and_flags(tmp_path, text, name, simd):
    write(tmp_path, {"cpuinfo": text})
    assert machine.cpu(tmp_path / "cpuinfo") == (name, simd)


@linux
def test_cpu_without_the_file_has_no_flags(tmp_path):
    assert machine.cpu(tmp_path / "missing")[1] == []


@linux
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "nonsense"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
    ],
)
def test_cores_are_cut_by_the_quota_of_a_container(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert machine.cores(write(tmp_path, files)) == expected


@linux
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (16_384_000_000, 8_192_000_000)),
        ({"memory.max": "max"}, (16_384_000_000, 8_192_000_000)),
        ({"memory.max": "4000000000", "memory.current": "1000000000"}, (4_000_000_000, 3_000_000_000)),
        ({"memory.max": "15000000000", "memory.current": "1000000000"}, (15_000_000_000, 8_192_000_000)),
        (  # files that it has read and no longer uses
            {
                "memory.max": "4000000000",
                "memory.current": "3500000000",
                "memory.stat": "anon 1\ninactive_file 3000000000\nactive_file 7",
            },
            (4_000_000_000, 3_500_000_000),
        ),
        (
            {"memory/memory.limit_in_bytes": "4000000000", "memory/memory.usage_in_bytes": "5000000000"},
            (4_000_000_000, 0),
        ),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, (16_384_000_000, 8_192_000_000)),
    ],
)
def test_memory_is_cut_by_the_limit_of_a_container(tmp_path, files, expected):
    folder = write(tmp_path, {"meminfo": MEMINFO, **files})
    assert machine.memory(folder / "meminfo", folder) == expected


@linux
def test_memory_that_cannot_be_read_is_not_guessed(tmp_path):
    assert machine.memory(tmp_path / "missing", tmp_path) == (None, None)


def test_the_first_compiler_that_answers_wins(tmp_path, monkeypatch):
    broken = write(tmp_path, {"c++": "#!/bin/sh\nexit 1\n", "g++": "#!/bin/sh\necho g++ 99\necho more\n"})
    for name in ("c++", "g++"):
        (broken / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert machine.compiler() == {"command": "g++", "version": "g++ 99"}


def test_no_compiler_and_no_card_on_an_empty_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert machine.compiler() is None
    assert machine.nvidia_card() is None


def test_commit_of_a_checkout_and_of_none(tmp_path):
    assert machine.commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert machine.commit(tmp_path) is None  # no commit yet
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    found = machine.commit(tmp_path)
    assert found is not None
    assert len(found) == 40


def test_versions_list_only_what_is_installed():
    assert machine.version("no-such-package-of-ours") is None
    assert "numpy" in machine.versions()


def test_disk_of_a_folder_that_is_not_there(tmp_path):
    assert machine.free_disk(tmp_path / "missing") is None


def test_the_power_limit_of_all_processors(tmp_path):
    write(
        tmp_path,
        {
            "intel-rapl:0/name": "package-0\n",
            "intel-rapl:0/constraint_0_power_limit_uw": "125000000\n",
            "intel-rapl:0:0/name": "core\n",
            "intel-rapl:0:0/constraint_0_power_limit_uw": "90000000\n",
            "intel-rapl:1/name": "package-1\n",
            "intel-rapl:1/constraint_0_power_limit_uw": "125000000\n",
            "intel-rapl:2/name": "psys\n",
        },
    )
    assert machine.cpu_power_limit(tmp_path) == 250


def test_a_power_limit_that_is_none_or_not_known(tmp_path):
    assert machine.cpu_power_limit(tmp_path) is None
    write(tmp_path, {"intel-rapl:0/name": "package-0", "intel-rapl:0/constraint_0_power_limit_uw": "4095875000"})
    assert machine.cpu_power_limit(tmp_path) is None


@pytest.mark.parametrize(("printed", "watts"), [("450.00\n350.00\n", 800), ("[N/A]\n", None), (None, None)])
def test_the_power_limit_of_all_gpus(printed, watts, monkeypatch):
    monkeypatch.setattr(machine, "_output", lambda *command: printed)
    assert machine.gpu_power_limit() == watts
