from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import minga
from minga.config import TrainConfig
from minga.data.loader import Loader
from minga.data.shards import build_shards, open_shards
from minga.errors import UserError
from minga.planner.dial import Decisions
from minga.recipes import pretrain as recipe
from minga.recipes.pretrain import pretrain
from minga.runtime.metrics import read_metrics
from minga.store import latest_checkpoint
from minga.train import step as train_step_module

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
    whole = pretrain(make_config(out=str(tmp_path / "whole"), **{"eval_every": 3, **changes}))
    halves = make_config(out=str(tmp_path / "halves"), **{"eval_every": 3, **changes})
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
    monkeypatch.setattr(recipe, "measure", lambda *args, **kwargs: recipe.Pace(288.0, 0.0))
    config = make_config(steps=0, hours=1.0)
    _stop_after(monkeypatch, 3)
    assert pretrain(config, note=lines.append).step == 3
    assert lines[0].startswith("steps = 12: 60.0 minutes, 60.0 of them for steps of 288 s")
    monkeypatch.setattr(
        recipe, "measure", lambda *args, **kwargs: recipe.Pace(1.0, 0.0)
    )  # a faster machine must not change the run
    assert pretrain(config).step == 12


def test_evaluation_and_time_already_spent_are_part_of_the_hours(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=0, hours=1.0, eval_every=3, eval_tokens=30)
    held_out = open_shards(config.data).manifest.splits["val"].num_tokens
    monkeypatch.setattr(recipe, "measure", lambda *args, **kwargs: recipe.Pace(100.0, 10.0))
    monkeypatch.setattr(recipe, "train_step", lambda *args, **kwargs: pytest.fail("not to be reached"))
    monkeypatch.setattr(recipe, "Watch", lambda *args: pytest.fail("resolved"))
    spent = 3600 - 10 * held_out - 1700  # what is left is 1,700 s
    with pytest.raises(pytest.fail.Exception, match="resolved"):
        pretrain(config, plan=Decisions({}, (), spent))
    assert json.loads(Path(config.out, "run.json").read_text())["steps"] == int(1700 * 0.98 / (100 + 10 * 10))


def test_the_run_folder_tells_what_was_read(make_config: Make) -> None:
    config = make_config(steps=1)
    run = pretrain(config).run
    manifest = json.loads((run / "data-manifest.json").read_text())
    shards = open_shards(config.data)
    assert manifest["fingerprint"] == shards.manifest.fingerprint
    assert manifest["tokenizer_sha256"] == shards.manifest.tokenizer_sha256
    assert manifest["file_bytes"]["train.bin"] == (shards.path / "train.bin").stat().st_size
    assert manifest["splits"]["train"]["num_tokens"] == shards.manifest.splits["train"].num_tokens
    assert len(manifest["sources"]) == 24


def test_each_step_says_what_one_watches(make_config: Make) -> None:
    run = pretrain(make_config(steps=11, eval_every=5)).run
    log = read_metrics(run / "run.jsonl")
    steps = [entry for entry in log if entry["kind"] == "step"]
    assert all(0 < entry["mfu"] < 1 for entry in steps)
    assert all(entry["memory"] > 10**8 for entry in steps)
    assert steps[-1]["seconds_left"] == 0.0
    assert steps[0]["seconds_left"] == pytest.approx(10 * steps[0]["seconds"])
    evaluations = [entry["step"] for entry in log if entry["kind"] == "eval"]
    assert evaluations == [5, 10, 11]
    assert [entry["step"] for entry in log if entry["kind"] == "sample"] == evaluations
    assert all(entry["mtp_acceptance"] is not None for entry in log if entry["kind"] == "eval")
    manifest = open_shards(make_config().data).manifest.splits["train"]
    bits = steps[-1]["loss"] / math.log(2) * manifest.num_tokens / manifest.num_bytes
    assert steps[-1]["train_bits_per_byte"] == pytest.approx(bits)


def test_calibration_does_not_change_the_run(make_config: Make, tmp_path: Path) -> None:
    config = make_config(steps=2, out=str(tmp_path / "a"))
    plain = pretrain(config)
    fitted = recipe.fit_to_tokenizer(config, open_shards(config.data))
    pace = recipe.measure(fitted, open_shards(config.data), seconds=0.1)
    assert pace.step > 0
    assert 0 < pace.evaluated_token < pace.step
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


# ---------------------------------------------------------------------------------------------------- the guard


