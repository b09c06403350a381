"""The main job by its commands: train, quantize, eval, each as a user calls it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minga.cli.main import main
from minga.config import TrainConfig
from minga.config.presets import laptop, tiny
from minga.data.shards import open_shards
from minga.planner.dial import MachineSpeed
from minga.planner.own_memory import own_training_memory
from minga.planner.time import coefficients_of
from minga.recipes import here
from minga.recipes.pretrain import Pace
from minga.runtime import machine as runtime
from minga.store import load, load_tokenizer

SMALL = ["--preset", "tiny", "--set", "batch_size=2", "--set", "seq_len=32", "--set", "eval_every=0"]
Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs `minga ...`; returns exit code, stdout and stderr."""

    def ask(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return ask


@pytest.fixture
def trained(ask: Ask, shards: Path, tmp_path: Path) -> Path:
    code, _, _ = ask("train", "--data", shards, "--out", tmp_path / "run", "--steps", 12, *SMALL)
    assert code == 0
    return tmp_path / "run"


def test_train_reports_and_saves(ask: Ask, shards: Path, tmp_path: Path) -> None:
    code, out, _ = ask("train", "--data", shards, "--out", tmp_path / "run", "--steps", 3, "--json", *SMALL)
    document: dict[str, Any] = json.loads(out)
    assert code == 0
    assert document["finished"]
    assert document["step"] == 3
    assert document["model"].endswith("checkpoint-000003")
    assert 0 < document["evaluation"]["bits_per_byte"] < 8
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (settings["batch_size"], settings["model"]["hidden_size"]) == (2, 64)


def test_a_finished_run_is_left_as_it_is(ask: Ask, trained: Path, shards: Path) -> None:
    before = (trained / "checkpoint-000012" / "model.safetensors").read_bytes()
    code, out, _ = ask("train", "--data", shards, "--out", trained, "--steps", 12, *SMALL)
    assert code == 0
    assert "bits a byte" in out
    assert (trained / "checkpoint-000012" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("batchsize=2", "did you mean 'batch_size'"),
        ("model.hidden_sise=2", "did you mean 'hidden_size'"),
        ("batch_size=two", "'two' is not int"),
        ("batch_size=0", "batch_size is 0"),
        ("model.num_attention_heads=0", "num_attention_heads is 0"),
        ("seq_len=100000", "max_position_embeddings"),
        ("out", "is not known"),
    ],
)
def test_a_wrong_setting_is_one_line(ask: Ask, shards: Path, tmp_path: Path, flag: str, message: str) -> None:
    code, out, err = ask("train", "--data", shards, "--out", tmp_path / "run", "--steps", 1, *SMALL, "--set", flag)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "run").exists()


