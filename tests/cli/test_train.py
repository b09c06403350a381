"""The main job by its commands: train, quantize, eval, each as a user calls it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minga.cli.main import main
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
