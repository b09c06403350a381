"""The same numbers reach each sink; TensorBoard's files are read back by its own reader where it is installed."""

from __future__ import annotations

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from minga.errors import UserError
from minga.runtime.sinks import SINKS, check_sinks, open_sinks


def _fake(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """A package whose calls are written down."""
    calls: list[Any] = []
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    run = SimpleNamespace(log=lambda values, step: calls.append(("log", step, values)))

    def init(**options: Any) -> Any:
        calls.append(("init", options))
        print("hello")  # as both do
        return run

    def finish() -> None:
        calls.append(("finish",))
        print("goodbye")

    module.init, module.finish = init, finish  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_what_is_not_there_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in SINKS:
        with pytest.raises(UserError, match=f"pip install {name}") as caught:
            check_sinks([name])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="known: tensorboard, trackio, wandb"):
        check_sinks(["tensorbord"])


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_trackers_get_numbers_with_their_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = _fake(monkeypatch, name)
    check_sinks([name])
    (sink,) = open_sinks([name, name], tmp_path, {"seed": 3}, step=0)  # twice is once
    sink.write(7, {"loss": 2.5})
    sink.close()
    init, *others = calls
    assert (init[1]["project"], init[1]["name"], init[1]["config"]) == ("minga", tmp_path.name, {"seed": 3})
    assert others == [("log", 7, {"loss": 2.5}), ("finish",)]
    assert capsys.readouterr() == ("", "hello\ngoodbye\n")  # stdout is the result's


def test_wandb_knows_a_resumed_run_again_and_a_new_one_from_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _fake(monkeypatch, "wandb")
    for step in (0, 10, 0):
        open_sinks(["wandb"], tmp_path, {}, step=step)
    first, resumed, anew = (options["id"] for _, options in calls)
    assert first == resumed
    assert first != anew


def test_trackio_begins_anew_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _fake(monkeypatch, "trackio")
    for step in (0, 10):
        open_sinks(["trackio"], tmp_path, {}, step=step)
    assert [options["resume"] for _, options in calls] == ["never", "allow"]


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (sink,) = open_sinks(["tensorboard"], tmp_path, {"seed": 3}, step=0)
    for step in range(1, 6):
        sink.write(step, {"loss": 6.0 - step, "mfu": 0.5})
    sink.close()
    (again,) = open_sinks(["tensorboard"], tmp_path, {"seed": 3}, step=3)  # killed; resumed from step 3
    again.write(4, {"loss": 20.0})
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "mfu"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 20.0)]
