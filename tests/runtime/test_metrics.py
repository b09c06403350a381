"""The log of a run: whole lines survive a crash, and what follows a torn one is not lost with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from minga.runtime.metrics import MetricsLog, read_metrics

STEP = {"kind": "step", "step": 1, "text": "año\nnuevo"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def _append(path: Path, *steps: int) -> None:
    log = MetricsLog(path)
    for step in steps:
        log.write("step", step=step)
    log.close()


def _steps(path: Path) -> list[int]:
    return [entry["step"] for entry in read_metrics(path)]


def test_each_entry_is_one_line_and_there_at_once(path: Path) -> None:
    log = MetricsLog(path)
    log.write(**STEP)
    assert path.read_bytes().count(b"\n") == 1
    assert read_metrics(path) == [STEP]  # while it is still open
    log.close()


def test_a_second_log_goes_on_where_the_first_ended(path: Path) -> None:
    _append(path, 1, 2)
    _append(path, 3)
    assert _steps(path) == [1, 2, 3]


@pytest.mark.parametrize("size", range(1, len(b'{"kind": "step", "step": 2}\n')))
def test_a_torn_last_line_is_passed_over_and_swallows_nothing(path: Path, size: int) -> None:
    _append(path, 1)
    whole = path.read_bytes()
    _append(path, 2)
    path.write_bytes(path.read_bytes()[: len(whole) + size])
    kept = _steps(path)
    assert kept in ([1], [1, 2])  # without its newline alone, a line is whole
    _append(path, 3)
    assert _steps(path) == [*kept, 3]


def test_a_line_torn_inside_a_letter(path: Path) -> None:
    _append(path, 1)
    with path.open("ab") as file:
        file.write('{"kind": "sample", "text": "ñ'.encode()[:-1])
    assert _steps(path) == [1]


def test_what_is_no_object_is_passed_over(path: Path) -> None:
    path.write_text("3\n[]\n\nnull\n", encoding="utf-8")
    assert read_metrics(path) == []