def test_quantize_and_eval(ask: Ask, trained: Path, shards: Path, tmp_path: Path) -> None:
    code, out, _ = ask("quantize", trained, "--out", tmp_path / "int8", "--data", shards, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["share"] < 0.35  # tiny rows: a scale for every 64 numbers weighs more here than in a real model
    assert abs(report["bits_per_byte_int8"] / report["bits_per_byte_float32"] - 1) < 0.01
    _, out, _ = ask("eval", tmp_path / "int8", "--data", shards, "--seq-len", 256, "--json")
    assert json.loads(out)["bits_per_byte"] == pytest.approx(report["bits_per_byte_int8"], rel=1e-3)


def test_quantize_calibrated_and_in_fp8(ask: Ask, trained: Path, shards: Path, tmp_path: Path) -> None:
    calibrate = ("--calibrate", shards, "--calibration-tokens", 2048)
    data = ("--data", shards, "--max-tokens", 2000, "--json")
    reports = {}
    for name, more in {"int4": (), "int4 calibrated": calibrate, "fp8": ()}.items():
        code, out, _ = ask("quantize", trained, "--to", name.split()[0], "--out", tmp_path / name, *more, *data)
        assert code == 0
        reports[name] = json.loads(out)
    plain, calibrated, fp8 = reports.values()
    for name in reports:
        before, after = (reports[name][f"perplexity_{kind}"] for kind in ("float32", name.split()[0]))
        assert 1 < before == pytest.approx(after, rel=0.05)
    code, out, _ = ask(
        "quantize", trained, "--to", "fp8", "--scale-fmt", "ue8m0", "--out", tmp_path / "ue8m0", "--json"
    )
    assert json.loads(out)["bytes_fp8"] < fp8["bytes_fp8"]
    described = json.loads((tmp_path / "ue8m0" / "config.json").read_text())["quantization_config"]
    assert (code, described["scale_fmt"]) == (0, "ue8m0")
    assert 4.5 < plain["bits_per_weight"] == calibrated["bits_per_weight"] < 8 < fp8["bits_per_weight"] < 12
    assert plain["file_bytes"] == calibrated["file_bytes"]
    assert 0 < fp8["kl"] < calibrated["kl"] < plain["kl"]
    assert calibrated["calibration"]["tokens"] == 2048
    code, out, err = ask(
        "generate", tmp_path / "fp8", "--quant", "fp8", "--prompt", "ka lo", "--max-tokens", 4, "--json"
    )
    assert (code, "kernels" in err) == (0, False)
    assert json.loads(out)
    code, out, _ = ask("quantize", trained, "--to", "int4", "--out", tmp_path / "text", *calibrate, *data[:-1])
    assert code == 0
    assert "KL 0." in out
    assert "calibration  2048 tokens, " in out
    for mistake, message in {
        (trained, "--to", "int8", *calibrate): "--calibrate is for int4",
        (trained, "--to", "int8", "--scale-fmt", "ue8m0"): "--scale-fmt is for fp8",
        (tmp_path / "int4", "--to", "int4"): "stored in int4 already",
        (trained, "--to", "int4", *calibrate[:3], 5): "too few to calibrate on",
    }.items():
        code, _, err = ask("quantize", *mistake, "--out", tmp_path / "none")
        assert code == 2
        assert message in err
    assert not (tmp_path / "none").exists()


def test_eval_of_a_text_is_its_perplexity(ask: Ask, trained: Path, tmp_path: Path) -> None:
    text = "ka lo mi ru ka lo té mi " * 10
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    _, out, _ = ask("eval", trained, "--text", tmp_path / "text.txt", "--json")
    values = json.loads(out)
    ids = torch.tensor([load_tokenizer(trained).encode(text)])
    with torch.inference_mode():
        logits = load(trained)(ids).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    assert values["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
    assert values["tokens"] == ids.shape[1] - 1
    assert values["num_bytes"] == len(text.encode()) - len(load_tokenizer(trained).token_bytes(int(ids[0, 0])))
    assert values["mtp_acceptance"] is not None


def test_eval_refuses_another_tokenizer(ask: Ask, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("another language, quite another one. " * 300)
    assert ask("data", folder, "--out", tmp_path / "other", "--vocab-size", 262)[0] == 0
    code, _, err = ask("eval", trained, "--data", tmp_path / "other")
    assert code == 2
    assert "another tokenizer" in err


# ---------------------------------------------------------------------------------------------- the one dial


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that answers the calibration at once."""
    speed = MachineSpeed(((128, 3e9), (384, 5e9)), memory=8 * 10**9)
    monkeypatch.setattr("minga.recipes.dial.calibrate", lambda shards, seconds: speed)


def test_dry_run_prints_each_value_with_formula_and_source(
    ask: Ask, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minga.recipes.dial.PROBE_WIDTHS", (64, 128))  # really timed, but small
    code, out, _ = ask("train", "--data", shards, "--out", tmp_path / "run", "--hours", 0.001, "--dry-run")
    assert code == 0
    assert not (tmp_path / "run").exists()
    choices, _, plan = out.partition("\n\n")
    for line in choices.splitlines():
        assert re.fullmatch(r"\S.*  .*  .*\[.+\]", line), line
    assert "model.hidden_size" in out
    assert "GFLOP/s at width 64" in out
    assert re.search(r"of [\d.]+ GB free: green", plan)
    assert "electricity at 0.17 a kWh" in plan


def test_dry_run_as_one_json_document(ask: Ask, shards: Path, quick: None) -> None:
    code, out, _ = ask("train", "--data", shards, "--tokens", "50k", "--dry-run", "--json", "--set", "seq_len=64")
    document = json.loads(out)
    assert code == 0
    assert all({"name", "value", "formula", "source"} == set(choice) for choice in document["choices"])
    config = document["config"]
    step = config["batch_size"] * config["accumulate"] * config["seq_len"]
    assert config["seq_len"] == 64  # --set stands above the dial, and the tokens stay those that were asked for
    assert config["steps"] * step == pytest.approx(50_000, rel=0.1)
    chosen = {choice["name"]: choice["value"] for choice in document["choices"]}
    assert config["model"]["hidden_size"] == chosen["model.hidden_size"]
    assert config["model"]["vocab_size"] % 64 == 0


def test_a_run_by_the_dial_keeps_its_plan_and_goes_on_with_it(
    ask: Ask, shards: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", "--data", shards, "--out", tmp_path / "run", "--tokens", "2k", "--json"]
    code, out, err = ask(*command)
    assert code == 0
    assert "[Muennighoff" in err
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["asked"] == {"tokens": 2000, "size": None, "preset": None}
    start = json.loads((tmp_path / "run" / "run.jsonl").read_text().splitlines()[0])
    assert start["plan"]["choices"] == plan["choices"]
    monkeypatch.setattr("minga.recipes.dial.calibrate", lambda shards, seconds: pytest.fail("measured again"))
    code, again, _ = ask(*command)
    assert code == 0
    assert json.loads(again)["step"] == json.loads(out)["step"]
    code, _, err = ask("train", "--data", shards, "--out", tmp_path / "run", "--tokens", "3k")
    assert (code, err.count("\n")) == (2, 1)
    assert "begun with another --tokens" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "many"], "'many' is no number of tokens"),
        (["--tokens=-3m"], "'-3m' is no number of tokens"),
        (["--tokens", "1m", "--size", "5"], "no model of ours has about 5 active parameters"),
        (["--hours", "0"], "no time to train"),
        (["--hours", "nan"], "no time to train"),
        (["--steps", "3", "--size", "10m"], "with --steps nothing is chosen"),
        (["--hours", "1", "--preset", "lapto"], "did you mean 'laptop'"),
        (["--hours", "1", "--size", "10m", "--preset", "tiny"], "not allowed with"),
        (["--hours", "1", "--set", "batchsize=2"], "did you mean 'batch_size'"),
        (["--hours", "1", "--log", "tensorbord"], "is no place to log to"),
        (["--hours", "1", "--data", "/nowhere"], "does not exist"),
    ],
)
def test_a_wrong_dial_is_one_line_before_anything_is_measured(
    ask: Ask, shards: Path, tmp_path: Path, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minga.recipes.dial.calibrate", lambda shards, seconds: pytest.fail("measured"))
    code, out, err = ask("train", "--data", shards, "--out", tmp_path / "run", *flags)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "run").exists()


def test_without_a_folder_there_is_only_a_dry_run(ask: Ask, shards: Path) -> None:
    code, _, err = ask("train", "--data", shards, "--steps", 1)
    assert code == 2
    assert "--out" in err


# ---------------------------------------------------------------------------------------------- memory


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets what `minga train` finds free."""

    def free(num_bytes: float) -> None:
        monkeypatch.setattr("minga.cli.train.memory", lambda: (int(num_bytes), int(num_bytes)))

    return free


BIG = ["--preset", "laptop", "--set", "batch_size=64", "--set", "seq_len=256", "--set", "eval_every=0"]


def _needed(shards: Path, *, batch_size: int = 64) -> float:
    vocab_size = -(-open_shards(shards).manifest.vocab_size // 64) * 64
    model = laptop().replace(vocab_size=vocab_size)
    return own_training_memory(TrainConfig(model=model, steps=1, batch_size=batch_size, seq_len=256)).total


def test_the_plan_of_a_run_by_steps(ask: Ask, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = ["--set", "accumulate=3", "--set", "batch_warmup=0.5", "--set", "eval_every=2", "--set", "eval_tokens=64"]
    code, text, err = ask(
        "train", "--data", shards, "--out", out, "--steps", 6, *SMALL, *changes, "--dry-run", "--json"
    )
    plan = json.loads(text)
    assert (code, err, out.exists()) == (0, "", False)
    assert plan["train"]["steps"] == 6
    assert plan["train"]["tokens"] == 2 * 32 * (1 + 2 + 3 + 3 + 3 + 3)
    held_out = open_shards(shards).manifest.splits["val"].num_tokens
    assert plan["train"]["evaluated"] == 2 * 64 + held_out
    assert plan["config"]["batch_size"] == 2
    assert plan["memory"]["verdict"] == "green"
    assert plan["memory"]["device_bytes"] == pytest.approx(
        sum(
            plan["memory"][part]
            for part in ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "runtime")
            if part in plan["memory"]
        )
    )
    assert plan["train"]["days"]["low"] > 0
    assert plan["energy_kwh"]["low"] < plan["energy_kwh"]["high"]
    assert "choices" not in plan
    assert plan["changes"] == []


def test_a_stored_calibration_answers_without_a_step(
    ask: Ask, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("minga.recipes.dry_run.measure", lambda *_, **__: pytest.fail("measured"))
    device = here.cpu_device("CPU", 2, {"float32": 1e11}, 1e10, "test")
    name = runtime.nvidia_card() or runtime.cpu()[0] or "CPU"
    here.store(name, runtime.cores(), device, coefficients_of(device))
    code, text, _ = ask("train", "--data", shards, "--steps", 6, *SMALL, "--dry-run", "--json")
    step = json.loads(text)["train"]["step_seconds"]
    assert code == 0
    assert 0 < step["low"] < step["typical"] < step["high"]


def test_what_does_not_fit_is_refused_with_what_would(
    ask: Ask, shards: Path, tmp_path: Path, free: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minga.recipes.dry_run.measure", lambda *_, **__: Pace(1.0, 1e-4))
    free(_needed(shards) * 0.9)
    command = ["train", "--data", shards, "--out", tmp_path / "run", "--steps", 1, *BIG]
    code, out, err = ask(*command)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not (tmp_path / "run").exists()
    assert re.match(r"error: the run needs about \S+ [GM]B and \S+ [GM]B of memory are free \(train\)\.", err)
    assert "--set batch_size=32 --set accumulate=2" in err
    assert 2 <= err.count(", or ") + 1 <= 3
    assert "--force runs it anyway" in err
    code, out, _ = ask(*command, "--dry-run", "--json")
    plan = json.loads(out)
    assert (code, plan["memory"]["verdict"]) == (0, "red")
    assert all(change in err for change in plan["changes"])
    offered = plan["changes"][0].split()
    code, out, _ = ask(*command, *offered, "--dry-run", "--json")
    assert json.loads(out)["memory"]["verdict"] != "red"
    assert json.loads(out)["train"]["tokens"] == plan["train"]["tokens"]


def test_forced_it_runs_and_little_memory_is_only_said(
    ask: Ask, shards: Path, tmp_path: Path, free: Callable[[float], None]
) -> None:
    free(1e6)
    command = ["train", "--data", shards, "--out", tmp_path / "run", *SMALL, "--json"]
    code, _, err = ask(*command, "--steps", 1)
    assert (code, "close other programs" in err) == (2, True)
    code, _, err = ask(*command, "--steps", 2, "--force")
    assert (code, "of memory are free" in err) == (0, False)
    code, _, err = ask(*command, "--steps", 2)  # only what a run may change is offered, and here it does not help
    assert (code, "batch_size" in err) == (2, False)
    free(_small_run(shards) * 1.1)
    code, _, err = ask("train", "--data", shards, "--out", tmp_path / "amber", *SMALL, "--steps", 1)
    assert code == 0
    assert re.search(r"memory: about \S+ MB of \S+ MB free memory are needed", err)


def _small_run(shards: Path) -> float:
    vocab_size = -(-open_shards(shards).manifest.vocab_size // 64) * 64
    model = tiny().replace(vocab_size=vocab_size)
    return own_training_memory(TrainConfig(model=model, steps=1, batch_size=2, seq_len=32)).total