def test_a_spike_is_skipped_told_and_repeated_on_resume(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gradient 1000 times too large at step 45 is passed over, also by a run that was stopped before it and resumed."""
    plain, true_loss, mark = Loader.next_batch, train_step_module.batch_loss, -1

    def next_batch(self: Loader, seq_len: int | None = None) -> Any:
        batch = plain(self, seq_len)
        if self.state_dict()["num_windows"] == 45:
            batch = dataclasses.replace(batch, num_bytes=mark)
        return batch

    def batch_loss(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        loss, main, mtp = true_loss(model, batch, *args, **kwargs)
        return (1000 * loss if batch.num_bytes == mark else loss), main, mtp

    monkeypatch.setattr(train_step_module, "batch_loss", batch_loss)
    monkeypatch.setattr(Loader, "next_batch", next_batch)
    settings: dict[str, Any] = {"steps": 48, "batch_size": 1, "accumulate": 1, "spike_skip": 10.0, "mtp_from": 1.0}
    settings |= {"warmup": 0.0, "ema_decay": 0.9}
    whole = pretrain(make_config(**settings, out=str(tmp_path / "whole")))
    halves = make_config(**settings, out=str(tmp_path / "halves"))
    with monkeypatch.context() as context:
        _stop_after(context, 40)
        pretrain(halves)
    second = pretrain(halves)
    skips = [[e for e in read_metrics(r.run / "run.jsonl") if e["kind"] == "skip"] for r in (whole, second)]
    assert [entry["step"] for entry in skips[0]] == [45]
    assert skips[0][0]["reason"].startswith("log gradient norm ")
    assert skips[0] == skips[1]
    assert "step 45 was skipped: " in capsys.readouterr().err
    for name, value in _files(second.model).items():
        assert torch.equal(value, _files(whole.model)[name]), name
    for name, value in load_file(second.model / "ema" / "model.safetensors").items():
        assert torch.equal(value, load_file(whole.model / "ema" / "model.safetensors")[name]), name


def test_divergence_names_step_layer_and_checkpoint(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    original, done = recipe.train_step, []

    def step(model: Any, *args: Any, **kwargs: Any) -> Any:
        done.append(1)
        if len(done) == 6:
            model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, inputs, out: out * float("nan"))
        return original(model, *args, **kwargs)

    monkeypatch.setattr(recipe, "train_step", step)
    config = make_config(checkpoint_every=2)
    where = r"training diverged at step 6: .*output of model\.layers\.1\.self_attn.*last good checkpoint is .*-000004"
    with pytest.raises(UserError, match=where) as error:
        pretrain(config)
    assert "\n" not in str(error.value)
    assert read_metrics(Path(config.out) / "run.jsonl")[-1]["reason"] in str(error.value)
    monkeypatch.undo()
    assert pretrain(config).finished


def test_weights_that_are_no_numbers_never_become_a_checkpoint(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, done = recipe.train_step, []

    def step(model: Any, *args: Any, **kwargs: Any) -> Any:
        metrics = original(model, *args, **kwargs)
        done.append(1)
        if len(done) == 4:
            model.model.norm.weight.data[0] = float("inf")
        return metrics

    monkeypatch.setattr(recipe, "train_step", step)
    config = make_config(checkpoint_every=2)
    with pytest.raises(UserError, match=r"the weight model\.norm\.weight is not finite .*checkpoint-000002"):
        pretrain(config)
    assert latest_checkpoint(Path(config.out)) == Path(config.out) / "checkpoint-000002"


# ---------------------------------------------------------------------------------------------------- warm-ups and mean


def test_warmups_read_each_token_once_and_resume_exactly(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 1, 2, 3 micro-batches, rows of 64 and 128, two threads reading ahead: stopped on the way or not."""
    settings: dict[str, Any] = {"steps": 12, "accumulate": 3, "seq_len": 128, "batch_warmup": 0.5, "seq_warmup": 0.75}
    whole = pretrain(make_config(**settings, workers=2, out=str(tmp_path / "whole")))
    halves = make_config(**settings, out=str(tmp_path / "halves"))
    with monkeypatch.context() as context:
        _stop_after(context, 5)
        assert pretrain(halves).step == 5
    second = pretrain(dataclasses.replace(halves, workers=1))
    for name, value in _files(second.model).items():
        assert torch.equal(value, _files(whole.model)[name]), name
    steps = [e for e in read_metrics(whole.run / "run.jsonl") if e["kind"] == "step"]
    micro = [1, 1, 2, 2, 3, 3] + [3] * 6
    assert [entry["tokens"] for entry in steps] == [256 * sum(micro[: n + 1]) for n in range(12)]
    state = json.loads((second.model / "training_state" / "state.json").read_text())
    assert state["loader"]["num_windows"] == 2 * sum(micro)


def test_the_mean_of_the_weights_is_a_model_beside_the_last(make_config: Make) -> None:
    lines: list[str] = []
    result = pretrain(make_config(ema_decay=0.8), note=lines.append)
    mean, last = minga.load(result.model / "ema"), minga.load(result.model)
    assert not torch.equal(mean.model.norm.weight, last.model.norm.weight)
    assert minga.LLM(result.model / "ema").generate("ka", minga.SamplingParams(max_tokens=2))
    told = [e for e in read_metrics(result.run / "run.jsonl") if e["kind"] == "eval_ema"]
    assert len(told) == 1 and 0 < told[0]["bits_per_byte"] < 8
    assert any(line.startswith(f"mean of the weights: {told[0]['bits_per_byte']:.3f} bits") for line in lines)
    without = pretrain(make_config(out=str(result.run.parent / "without")))
    for name, value in _files(without.model).items():
        assert torch.equal(value, _files(result.model)[name]), name  # watching changes nothing


# ---------------------------------------------------------------------------------------------------- bad input


def refused(config: TrainConfig, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        pretrain(config)
    assert "\n" not in str(error.value)


@pytest.fixture
def begun(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The settings of a run that was stopped after two steps."""
    config = make_config()
    with monkeypatch.context() as context:
        _stop_after(context, 2)
        pretrain(config)
    return config


def test_less_text_than_a_batch_leaves_nothing_behind(make_config: Make) -> None:
    config = make_config(batch_size=10_000)
    refused(config, r"the train split has \d+ tokens, less than one batch of 10000 x 32")
    assert not Path(config.out).exists()


def test_a_folder_without_shards(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(make_config(data=str(tmp_path / "empty")), r"empty has no manifest\.json")
    refused(make_config(data=str(tmp_path / "nowhere")), "nowhere does not exist")
    assert not Path(make_config().out).exists()


def test_a_run_folder_that_is_a_file_or_lies_in_one(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(make_config(out=str(tmp_path / "file")), r"cannot write the run folder: a file stands there .*--out")
    refused(make_config(out=str(tmp_path / "file" / "run")), r"cannot write the run folder: Not a directory")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_folder_that_cannot_be_written(make_config: Make, tmp_path: Path) -> None:
    """Of another user; for root, who may write everywhere, on a disk that is mounted to be read only."""
    place = tmp_path / "place"
    (place / "run").mkdir(parents=True)
    if os.geteuid() != 0:
        (place / "run").chmod(0o500)
        refused(make_config(out=str(place / "run")), "cannot write the run folder: Permission denied")
        return
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], capture_output=True, check=False
    ).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        refused(make_config(out=str(place / "run")), "cannot write the run folder: Read-only file system")
    finally:
        subprocess.run(["umount", place], check=True)


def test_settings_that_cannot_be_read(begun: TrainConfig) -> None:
    file = Path(begun.out) / "run.json"
    good = file.read_text()
    for content in ("", "{", good[:-10], "[]", "{}", '{"steps": "16"}', "[" * 100_000, None):
        file.unlink() if content is None else file.write_text(content)
        refused(begun, r"the run's settings cannot be read: .*run\.json.*give another --out")
    file.write_text(good)
    assert pretrain(begun).finished


def test_a_checkpoint_of_another_model(begun: TrainConfig, make_config: Make, tmp_path: Path) -> None:
    """Copied in by hand: run.json is that of the run, so only the checkpoint tells."""
    other = make_config(steps=2, model=begun.model.replace(num_hidden_layers=2), out=str(tmp_path / "other"))
    checkpoint = pretrain(other).model
    checkpoint.rename(Path(begun.out) / "checkpoint-000009")
    refused(begun, r"another model config than this run .*checkpoint-000009")


def test_a_model_without_training_state(begun: TrainConfig) -> None:
    minga.save(
        minga.load(begun.out), Path(begun.out) / "checkpoint-000009", tokenizer=open_shards(begun.data).tokenizer
    )
    refused(begun, "a model without training state")


def test_another_corpus_and_another_tokenizer(begun: TrainConfig, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("another text, and a longer one than it seems. " * 500)
    tokenizer = open_shards(begun.data).tokenizer
    build_shards([text], tmp_path / "same", tokenizer=tokenizer, val_fraction=0.1)
    refused(dataclasses.replace(begun, data=str(tmp_path / "same")), "the corpus has changed since the checkpoint")
    build_shards([text], tmp_path / "other", vocab_size=280, val_fraction=0.1)
    refused(dataclasses.replace(begun, data=str(tmp_path / "other")), "the run's tokenizer is not that of the data")
    assert pretrain(begun).finished


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(begun: TrainConfig) -> None:
    weights = latest_checkpoint(Path(begun.out)) / "model.safetensors"  # type: ignore[operator]
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(begun, r"no checkpoint of this run is whole .*give another --out")


@pytest.mark.parametrize(
    ("name", "value"),
    [("ema_decay", 1.0), ("ema_decay", -0.1), ("batch_warmup", 2.0), ("router_z_loss", -1.0), ("spike_skip", -1.0)],
)
def test_settings_out_of_range(make_config: Make, name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}"):
        make_config(**{name: value})
