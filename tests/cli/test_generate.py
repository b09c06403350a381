"""pytest tests/cli/test_generate.py"""

from __future__ import annotations

import argparse
import io
import json
import sys

import pytest
import torch

from minga.cli import generate
from minga.config.presets import tiny
from minga.data.tokenizer import train_bpe
from minga.engine.llm import LLM
from minga.engine.sampler import SamplingParams
from minga.errors import UserError
from minga.model.transformer import Transformer

VOCABULARY = 259


@pytest.fixture(scope="module")
def parts():
    config = tiny().replace(vocab_size=VOCABULARY, initializer_range=0.2)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    return model, train_bpe(["bytes"], VOCABULARY)


@pytest.fixture
def opened(parts, monkeypatch) -> dict:
    """What the command asked of LLM, which opens the tiny model whatever the path."""
    asked = {}

    def fake(path, *, quant, speculate, cache, max_memory):
        asked.update(path=path, quant=quant, speculate=speculate)
        return LLM.from_parts(*parts, speculate=speculate, cache=cache, max_memory=max_memory)

    monkeypatch.setattr("minga.engine.llm.LLM", fake)
    return asked


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    generate.add_parser(parser.add_subparsers())
    args = parser.parse_args(["generate", *arguments])
    return args.run(args)


def test_text_goes_to_stdout_and_the_rest_to_stderr(opened, parts, capsys):
    assert call("a-model", "--prompt", "hola", "--max-tokens", "12", "--temperature", "0") == 0
    out, err = capsys.readouterr()
    expected = LLM.from_parts(*parts).generate("hola", SamplingParams(temperature=0, max_tokens=12))[0]
    assert out == expected.text + "\n"
    assert "12 tokens" in err and "of guesses right" in err
    assert opened == {"path": "a-model", "quant": None, "speculate": True}


def test_json(opened, parts, capsys):
    flags = ["--seed", "3", "--max-tokens", "12", "--quant", "int8", "--no-speculate", "--json"]
    assert call("m", "--prompt", "hola", *flags) == 0
    document = json.loads(capsys.readouterr().out)
    assert parts[1].decode(document["token_ids"]) == document["text"]
    assert (document["finish_reason"], document["num_prompt_tokens"], document["acceptance"]) == ("length", 4, None)
    assert document["tokens_per_second"] > 0 and document["ttft"] > 0
    assert opened == {"path": "m", "quant": "int8", "speculate": False}


def test_the_same_seed_gives_the_same_text(opened, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        call("m", "--prompt", "hola", "--max-tokens", "12", "--seed", seed)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_piped_prompt(opened, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hola"))
    call("m", "--max-tokens", "12", "--temperature", "0")
    piped = capsys.readouterr().out
    call("m", "--prompt", "hola", "--max-tokens", "12", "--temperature", "0")
    assert capsys.readouterr().out == piped


def test_a_terminal_without_a_prompt_is_refused(opened, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(UserError, match="--prompt"):
        call("m")


def test_piped_bytes_that_are_no_text(opened, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ok \xff"), encoding="utf-8"))
    with pytest.raises(UserError, match="byte 3"):
        call("m")


def test_chat_wraps_the_prompt(opened, parts, capsys):
    call("m", "--prompt", "hola", "--chat", "--json", "--max-tokens", "5")
    document = json.loads(capsys.readouterr().out)
    assert document["num_prompt_tokens"] == len(parts[1].render_chat([{"role": "user", "content": "hola"}]))


def test_prompts_file(opened, parts, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("uno\n\ndos\n", encoding="utf-8")
    call("m", "--prompts-file", str(file), "--temperature", "0", "--max-tokens", "8", "--json")
    answers = json.loads(capsys.readouterr().out)["completions"]
    expected = LLM.from_parts(*parts).generate(["uno", "dos"], SamplingParams(temperature=0, max_tokens=8))
    assert [(a["prompt"], a["token_ids"]) for a in answers] == [
        ("uno", expected[0].token_ids),
        ("dos", expected[1].token_ids),
    ]
    call("m", "--prompts-file", str(file), "--temperature", "0", "--max-tokens", "8")
    assert capsys.readouterr().out == f"==> uno\n{expected[0].text}\n\n==> dos\n{expected[1].text}\n\n"


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), (b"\n\n", "no prompt"), (b"a\xff", "byte 1")])
def test_bad_prompts_file(opened, tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        call("m", "--prompts-file", str(file))


def test_a_bad_flag_is_refused_before_the_model_is_opened(opened):
    with pytest.raises(UserError, match="top_p"):
        call("m", "--prompt", "x", "--top-p", "2")
    assert opened == {}


def test_ctrl_c(opened, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "_write_one", interrupted)
    assert call("m", "--prompt", "x") == 130
    assert "stopped" in capsys.readouterr().err
