"""pytest tests/cli/test_plan.py"""

from __future__ import annotations

import io
import json
import os
import sys
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
        (["--fits", "tiny", "--memory", "0"], "no memory of a device (--memory)"),
        (["--config", "v3", "--machine", "8xH100", "--seq", "9" * 400], "it must be above 0, and at most 1e18"),
        (["--config", ""], "the model's name is empty (--config)"),
        (["--config", "x" * 300], "File name too long (--config)"),
        (["--config", "V3"], "did you mean v3?"),
        (["--config", "large.json"], "too large for a config"),
        (["--config", "nameless.json"], "'model_type' is missing"),
        (["--config", "pipe"], "is no regular file (--config)"),
        (["--config", "pipe.gguf"], "is no regular file (--config)"),
        (["--config", "folders"], "has no config.json"),
        (["--config", "v3", "--machine", "8xH100", "--teacher", "nothing"], "no preset (--teacher)"),
        (["--config", "v3", "--machine", "8xH100", "--watts", "1e308"], "at most 1e+12"),
        (["--config", "v3", "--machine", "8xH100", "--peers", "1"], "a pool of one"),
        (["--config", "tiny", "--machine", "8xH100", "--speed", "1e9"], "no batch gives 1e+09 tokens/s"),
        (["--config", "v3", "--machine", "8xH100", "--explain", ""], "--explain is empty"),
        (["--config", "v3", "--machine", "8xH100", "--html", ""], "--html is empty"),
        (["--config", "v3", "--machine", "8xH100", "--html", "pipe"], "no regular file (page)"),
        (["--config", "v3", "--machine", "8xH100", "--html", "no/page.html"], "check the name and the rights"),
        (["--config", "v3", "--machine", "8xH100", "--html", "x\0y"], "null byte (page)"),
        (["--config", "v3", "--machine", "a" * 5000], "...' is no machine"),
        (["--config", "v3", "--smallest", "--machine", "8xH100"], "--smallest does not take --machine"),
        (["--config", "v3", "--compare", "@8xH100", "@8xA100", "--html", "x"], "--compare does not take --html"),
        (["--fits", "v3", "--hours", "1"], "--fits does not take --hours"),
        (["--hours", "1", "--tokens", "1b"], "--hours does not take --tokens"),
        (["--config", "v3", "--machine", "8xH100", "--days", "3"], "--days goes with --smallest"),
        (["--config", "v3", "--machine", "8xH100", "--up", "3Mbit"], "--up goes with --peers"),
        (["--budget", "5", "--price", "0", "--machine", "8xH100"], "costs nothing"),
        (["--loss", "20", "--machine", "8xH100"], "needs no training"),
        (["--loss", "1.7", "--machine", "8xH100"], "takes 1.69 T active parameters (--loss)"),
        (["--hours", "1", "--machine", "8xH100", "--tp", "16"], "cannot be cut like that"),
        (["--hours", "1", "--machine", "64x4090"], "need a network (machine). say how fast it is"),
        (["--config", "laptop", "--network", "25"], "this machine is one node"),
        (["--config", "laptop", "--machine", "64x4090", "--network", "nan"], "is no network (--network)"),
    ],
)  # fmt: skip
def test_what_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], words: str) -> None:
    (tmp_path / "empty.json").touch()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "large.json").write_text('{"a": "' + " " * 2**24 + '"}')
    (tmp_path / "nameless.json").write_text("{}")
    (tmp_path / "folders" / "a" / "config.json").mkdir(parents=True)
    for name in ("pipe", "pipe.gguf"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "heads.json").write_text(json.dumps(laptop().to_hf() | {"num_attention_heads": 0}))
    before = sorted(tmp_path.iterdir())
    assert words in refused(capsys, *argv)
    assert sorted(tmp_path.iterdir()) == before  # and nothing is half-written


def test_a_network_that_is_said_joins_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--config", "v2-lite", "--machine", "64x4090", "--tokens", "1b", "--network"]
    slow, fast = (document(capsys, *argv, gbits)["train"]["days"]["typical"] for gbits in ("10", "100"))
    assert fast < slow
    assert document(capsys, "plan", "--hours", "1", "--machine", "64x4090", "--network", "25")["params"]["total"] > 1e6


def test_any_time_is_enough_for_the_largest_model_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "plan", "--machine", "8xH100", "--hours", "1e8")
    assert found["memory"]["verdict"] in ("green", "amber")


def test_flags_of_a_training_that_was_not_asked_for_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "plan", "--config", "v2-lite", "--machine", "8xH100", "--lora", "8", "--tp", "2")
    assert "no training is planned without --tokens N: --tp, --lora" in found["notes"][-1]


def test_a_derivation_for_other_programs(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, *RUN, "--explain", "money.final_run")
    assert [fact["name"] for fact in found["facts"]] == ["money.final_run"]
    assert found["facts"][0]["formula"] == "device-hours x price"


@pytest.mark.parametrize("name", ["\x1b[31mred", "two\nlines", "\ud800", "x" * 101])
def test_a_name_that_cannot_be_printed_is_not_the_title(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(v2_lite().to_hf() | {"_name_or_path": name}))
    found = document(capsys, "plan", "--config", "mine.json", "--machine", "8xH100")
    assert found["title"] == "mine on 8 x H100-SXM"


def test_an_output_without_blocks_has_bars_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(RUN) == 0
    sys.stdout.flush()
    assert b"# weights" in written.getvalue()


def test_an_output_that_is_closed_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(RUN) == 0


def test_so_many_layers_take_no_longer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
              "num_hidden_layers": 2_000, "num_attention_heads": 32}  # fmt: skip
    (tmp_path / "deep.json").write_text(json.dumps(config))
    assert "what would" in refused(capsys, "--config", "deep.json", "--machine", "8xH100", "--tokens", "1t")


def test_two_plans_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "v2-lite", "--tokens", "1t", "--compare", "@64xH100", "@64xA100"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 130 and "set-up: bf16" in out and "! H100-SXM" in out
