"""pytest tests/recipes/test_calibrate.py: what this machine is, and what it was measured to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from minga.cli.main import main
from minga.config import TrainConfig
from minga.errors import UserError
from minga.planner.setup import Setup
from minga.planner.time import step_time
from minga.recipes import calibrate as recipe
from minga.recipes import here
from minga.runtime import machine as runtime


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(runtime, "nvidia_card", lambda: None)
    yield tmp_path


def test_without_a_calibration_the_cores_are_timed_briefly() -> None:
    machine, coefficients = here.this_machine()
    assert coefficients is None and machine.device.kind == "cpu"
    assert 1e8 < machine.device.flops["float32"] < 1e14 and 1e8 < machine.device.bandwidth < 1e13
    assert machine.device.memory == runtime.memory()[0]


def test_a_card_of_the_table_is_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "nvidia_card", lambda: "NVIDIA GeForce RTX 3090")
    assert here.this_machine()[0].device.name == "RTX-3090"
    monkeypatch.setattr(runtime, "nvidia_card", lambda: "NVIDIA of tomorrow")
    assert here.this_machine()[0].device.kind == "cpu"


def test_steps_are_measured_kept_and_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(recipe, "RUNS", ((64, 2, 64), (64, 4, 128)))
    monkeypatch.setattr(recipe.calibrate, "__kwdefaults__", {"seconds": 0.2, "note": lambda line: None})
    assert main(["plan", "--calibrate"]) == 0
    assert "measured: " in capsys.readouterr().err
    machine, coefficients = here.this_machine()
    assert coefficients is not None and "2 measured steps" in coefficients.source
    assert main(["plan", "--config", "tiny", "--tokens", "1m", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["train"]["tokens_per_second"]["typical"] > 0
    small, large = (Setup(seq_len=64, micro_batch=size, precision="float32", optimizer="muon") for size in (2, 64))
    model = recipe.architecture(64, recipe.VOCABULARY)
    assert step_time(model, small, machine, coefficients=coefficients).total.typical < (
        step_time(model, large, machine, coefficients=coefficients).total.typical
    )


def test_a_calibration_of_another_processor_is_not_used(home: Path) -> None:
    device = here.probe("elsewhere", 8)
    from minga.planner.time import coefficients_of

    here.store("elsewhere", 8, device, coefficients_of(device))
    assert here.this_machine()[1] is None


@pytest.mark.parametrize("text", ["{", "[]", '{"name": 1}'])
def test_a_broken_calibration_is_said(home: Path, text: str) -> None:
    path = here.calibration_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(UserError, match=r"no calibration of this version.*minga plan --calibrate"):
        here.this_machine()


def test_how_our_own_runs_are_laid_out() -> None:
    setup = recipe.own_setup(TrainConfig(steps=1, batch_size=4, accumulate=3, seq_len=128, precision="int8"))
    assert (setup.step_tokens, setup.optimizer, setup.precision, setup.fused_loss) == (
        4 * 3 * 128,
        "muon",
        "int8",
        True,
    )


def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "file"))
    monkeypatch.setattr(recipe, "measured_cpu", lambda *_: pytest.fail("it was measured"))
    assert main(["plan", "--calibrate"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: cannot write") and "set XDG_CONFIG_HOME" in err and err.count("\n") == 1
    assert here.this_machine()[0].device.kind == "cpu"  # nothing can be stored there, so nothing is


def test_a_card_that_is_not_in_the_table_is_not_taken_for_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "nvidia_card", lambda: "garbage,,,")
    device = here.this_machine()[0].device
    assert "garbage" not in device.name and device.note.startswith("garbage,,, is not in the table of devices")


def test_too_little_memory_to_measure_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> float:
        raise MemoryError

    monkeypatch.setattr(here, "_best", full)
    with pytest.raises(UserError, match="128 MiB to measure this machine are not free"):
        here.this_machine()
