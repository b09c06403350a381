"""pytest tests/cli/test_bench.py"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minga.cli import bench
from minga.cli.main import main


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Runs `minga bench ...` with a script in the benchmark's place; (exit code, the arguments that it was given)."""
    script = tmp_path / "train.py"
    script.write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\nsys.exit(3)\n")
    monkeypatch.setattr(bench, "script", lambda name: script)

    def run(*args: str) -> tuple[int, list[str]]:
        status = main(["bench", *args])
        return status, json.loads(capfd.readouterr().out)

    return run


def test_the_script_gets_the_flags_and_its_exit_code_is_ours(told) -> None:
    flags = ["--json", "--quick", "--only", "train/mfu", "--data", "d", "--minutes", "2.0", "--threads", "1"]
    assert told("train", *flags) == (3, flags)
    assert told("train") == (3, [])


def test_the_model_comes_last(told) -> None:
    assert told("engine", "--model", "runs/demo", "--json") == (3, ["--json", "runs/demo"])


@pytest.mark.parametrize("name", bench.BENCHES)
def test_every_benchmark_is_there_and_named_in_the_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.script(name).is_file()
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert bench.BENCHES[name] in capsys.readouterr().out


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["bench", "trian"]) == 2
    assert main(["bench", "train", "--quik"]) == 2
    monkeypatch.setitem(bench.BENCHES, "gone", "a benchmark whose script is not installed")
    assert main(["bench", "gone"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "did you mean --quick?" in lines[1]
    assert "is missing" in lines[2]
