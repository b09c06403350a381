"""Hostile model files: random ones of every reader, and those that cost memory or time in a way of their own.

`python -m tests.fuzz` runs the same for longer, or guided by coverage.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from minga import store
from minga.checkpoint import hf, names
from minga.errors import UserError
from tests.checkpoint.models import CONFIGS, random_tensors
from tests.fuzz.__main__ import NAMES
from tests.fuzz.readers import Finding, Reader, check, make_readers, warm_up


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return make_readers(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", NAMES)
def test_hostile_files(readers: dict[str, Reader], name: str) -> None:
    reader, dice, refused = readers[name], Random(0), 0
    warm_up(reader)
    for _ in range(60):
        data = reader.mutate(dice.choice(reader.seeds), dice)
        refused += check(reader, data)
    assert 5 < refused < 60


def _refuse(line: str) -> Callable[[bytes], None]:
    def refuse(_: bytes) -> None:
        error = UserError("")
        error.args = (line,)
        raise error

    return refuse


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda _: {}["a"], "KeyError at "),
        (lambda _: torch.empty(1).view(3), "RuntimeError at "),
        (lambda _: bytearray(80_000_000), "(Python's)"),
        (lambda _: torch.empty(50_000_000), "(largest tensor)"),
        (_refuse("two\nlines"), "no printable line"),
        (_refuse("x" * 2000), "no printable line"),
    ],
)
def test_what_breaks_the_rule_is_found(use: Callable[[bytes], None], message: str) -> None:
    with pytest.raises(Finding) as found:
        check(Reader([b""], lambda data, dice: data, use), b"")
    assert message in str(found.value)


# ---------------------------------------------------------------------------------------------------- bombs


def _open(path: Path, use: Callable[[Path], object] = store.load) -> str:
    """What the refusal of this file says, once it is sure that the rule holds."""
    said = []

    def use_it(_: bytes) -> None:
        try:
            use(path)
        except UserError as error:
            said.append(str(error))
            raise

    inside = sum(file.stat().st_blocks * 512 for file in path.iterdir()) if path.is_dir() else path.stat().st_size
    assert check(Reader([], lambda data, dice: data, use_it), bytes(min(inside, 30_000_000)))
    return said[0]


def _gguf_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _gguf(path: Path, num_tensors: int, num_entries: int, rest: bytes) -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_entries) + rest)
    return path


@pytest.mark.parametrize(("kind", "item"), [(0, b"\1"), (3, b"\1\2"), (6, b"\1\2\3\4"), (7, b"\1")])
def test_gguf_numbers_take_no_more_than_their_bytes(tmp_path: Path, kind: int, item: bytes) -> None:
    """As a list, 20 MB of uint8 would be 160 MB, twice."""
    count = 20_000_000 // len(item)
    array = _gguf_string(b"k") + struct.pack("<IIQ", 9, kind, count) + item * count
    assert "architecture is None" in _open(_gguf(tmp_path / "m.gguf", 0, 1, array))


def test_gguf_headers_have_a_limit(tmp_path: Path) -> None:
    path = _gguf(tmp_path / "m.gguf", 0, 1, struct.pack("<Q", 1 << 27))
    os.truncate(path, 1 << 28)  # sparse: it takes no room on the disk
    assert "134217728 bytes of a metadata key do not fit into the 67108864 bytes that a header may have" in _open(path)
    entry = _gguf_string(b"") + struct.pack("<IB", 0, 0)
    path = _gguf(tmp_path / "n.gguf", 0, 100_000, entry * 100_000)
    assert "0 tensors and 100000 metadata entries are too many" in _open(path)


def test_texts_that_are_far_too_long(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("[" + "[]," * 3_000_000 + "[]]")
    assert "9000004 bytes are too many" in _open(folder)
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama"].to_hf()))
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 27)
    assert "has more than 67108864 bytes" in _open(folder, store.load_tokenizer)


def _folder(path: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / hf.SINGLE)
    return path


def test_one_expert_does_not_speak_for_all(tmp_path: Path) -> None:
    """The stack of a layer's experts would be 400 MB; the file has one expert of the promised size, a hundred empty."""
    config = CONFIGS["v3"].replace(
        num_nextn_predict_layers=0, num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=100, n_group=1
    )
    config = config.replace(topk_group=1, moe_intermediate_size=8192)
    shapes = {name: entry.shape for name, entry in names.hf_table(config).items()}
    empty = [name for name in shapes if ".experts." in name and ".experts.0." not in name]
    tensors = {name: torch.zeros(0 if name in empty else shape) for name, shape in shapes.items()}
    said = _open(_folder(tmp_path / "m", config.to_hf(), tensors))
    assert re.search(r"experts\.\d+\.\w+_proj\.weight is 0, but the config asks for", said)


def test_a_promise_of_experts_in_mtp_modules_alone(tmp_path: Path) -> None:
    config = CONFIGS["v3"].replace(first_k_dense_replace=100, n_group=1, topk_group=1)
    tensors = {name: tensor.clone() for name, tensor in names.to_public(random_tensors(config), config).items()}
    described = config.to_hf() | {"n_routed_experts": 2**31 - 1}
    assert "n_routed_experts is 2147483647, but there are only" in _open(_folder(tmp_path / "m", described, tensors))


def test_a_promise_of_a_huge_model(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    tensors = {name: tensor.clone() for name, tensor in names.to_public(random_tensors(config), config).items()}
    described = config.to_hf() | {"hidden_size": 10**9, "vocab_size": 2**31 - 1}
    assert "but the config asks for" in _open(_folder(tmp_path / "m", described, tensors))


@pytest.mark.parametrize("side", [2**16 + 1, 10**9, 2**63, 10**30])
def test_blocks_of_fp8_that_no_weight_fills(tmp_path: Path, side: int) -> None:
    """`fp8` fills blocks up, to 4 GB each if they were believed."""
    config = CONFIGS["llama"]
    tensors = {name: tensor.clone() for name, tensor in names.to_public(random_tensors(config), config).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), name + names.SCALE_INV: torch.ones(1, 1)}
    described = config.to_hf() | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [side, 32]}}
    assert "two positive numbers up to 65536" in _open(_folder(tmp_path / "m", described, tensors))
