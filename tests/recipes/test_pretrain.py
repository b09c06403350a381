from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import minga
from minga.config import TrainConfig
from minga.errors import UserError
from minga.recipes import pretrain as recipe
from minga.recipes.pretrain import pretrain
from minga.runtime.metrics import read_metrics
from minga.store import latest_checkpoint

Make = Callable[..., TrainConfig]


def _files(checkpoint: Path) -> dict[str, torch.Tensor]:
    weights = load_file(checkpoint / "model.safetensors")
    return weights | load_file(checkpoint / "training_state" / "optimizer.safetensors")


def _stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Sends this process SIGTERM during step `steps`, as a job scheduler would."""
    original, done = recipe.train_step, []

    def step(*args: object, **kwargs: object) -> object:
        done.append(1)
        if len(done) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(recipe, "train_step", step)


def test_a_run_learns_and_leaves_a_model_anyone_can_open(make_config: Make) -> None:
    result = pretrain(make_config(steps=30, eval_every=10, checkpoint_every=10))
    assert result.finished
    assert result.step == 30
    assert sorted(p.name for p in result.run.glob("checkpoint-*")) == ["checkpoint-000020", "checkpoint-000030"]
    log = read_metrics(result.run / "run.jsonl")
    kinds = {entry["kind"] for entry in log}
    assert kinds == {"start", "step", "eval", "checkpoint", "sample", "end"}
    losses = [entry["loss"] for entry in log if entry["kind"] == "step"]
    assert losses[-1] < losses[0] - 1.0
    bits = [entry["bits_per_byte"] for entry in log if entry["kind"] == "eval"]
    assert len(bits) == 3
    assert bits[-1] < bits[0]
    assert (result.run / "report.html").stat().st_size > 1000
    model = minga.load(result.run)  # the run folder stands for its newest checkpoint
    assert len(model.mtp) == 1
    assert any(layer.gate.e_score_correction_bias.any() for layer in model.moe_layers())
    answer = minga.LLM(result.run).generate("ka", minga.SamplingParams(temperature=0, max_tokens=8))[0]
    assert len(answer.token_ids) <= 8


def test_transformers_opens_the_checkpoint_with_equal_logits(make_config: Make) -> None:
    transformers = pytest.importorskip("transformers")
    model_config = make_config().model.replace(num_nextn_predict_layers=0)
    result = pretrain(make_config(steps=2, model=model_config))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(result.model, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(0, 350, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, minga.load(result.run)(ids).logits, atol=1e-5, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.model)
    assert tokenizer.encode("kalo mi") == minga.LLM(result.run).tokenizer.encode("kalo mi")


@pytest.mark.parametrize("changes", [{}, {"weight_dtype": "bf16", "optimizer_bits": 8, "precision": "fp8"}])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    """8 + 8 steps against 16, with accumulation, in the middle of an epoch; weights, moments, random state, data order."""
    whole = pretrain(make_config(out=str(tmp_path / "whole"), **changes))
    halves = make_config(out=str(tmp_path / "halves"), **changes)
    _stop_after(monkeypatch, 8)
    first = pretrain(halves)
    assert (first.step, first.finished) == (8, False)
    torch.manual_seed(12345)  # a new process would not stand where this one does
    second = pretrain(halves)
    assert (second.step, second.finished) == (16, True)
    ours, theirs = _files(second.model), _files(whole.model)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    states = [json.loads((m / "training_state" / "state.json").read_text()) for m in (second.model, whole.model)]
    assert states[0]["loader"] == states[1]["loader"]
    losses = [[e["loss"] for e in read_metrics(r.run / "run.jsonl") if e["kind"] == "step"] for r in (second, whole)]
    assert losses[0] == losses[1]


def test_mtp_and_bias_survive_save_load_and_further_training(make_config: Make, tmp_path: Path) -> None:
    result = pretrain(make_config(steps=4))
    model = minga.load(result.run)
    minga.save(model, tmp_path / "copy")
    again = minga.load(tmp_path / "copy")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    mtp = [name for name in again.state_dict() if name.startswith("mtp.")]
    assert mtp
    again.train()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    ids = torch.randint(0, 350, (2, 16))
    again.head(again.mtp_hidden(0, ids, again.hidden(ids))).square().mean().backward()
    optimizer.step()
    minga.save(again, tmp_path / "trained")
    trained = minga.load(tmp_path / "trained").state_dict()
    assert torch.equal(trained["mtp.0.eh_proj.weight"], again.state_dict()["mtp.0.eh_proj.weight"])
    assert not torch.equal(trained["mtp.0.eh_proj.weight"], model.state_dict()["mtp.0.eh_proj.weight"])


def test_settings_that_differ_on_resume_are_refused_by_name(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    _stop_after(monkeypatch, 2)
    pretrain(make_config())
    with pytest.raises(UserError, match="batch_size"):
        pretrain(make_config(batch_size=4))
    with pytest.raises(UserError, match="model"):
        pretrain(make_config(model=make_config().model.replace(num_hidden_layers=2)))


def test_hours_become_steps_that_are_kept_on_resume(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(recipe, "_seconds_a_step", lambda *args: 3600 * 0.96 / 12)
    config = make_config(steps=0, hours=1.0)
    _stop_after(monkeypatch, 3)
    assert pretrain(config, note=lines.append).step == 3
    assert lines == ["steps = 12: 60.0 minutes at 288.00 s a step, measured on this machine"]
    monkeypatch.setattr(recipe, "_seconds_a_step", lambda *args: 1.0)  # a faster machine must not change the run
    assert pretrain(config).step == 12


def test_calibration_does_not_change_the_run(make_config: Make, tmp_path: Path) -> None:
    config = make_config(steps=2, out=str(tmp_path / "a"))
    plain = pretrain(config)
    from minga.data.shards import open_shards

    fitted = recipe._fit_to_tokenizer(config, open_shards(config.data))
    assert recipe._seconds_a_step(fitted, open_shards(config.data)) > 0
    after = pretrain(dataclasses.replace(config, out=str(tmp_path / "b")))
    for name, value in _files(plain.model).items():
        assert torch.equal(value, _files(after.model)[name]), name


def test_a_damaged_newest_checkpoint_is_passed_over(make_config: Make) -> None:
    result = pretrain(make_config(steps=4, checkpoint_every=2))
    weights = result.model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert latest_checkpoint(result.run) == result.run / "checkpoint-000002"


def test_diverging_run_stops_with_one_clear_line(make_config: Make) -> None:
    with pytest.raises(UserError, match="diverged"):
        pretrain(make_config(lr_embedding=1e20, warmup=0.0))


def test_kill_9_at_random_moments_always_leaves_a_loadable_checkpoint(make_config: Make, tmp_path: Path) -> None:
    """A run that saves after every step is killed at random; what it leaves must open, and the run must go on."""
    config = make_config(steps=400, batch_size=1, accumulate=1, checkpoint_every=1)
    arguments = ["--data", config.data, "--out", config.out, "--preset", "tiny", "--steps", "400"]
    for key in ("batch_size", "accumulate", "seq_len", "eval_every", "checkpoint_every"):
        arguments += ["--set", f"{key}={getattr(config, key)}"]
    rng = random.Random(0)
    reached = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-m", "minga", "train", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # until it saves for the first time after it went on
            newest = latest_checkpoint(Path(config.out)) if Path(config.out).is_dir() else None
            if newest is not None and int(newest.name[-6:]) > reached:
                break
            time.sleep(0.05)
        time.sleep(rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        newest = latest_checkpoint(Path(config.out))
        assert newest is not None
        assert int(newest.name[-6:]) > reached
        reached = int(newest.name[-6:])
        assert minga.load(config.out).config.num_hidden_layers == 3
