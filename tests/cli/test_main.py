"""What the command line does before and after a subcommand: finding it, mistakes in one line, exit codes."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import minga
from minga.cli.main import COMMANDS, main
from minga.errors import UserError

ROOT = Path(__file__).parent.parent.parent
Run = Callable[[argparse.Namespace], int]


def _minga(*args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "minga", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.fixture
def as_train(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Puts a function in the place of `minga train`."""

    def install(run: Run) -> None:
        def add_parser(subparsers: Any) -> argparse.ArgumentParser:
            parser: argparse.ArgumentParser = subparsers.add_parser("train")
            parser.add_argument("input", nargs="?")
            parser.add_argument("--out", required=True)
            parser.add_argument("--steps", type=int)
            parser.add_argument("--json", action="store_true")
            parser.set_defaults(run=run)
            return parser

        module = ModuleType("minga.cli.train")
        module.add_parser = add_parser  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "minga.cli.train", module)

    return install


def _raise(error: BaseException) -> Run:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_runs_the_command_and_returns_its_status(as_train: Callable[[Run], None]) -> None:
    seen = []
    as_train(lambda args: seen.append((args.input, args.out, args.steps)) or 7)
    assert main(["train", "corpus", "--out", "runs/a", "--steps=3"]) == 7
    assert seen == [("corpus", "runs/a", 3)]


@pytest.mark.parametrize("option", ["--help", "-h", "--version"])
def test_help_and_version(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([option])
    assert not stop.value.code
    out, err = capsys.readouterr()
    assert err == ""
    if option == "--version":
        assert out == f"minga {minga.__version__}\n"
    else:
        assert [line.split()[0] for line in out.splitlines() if line.split()[:1] and line.split()[0] in COMMANDS] == [
            *COMMANDS
        ]


def test_without_a_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: minga")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "'trian' is not a command (minga). did you mean train?"),
        (["xyzzy"], "'xyzzy' is not a command (minga). `minga --help` shows them all"),
        (["--verison"], "--verison is not a flag (minga). did you mean --version?"),
        (["--verison", "train"], "--verison is not a flag (minga). did you mean --version?"),
        (["-x"], "unrecognized arguments: -x (minga). `minga --help` shows what it takes"),
        (["train", "--ouT", "a"], "--ouT is not a flag (minga train). did you mean --out?"),
        (["train", "--step=3"], "--step is not a flag (minga train). did you mean --steps?"),
        (["train", "--q"], "--q is not a flag (minga train). `minga train --help` shows them all"),
        (
            ["train"],
            "the following arguments are required: --out (minga train). `minga train --help` shows what it takes",
        ),
        (
            ["train", "a", "b", "--out", "c"],
            "unexpected argument 'b' (minga train). `minga train --help` shows what it takes",
        ),
        (
            ["train", "--out", "c", "--steps", "few"],
            "argument --steps: invalid int value: 'few' (minga train). `minga train --help` shows what it takes",
        ),
    ],
)
def test_a_mistake_is_one_line(
    argv: list[str], message: str, as_train: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    as_train(_raise(AssertionError("not reached")))
    assert main(argv) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_text_that_looks_like_a_flag_is_left_alone(as_train: Callable[[Run], None]) -> None:
    seen = []
    as_train(lambda args: seen.append(args.input) or 0)
    assert main(["train", "--out", "a", "--", "--outt"]) == 0
    assert main(["train", "--out", "a", "--and so on"]) == 0
    assert seen == ["--outt", "--and so on"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("no text (a.txt). give\nanother"), "no text (a.txt). give another"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            "No space left on device (runs/a). free some space, or choose another place",
        ),
        (PermissionError(errno.EACCES, "Permission denied", b"/x"), "Permission denied (/x). check its permissions"),
        (
            PermissionError(errno.EPERM, "Operation not permitted", "x"),
            "Operation not permitted (x). check its permissions",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory"),
            "No such file or directory. check the name",
        ),
    ],
)
def test_errors_of_users(
    error: Exception, message: str, as_train: Callable[[Run], None], capsys: pytest.CaptureFixture[str]
) -> None:
    as_train(_raise(error))
    assert main(["train", "--out", "a"]) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")
    assert main(["train", "--out", "a", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"message": message}}
    assert err == f"error: {message}\n"


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), OSError(errno.EBADF, "Bad file descriptor")])
def test_our_errors_keep_their_traceback(error: Exception, as_train: Callable[[Run], None]) -> None:
    as_train(_raise(error))
    with pytest.raises(type(error), match=str(error.args[-1])):
        main(["train", "--out", "a"])


def test_interrupted(as_train: Callable[[Run], None], capsys: pytest.CaptureFixture[str]) -> None:
    as_train(_raise(KeyboardInterrupt()))
    assert main(["train", "--out", "a"]) == 130
    assert capsys.readouterr() == ("", "\nstopped\n")
    assert main(["train", "--out", "a", "--json"]) == 130
    assert json.loads(capsys.readouterr().out) == {"error": {"message": "stopped"}}


def test_a_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "minga", "completion", "bash"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, timeout=60, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_exit_code_of_the_process() -> None:
    done = _minga("trian", "--json")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean train?" in json.loads(done.stdout)["error"]["message"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_keeps_the_contract(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own parser has an example and `run`; its one-line help is the one that `minga --help` shows."""
    subparsers = argparse.ArgumentParser(prog="minga").add_subparsers()
    parser = importlib.import_module(f"minga.cli.{name}").add_parser(subparsers)
    assert callable(parser.get_default("run"))
    assert [choice.help for choice in subparsers._get_subactions()] == [COMMANDS[name]]
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert f"minga {name}" in capsys.readouterr().out.partition("example")[2]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    flag = "-l vocab-size" if shell == "fish" else "--vocab-size"
    assert flag in script or shell == "tcsh"  # where shtab completes the flags of one level only
    if shutil.which(shell):
        path = tmp_path / "minga"
        path.write_text(script, encoding="utf-8")
        subprocess.run([shell, "-n", str(path)], check=True, timeout=60)


def test_completion_knows_its_shells(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "ksh"]) == 2
    assert "'ksh'" in capsys.readouterr().err
