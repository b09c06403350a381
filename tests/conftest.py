"""One thread for each test process, no GPU test where there is none, and a run small enough to train in seconds."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is loaded

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from minga.config import TrainConfig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    need_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not need_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in need_gpu:
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 documents of a made-up language, tokenized into 350 pieces."""
    from minga.data.shards import build_shards

    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = ["".join(rng.choices(["ka", "lo", "mi", "ru", "té", "n"], k=rng.randint(1, 3))) for _ in range(200)]
    for number in range(24):
        text = " ".join(words[int(200 * rng.random() ** 2)] for _ in range(400))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    out = tmp_path_factory.mktemp("shards") / "shards"
    build_shards([folder], out, vocab_size=350, val_fraction=0.1)
    return out


@pytest.fixture
def make_config(shards: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    from minga.config import TrainConfig
    from minga.config.presets import tiny

    def make(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {"data": str(shards), "out": str(tmp_path / "run"), "model": tiny(), "steps": 16}
        values |= {"batch_size": 2, "accumulate": 2, "seq_len": 32, "eval_every": 0, "checkpoint_every": 0}
        return TrainConfig(**(values | changes))

    return make


@pytest.fixture(scope="session")
def random_blocks() -> Callable[[str, int], Tensor]:
    """random_blocks(type, numbers): blocks of a GGUF type, random but for their float16 factors, which are small; numbers
    are at most about 1. torch's seed."""
    import torch

    from minga.checkpoint.ggml_types import TYPES
    from minga.quant.blocks import GGUF

    kinds = {kind.name: kind for kind in TYPES.values()}

    def make(name: str, numbers: int) -> Tensor:
        kind, format = kinds[name], GGUF[name]
        raw = torch.randint(0, 256, (numbers // kind.numbers, kind.num_bytes), dtype=torch.uint8)
        exponent = 0x04 if format.nested else 0x0C if format.bits == 8 else 0x1C  # 2^-14, 2^-12, 2^-8
        for at in {"Q6_K": [208]}.get(name, [0, 2] if format.minimum else [0]):
            raw[:, at + 1] = raw[:, at + 1] & 0x83 | exponent
        return raw.flatten()

    return make
