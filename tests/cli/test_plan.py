"""pytest tests/cli/test_plan.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minga.cli.main import main
from minga.config.hardware import Device, Machine
from minga.config.presets import laptop, v2_lite
from minga.planner.counts import count_parameters
from minga.recipes import here
from tests.checkpoint.models import CONFIGS, random_tensors, to_gguf, write_gguf

RUN = ["plan", "--config", "v3", "--machine", "2048xH800", "--tokens", "14.8e12", "--precision", "fp8"]
CPU = Machine(
    Device("two cores", "cpu", {"float32": 2e11}, memory=16e9, bandwidth=5e10, per_node=1, achievable={"float32": 1.0})
)


@pytest.fixture(autouse=True)
def this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(here, "this_machine", lambda: (CPU, None))


def document(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main([*argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["plan", *argv, "--json"]) == 2
    out, err = capsys.readouterr()
    message: str = json.loads(out)["error"]["message"]
    assert err.endswith(f"error: {message}\n") and "\n" not in message
    return message


def test_the_surface_for_other_programs(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, *RUN, "--seq", "4096")
    assert found["params"] == {"total": 671_026_404_352, "active": 37_552_282_624, "mtp": 11_610_067_968}
    assert found["kv_bytes_per_token"] == 70_272
    assert found["train"]["gpu_hours"].keys() == {"low", "typical", "high"}
    assert {"memory", "money", "energy_kwh", "serve", "notes"} <= found.keys()


def test_a_public_config_a_folder_and_a_preset_are_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(v2_lite().to_hf()))
    names = ("model", "model/config.json", "v2-lite")
    found = [
        document(capsys, "plan", "--config", name, "--machine", "8xH100", "--tokens", "1t") | {"title": ""}
        for name in names
    ]
    assert found[0] == found[1] == found[2]


def test_a_gguf_file_is_read_for_its_header(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = CONFIGS["v3"]
    write_gguf(tmp_path / "m.gguf", *to_gguf(config, random_tensors(config)))
    assert document(capsys, "plan", "--config", "m.gguf")["params"]["total"] == count_parameters(config).total


def test_what_a_person_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(RUN) == 0
    out = capsys.readouterr().out
    for words in (
        "v3 on 2,048 x H800 (256 nodes of 8)",
        "671 B",
        "261 GFLOP",
        "as most runs are billed",
        "serving, busy 30 % of the time",
    ):
        assert words in out
    assert main([*RUN, "--explain", "train.gpu_hours"]) == 0
    assert "formula" in capsys.readouterr().out


def test_two_plans_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--config", "v2-lite", "--tokens", "1t", "--compare", "@64xH100", "@64xA100"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "v2-lite on 64 x H100-SXM" in out and "v2-lite on 64 x A100-SXM-80GB" in out
    first, second = document(capsys, *argv)["plans"]
    assert first["train"]["gpu_hours"]["typical"] < second["train"]["gpu_hours"]["typical"]


def test_the_other_way_round(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "plan", "--hours", "1")
    assert found["train"]["days"]["typical"] == pytest.approx(1 / 24, rel=0.02)
    found = document(capsys, "plan", "--machine", "8xH100", "--budget", "100", "--price", "2")
    assert found["money"]["final_run"]["typical"] == pytest.approx(100, rel=0.02)
    assert document(capsys, "plan", "--memory", "2GB", "--weights", "int8")["params"]["total"] < 2e9


def test_the_smallest_machines(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--config", "v2-lite", "--smallest", "--tokens", "100b", "--days", "30"]
    machines = document(capsys, *argv)["machines"]
    assert machines and all(each["days"]["typical"] <= 30 for each in machines)
    assert main(argv) == 0
    assert "in 30 days: v2-lite" in capsys.readouterr().out


def test_which_checkpoints_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(v2_lite().to_hf()))
    (tmp_path / "broken.json").write_text("{")
    argv = ["plan", "--fits", "config.json", "laptop", "broken.json", "--memory", "24GB"]
    found = document(capsys, *argv)
    verdicts = [{name: each["verdict"] for name, each in model["formats"].items()} for model in found["models"]]
    assert verdicts[0]["bf16"] == "red" and verdicts[0]["int4"] == "green" and verdicts[1]["bf16"] == "green"
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "left out: cannot read broken.json" in err and "int4" in out


def test_this_machine_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["plan", "--config", "laptop"], ["plan", "--config", "laptop", "--machine", "this"]):
        assert document(capsys, *argv)["title"] == "laptop on two cores"
    found = document(capsys, "plan", "--config", "laptop", "--tokens", "1m", "--watts", "100", "--pue", "1")
    assert found["energy_kwh"]["typical"] == pytest.approx(0.1 * found["train"]["gpu_hours"]["typical"])


def test_a_page_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*RUN, "--html", "plan.html"]) == 0
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
    assert "plan.html" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "there is no model to plan"),
        (["--config", "v33"], "did you mean v3?"),
        (["--config", "nothing/there"], "is not there"),
        (["--config", "empty.json"], "it is no JSON"),
        (["--config", "list.json"], "holds no object"),
        (["--config", "heads.json"], "heads.json: "),
        (["--config", "."], "has no config.json"),
        (["--config", "v3", "--machine", "H1000"], "not in the table of devices (machine). the nearest: H100"),
        (["--config", "v3", "--machine", "0xH100"], "is no machine"),
        (["--config", "v3", "--machine", "8xH100", "--tokens", "nan"], "no number of tokens"),
        (["--config", "v3", "--machine", "8xH100", "--tokens", "1t"], "what would: "),
        (["--config", "v3", "--machine", "8xH100", "--tokens", "1t", "--lora", "0"], "(--lora)"),
        (["--config", "v3", "--machine", "8xH100", "--stored", "int4"], "goes with --lora"),
        (["--config", "v3", "--machine", "8xH100", "--utilization", "2"], "utilization is 2.0"),
        (["--config", "v3", "--machine", "8xH100", "--up", "3", "--peers", "2"], "no speed of a link"),
        (["--config", "v3", "--machine", "8xH100", "--grid", "Atlantis"], "no country"),
        (["--config", "v3", "--machine", "8xH100", "--explain", "train"], "this plan has no 'train'"),
        (["--config", "v3", "--machine", "8xH100", "--watts", "-1"], "a rate is negative"),
        (["--config", "v3", "--precison", "fp8"], "did you mean --precision?"),
        (["--config", "v3", "--hours", "1"], "--hours chooses the model"),
        (["--hours", "nan"], "hours is nan"),
        (["--budget", "10"], "is not known (--budget)"),
        (["--memory", "8X"], "--memory is '8X'"),
        (["--loss", "0.1", "--machine", "8xH100"], "out of reach"),
        (["--fits", "nothing"], "none of these is a model"),
    ],
)  # fmt: skip
def test_what_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], words: str) -> None:
    (tmp_path / "empty.json").touch()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "heads.json").write_text(json.dumps(laptop().to_hf() | {"num_attention_heads": 0}))
    assert words in refused(capsys, *argv)
