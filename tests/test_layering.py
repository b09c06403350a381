"""Imports point down, every module imports, and nothing heavy is loaded before it is used."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_ERROR, EXIT_STATUS_SUCCESS

import minga

ROOT = Path(__file__).parent.parent
HEAVY = {
    "jinja2",
    "numpy",
    "rich",
    "safetensors",
    "shtab",
    "starlette",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FLOORS = set(re.findall(r"\w+", " ".join(PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"])))
MODULES = [module.name for module in pkgutil.walk_packages(minga.__path__, "minga.")]


def _python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_imports_point_down() -> None:
    linted = _lint(ROOT)
    assert linted.returncode == EXIT_STATUS_SUCCESS, linted.stdout


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("config", "model"),  # up
        ("model", "data"),  # across
        ("errors", "cli"),
        ("attic", "errors"),  # a module without a floor
    ],
)
def test_the_contract_refuses(importer: str, imported: str, tmp_path: Path) -> None:
    """In an empty house with the real floors, and one import that should not be."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for module in FLOORS | {"__init__"}:
        _module(tmp_path, module, "")
    assert _lint(tmp_path).returncode == EXIT_STATUS_SUCCESS
    _module(tmp_path, importer, f"import minga.{imported}\n")
    done = _lint(tmp_path)
    assert done.returncode == EXIT_STATUS_ERROR
    assert "Imports point down BROKEN" in done.stdout


def _module(folder: Path, name: str, text: str) -> None:
    path = folder / "minga" / f"{name}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one has imported the real minga, and the linter switches off the loggers that are there."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name: str) -> None:
    if name.startswith("minga.kernels.gpu."):
        pytest.importorskip("triton", reason="Triton is not installed: pip install 'minga[gpu]'")
    assert importlib.import_module(name).__doc__, "a module says what it is for"


@pytest.mark.parametrize(
    "code",
    [
        "import minga",
        "import minga.config",
        "import minga.errors; minga.UserError; minga.ModelConfig; minga.__version__; dir(minga)",
        "from minga.cli.main import main; main([])",
        "from minga.cli.main import main; main(['tran'])",
        "from minga.cli.main import build_parser; build_parser()",
    ],
)
def test_loads_nothing_heavy(code: str) -> None:
    done = _python(f"{code}\nimport sys\nprint(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert HEAVY.isdisjoint(done.stdout.split())


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time\n"
        "from minga.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(time.process_time(), *sys.modules, file=sys.stderr)\n"
    )
    runs = [_python(code) for _ in range(3)]
    assert all(run.stdout.startswith("usage: minga") for run in runs)
    seconds, *modules = runs[0].stderr.split()
    assert HEAVY.isdisjoint(modules)
    assert min(float(run.stderr.split()[0]) for run in runs) <= 0.3, seconds


def test_public_names() -> None:
    assert set(minga.__all__) <= set(dir(minga))
    for name in minga.__all__:
        assert getattr(minga, name) is not None
    assert minga.__version__ == _version_in_pyproject()
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        minga.lod  # noqa: B018


def _version_in_pyproject() -> str:
    return PYPROJECT["project"]["version"]
