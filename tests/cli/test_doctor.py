"""pytest tests/cli/test_doctor.py"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tomllib
from copy import deepcopy

import pytest

from minga.cli import doctor
from minga.runtime import machine

HEALTHY = {
    "platform": "Linux",
    "python": "3.11.7",
    "cpu": {"name": "EPYC", "cores": 2, "simd": ["avx2", "fma"]},
    "memory": {"total": 32 * 10**9, "free": 24 * 10**9},
    "disk": {"free": 80 * 10**9},
    "gpu": None,
    "compiler": {"command": "c++", "version": "c++ 12"},
    "versions": dict.fromkeys(machine.PACKAGES, "1.0") | {"torch": f"{doctor.TORCH}+cpu"},
    "commit": None,
}


@pytest.fixture
def found(monkeypatch) -> dict:
    """A healthy machine, which a test may make ill."""
    found = deepcopy(HEALTHY)
    monkeypatch.setattr(machine, "describe", lambda: found)
    monkeypatch.setattr(machine, "nvidia_card", lambda: None)
    return found


def run(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    args = parser.parse_args(["doctor", *flags])
    return args.run(args)


def checks(found, folder=None) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine(found, folder)}


def test_a_healthy_machine_ends_with_zero_and_no_advice(found, capsys):
    assert run("--quick") == 0
    out = capsys.readouterr().out
    assert "nothing essential is missing" in out
    assert "->" not in out
    assert "GFLOP/s" not in out


def test_this_machine_as_json_is_one_document(capsys):
    status = run("--quick", "--json")
    document = json.loads(capsys.readouterr().out)
    assert status == (0 if document["ok"] else 1)
    assert document["speed"] is None
    assert document["machine"]["cpu"]["cores"] >= 1
    assert {"name", "found", "ok", "essential", "mend"} == set(document["checks"][0])


def test_the_measurement_is_shown(found, capsys, monkeypatch):
    monkeypatch.setattr(
        doctor, "measure", lambda free: {"threads": 2, "gemm_gflops": 138.2, "read_gb_per_second": 41.94}
    )
    assert run() == 0
    assert "138 GFLOP/s float32, 41.9 GB/s read (2 threads)" in capsys.readouterr().out


def test_the_measurement_gives_positive_speeds():
    speed = doctor.measure(64 * 2**20, seconds=0.01)
    assert speed["gemm_gflops"] > 0
    assert speed["read_gb_per_second"] > 0


@pytest.mark.parametrize(
    ("part", "value", "name", "mend"),
    [
        ("versions", {"torch": None}, "torch", f"pip install torch=={doctor.TORCH}"),
        ("versions", {"torch": "1.13.1"}, "torch", f"pip install torch=={doctor.TORCH}"),
        ("versions", {"tokenizers": None}, "packages", "pip install tokenizers"),
    ],
)
def test_what_is_essential_ends_with_one(found, capsys, part, value, name, mend):
    found[part] = {k: v for k, v in (found[part] | value).items() if v is not None}
    assert run("--quick") == 1
    out = capsys.readouterr().out
    assert f"MISS  {name}" in out
    assert f"-> {mend}" in out
    assert f"missing: {name}" in out


def test_an_old_python_is_missing(found, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 2))
    check = checks(found)["Python"]
    assert (check.ok, check.essential) == (False, True)
    assert check.mend == "install Python 3.11 or newer"


def test_a_torch_that_does_not_load_is_missing_and_nothing_is_measured(found, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch raises ImportError
    assert run() == 1
    assert "does not load" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_missing(found, tmp_path):
    tmp_path.chmod(0o500)
    assert not checks(found, tmp_path)["folder"].ok


def test_a_folder_that_is_gone_is_missing(found, tmp_path):
    check = checks(found, tmp_path / "gone")["folder"]
    assert (check.ok, check.essential) == (False, True)


@pytest.mark.parametrize(
    ("change", "name", "mend"),
    [
        ({"compiler": None}, "C++ compiler", ""),
        ({"cpu": {"name": None, "cores": 1, "simd": []}}, "processor", "AVX2"),
        ({"memory": {"total": 2 * 10**9, "free": 10**9}}, "memory", "close other programs"),
        ({"disk": {"free": 10**9}}, "disk", "free some space"),
        (
            {"versions": {k: v for k, v in HEALTHY["versions"].items() if k not in ("uvicorn", "starlette")}},
            "extra serve",
            "[serve]",
        ),
        ({"versions": {k: v for k, v in HEALTHY["versions"].items() if k != "ruff"}}, "extra dev", "[dev]"),
    ],
)
def test_what_is_not_essential_is_a_note(found, capsys, change, name, mend):
    found |= change
    assert run("--quick") == 0
    assert f"note  {name}" in capsys.readouterr().out
    assert mend in checks(found)[name].mend


def test_a_working_folder_that_was_removed_is_missing(found, tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run("--quick") == 1
    assert "missing: folder" in capsys.readouterr().out


def test_it_looks_for_what_the_package_declares():
    with (machine.CHECKOUT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert f"torch=={doctor.TORCH}" in project["dependencies"]
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor.PYTHON))

    def names(requirements: list[str]) -> set[str]:
        return {re.match(r"[\w-]+", line)[0] for line in requirements} - {"torch", "minga"}

    assert names(project["dependencies"]) == set(doctor.CORE)
    for extra, packages in doctor.EXTRAS.items():
        assert names(project["optional-dependencies"][extra]) == set(packages)
        assert set(packages) <= set(machine.PACKAGES)


def test_what_is_not_known_is_no_fault(found):
    found |= {"memory": {"total": None, "free": None}, "disk": {"free": None}}
    assert checks(found)["memory"].ok
    assert checks(found)["disk"].found == "not known"


def test_a_gpu_is_named_and_wants_triton(found):
    found["gpu"] = {"name": "H200", "memory": 141 * 10**9, "count": 8, "capability": "9.0"}
    del found["versions"]["triton"]
    assert checks(found)["GPU"].found == "8 x H200, 141.0 GB"
    assert checks(found)["Triton"].mend == "pip install triton"


def test_an_apple_gpu_wants_no_triton(found):
    found["gpu"] = {"name": "Apple GPU", "memory": None, "count": 1, "capability": None}
    del found["versions"]["triton"]
    assert checks(found)["Triton"].ok


def test_a_card_that_torch_cannot_use_is_a_note(found, monkeypatch):
    monkeypatch.setattr(machine, "nvidia_card", lambda: "RTX 4090")
    check = checks(found)["GPU"]
    assert not check.ok
    assert "RTX 4090" in check.found
    assert check.mend.startswith("pip install")


def test_every_failed_check_has_a_mend_and_no_other(found):
    found |= {"compiler": None, "disk": {"free": 0}, "versions": {}}
    for check in doctor.examine(found):
        assert bool(check.mend) != check.ok, check
