"""The models and the writer of `models.py` as fixtures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minga.config.model import ModelConfig
from tests.checkpoint import models


@pytest.fixture(params=models.CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Every variant of every family in turn."""
    return models.CONFIGS[request.param]


@pytest.fixture
def configs() -> dict[str, ModelConfig]:
    return models.CONFIGS


@pytest.fixture
def random_tensors() -> Callable[..., models.Tensors]:
    """random_tensors(config, dtype=float32, seed=0) -> a state dict under internal names."""
    return models.random_tensors


@pytest.fixture
def same() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]:
    """same(a, b) asserts equal names, types and bits."""

    def check(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        assert sorted(actual) == sorted(expected)
        for name, tensor in expected.items():
            assert actual[name].dtype == tensor.dtype, name
            assert torch.equal(actual[name], tensor), name

    return check


@pytest.fixture
def write_gguf() -> Callable[..., Path]:
    """write_gguf(path, metadata, tensors, kinds={}, version=3, alignment=32): a file, F32 unless `kinds` says else."""
    return models.write_gguf
