"""What a user is told, through Python and on the command line: one line with the place and the numbers, and exit code 2.

And what opening a model costs: nothing but the mapping of its files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import minga
from minga.checkpoint import hf
from minga.cli.main import main
from minga.config import ModelConfig
from minga.config.presets import tiny
from minga.data.tokenizer import train_bpe
from minga.errors import UserError
from minga.model.transformer import Transformer
from tests.checkpoint.models import CONFIGS, Tensors, random_tensors, to_gguf, write_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model in a file, `one`, and in shards, `many`."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_bpe(["ab cd " * 50], 262)
    model = Transformer(tiny().replace(vocab_size=262)).init_weights(torch.Generator().manual_seed(0))
    minga.save(model, folder / "one", tokenizer=tokenizer)
    hf.write_folder(folder / "many", model.config.to_hf(), model.state_dict(), max_shard_bytes=300_000)
    tokenizer.save(folder / "many")
    return folder


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def refused(path: Path | str, capsys: pytest.CaptureFixture[str], *flags: str, **options: Any) -> str:
    """What `minga.LLM` says of a model, once it is sure that the command line says the same."""
    with pytest.raises(UserError) as caught:
        minga.LLM(path, **options).generate("ab", minga.SamplingParams(max_tokens=1))
    said = str(caught.value)
    capsys.readouterr()
    assert main(["generate", os.fspath(path), "--prompt", "ab", "--json", *flags]) == 2
    out, err = capsys.readouterr()
    assert err == f"error: {said}\n"
    assert json.loads(out) == {"error": {"message": said}}
    assert said.isprintable()
    return said


# ---------------------------------------------------------------------------------------------------- files


def _cut(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-100])


def _loop(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return change


def _pipe(folder: Path) -> None:
    file = shard(folder)
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("one", lambda m: (m / hf.SINGLE).unlink(), "neither model.safetensors nor"),
        ("one", lambda m: (m / hf.SINGLE).write_bytes(b""), "cut short or damaged: header too small"),
        ("one", _loop(hf.SINGLE), "neither model.safetensors nor"),
        ("one", _loop("config.json"), "neither a config.json nor"),
        ("one", lambda m: (m / "tokenizer.json").unlink(), "has no tokenizer.json"),
        ("many", _cut, "cut short or damaged: incomplete metadata, file not fully covered"),
        ("many", lambda m: shard(m).unlink(), "a file of the model is missing"),
        ("many", _pipe, "this is no file"),
    ],
)
def test_folders(
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    change: Callable[[Path], object],
    message: str,
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(whole / kind, folder)
    change(folder)
    said = refused(folder, capsys)
    assert message in said and str(folder) in said


def test_paths(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "the file is empty" in refused(tmp_path / "empty.gguf", capsys)
    assert "neither a config.json nor a training checkpoint" in refused(tmp_path / "empty", capsys)
    for path in (tmp_path / "a", tmp_path / "a" / "m", tmp_path / "empty.gguf" / "m", tmp_path / "m\udcff"):
        assert "nothing at this path" in refused(path, capsys)
    assert "File name too long" in refused(tmp_path / ("x" * 300), capsys)
    assert "File name too long" in refused("x/" * 5000, capsys)
    assert r"embedded null byte (a\x00b)" in refused("a\0b", capsys)


def test_a_path_that_is_not_utf8(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """safetensors opens no such file; ours are opened by Python, which can."""
    folder = tmp_path / "na\udcffme"
    shutil.copytree(whole / "one", folder)
    assert r"na\udcffme/model.safetensors). rename it" in refused(folder, capsys)
    config = CONFIGS["qwen2"]
    write_gguf(folder / "m.gguf", *to_gguf(config, random_tensors(config)))
    assert minga.load(folder / "m.gguf").config.vocab_size == config.vocab_size


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder, and a user who may read of it only what its modes say: root may read everything."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    os.seteuid(os.getuid())
    for path in folder.iterdir():
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("one", "config.json"),
        ("one", hf.SINGLE),
        ("one", "tokenizer.json"),
        ("many", "shard"),
        ("one", "."),
        ("", "a.gguf"),
    ],
)
def test_without_permission(
    whole: Path, nobody: Path, capsys: pytest.CaptureFixture[str], kind: str, name: str
) -> None:
    path = nobody / (kind or name)
    if kind:
        shutil.copytree(whole / kind, path)
        file = shard(path) if name == "shard" else path / name
    else:
        file = path
        path.write_bytes(b"GGUF")
    file.chmod(0)
    if os.getuid() == 0:
        os.seteuid(65534)
    said = refused(path, capsys)
    assert "Permission denied" in said and str(path) in said


# ---------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("1MB", r"needs 1\.\d\d MB of weights and 0\.\d\d MB of cache, and max_memory is 1\.00 MB"),
        ("lots", "max_memory is 'lots'"),
        ("-1", "max_memory is '-1'"),
        ("9" * 400, "max_memory is '999"),
    ],
)
def test_memory(whole: Path, capsys: pytest.CaptureFixture[str], size: str, message: str) -> None:
    assert re.search(message, refused(whole / "one", capsys, "--max-memory", size, max_memory=size))


@pytest.mark.parametrize("num_drafts", [0, 5, -1, 1.5, "2", True])
def test_drafts(whole: Path, num_drafts: Any) -> None:
    with pytest.raises(UserError, match=r"num_drafts is .* a whole number from 1 to 4"):
        minga.LLM(whole / "one", num_drafts=num_drafts)


def test_quant(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for quant in ("int3", 8, ""):
        with pytest.raises(UserError, match=r"quant .* is not known .*int8, int4"):
            minga.LLM(whole / "one", quant=quant)
    assert main(["generate", str(whole / "one"), "--prompt", "ab", "--quant", "int3"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "'int3'" in err and "'int8', 'int4'" in err


def test_a_prompt_longer_than_the_context(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "ab cd " * 500
    with pytest.raises(UserError) as caught:
        minga.LLM(whole / "one").generate(prompt)
    assert "the prompt has 1500 tokens and the model's context 512" in str(caught.value)
    assert main(["generate", str(whole / "one"), "--prompt", prompt]) == 2
    assert capsys.readouterr() == ("", f"error: {caught.value}\n")


# ---------------------------------------------------------------------------------------------------- what opening costs


_SMALL = {
    "model_type": "qwen2",
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "rope_interleave": False,
}


def _own_memory() -> int:
    """Bytes of memory that are this process's alone: not those of mapped files (proc(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("form", ["folder", "sharded", "gguf"])
def test_float32_weights_are_mapped_and_not_copied(tmp_path: Path, form: str) -> None:
    """Whether they are read or not: 140 MB of weights, and not a tenth of it is the process's own."""
    config = ModelConfig(**_SMALL)
    tensors: Tensors = random_tensors(config)
    path = tmp_path / ("m.gguf" if form == "gguf" else "m")
    if form == "gguf":
        write_gguf(path, *to_gguf(config, tensors))
    else:
        hf.write_folder(path, config.to_hf(), tensors, max_shard_bytes=10**8 if form == "sharded" else 10**10)
    size = sum(tensor.nbytes for tensor in tensors.values())
    before = _own_memory()
    model = minga.load(path)
    opened = _own_memory()
    assert all(bool(torch.isfinite(value[0]).all()) for value in model.state_dict().values())
    sums = sum(float(value.sum()) for value in model.state_dict().values())
    read = _own_memory()
    assert sums == pytest.approx(sum(float(tensor.sum()) for tensor in tensors.values()), rel=1e-3)
    assert size > 100e6
    assert opened - before < 0.1 * size and read - before < 0.1 * size
