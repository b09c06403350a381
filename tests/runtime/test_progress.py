"""Progress: plain lines now and then where nobody watches, a bar on a terminal. Never on stdout."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from minga.runtime import progress
from minga.runtime.progress import ProgressBar

ROOT = Path(__file__).parent.parent.parent
WORK = """
from minga.runtime.progress import ProgressBar
with ProgressBar("training", total=3, done=1) as bar:
    bar.update(1, "loss [3.1]")
    bar.note("saved [bold]here[/bold]")
    bar.update(1, "loss [2.9]")
"""


def _lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_without_a_terminal_only_the_end_of_short_work_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("training", total=5, done=2) as bar:
        for loss in (3, 2, 1):
            bar.update(1, f"loss {loss}")
    assert _lines(capsys) == ["training 5/5  loss 1"]


def test_without_a_terminal_long_work_is_told_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with ProgressBar("training", total=100) as bar:
        for _ in range(9):
            now += progress.LINE_EVERY / 4
            bar.update(1, "on")
    assert _lines(capsys) == ["training 4/100  on  0:08:00 left", "training 8/100  on  0:07:40 left"]


def test_a_note_is_a_line_of_its_own_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("training", total=5) as bar:
        bar.note("saved [bold]here[/bold]")
    assert _lines(capsys) == ["saved [bold]here[/bold]"]


def test_on_a_terminal_a_bar_is_drawn() -> None:
    """A pseudo-terminal stands for the user's; stdout is a pipe and stays empty."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-c", WORK]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, timeout=60, check=True)
    os.close(theirs)
    drawn = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.stdout == b""
    assert "training" in drawn
    assert "3/3" in drawn
    assert "saved [bold]here[/bold]" in drawn
    assert "━" in drawn
    assert "loss [2.9]" in drawn
