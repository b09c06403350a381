from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from minga.cli import data
from minga.data.shards import open_shards
from minga.data.tokenizer import Tokenizer
from minga.errors import UserError


def minga(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser(prog="minga")
    data.add_parser(parser.add_subparsers())
    args = parser.parse_args(["data", *map(str, arguments)])
    return data.run(args)


def test_tokenizes_and_reports(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert minga(corpus, "--out", out, "--vocab-size", "512", "--val-fraction", "0.1") == 0
    captured = capsys.readouterr()
    manifest = open_shards(out).manifest
    assert captured.out == ""
    for expected in (
        "read: ",
        "train tokenizer: ",
        "write: ",
        f"{manifest.splits['train'].num_tokens:,}",
        "bytes per token",
    ):
        assert expected in captured.err
    assert (manifest.vocab_size, manifest.val_fraction) == (512, 0.1)


def test_json_and_a_given_tokenizer(
    corpus: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save(tmp_path / "model")
    out = tmp_path / "out"
    for given, built in [(tmp_path / "model", True), (tmp_path / "model" / "tokenizer.json", False)]:
        assert minga(corpus, "--out", out, "--tokenizer", given, "--exclude", "0*.txt", "--json") == 0
        captured = capsys.readouterr()
        result = json.loads(captured.out)
        assert (result["built"], result["path"]) == (built, str(out))
        assert result["tokenizer_sha256"] == tokenizer.sha256
        assert result["num_documents"] == open_shards(out).manifest.num_documents == 20
        assert result["bytes_per_token"] > 1
    assert "is up to date" in captured.err


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="does not exist"):
        minga(tmp_path / "none", "--out", tmp_path / "out")
    with pytest.raises(UserError, match="No such file"):
        minga(tmp_path, "--out", tmp_path / "out", "--tokenizer", tmp_path / "none.json")
    with pytest.raises(SystemExit):
        minga(tmp_path, "--out", tmp_path / "out", "--tokenizer", "x", "--vocab-size", "9")
    with pytest.raises(SystemExit):
        minga(tmp_path)
    assert "--out" in capsys.readouterr().err


def test_help_has_an_example_and_loads_nothing_heavy() -> None:
    code = (
        "import argparse, sys; from minga.cli import data; p = argparse.ArgumentParser();"
        "data.add_parser(p.add_subparsers()); heavy = {'torch', 'tokenizers', 'numpy', 'rich'} & set(sys.modules);"
        "assert not heavy, heavy; p.parse_args(['data', '--help'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "minga data corpus/ --out shards" in result.stdout
