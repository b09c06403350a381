"""Small models for the checkpoint tests, and a writer of GGUF files."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minga.checkpoint import names
from minga.config.model import ModelConfig
from minga.config.presets import tiny

Tensors = dict[str, Tensor]

_GQA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_interleave": False,
}
_V2 = {"model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False}

CONFIGS: dict[str, ModelConfig] = {
    "v3": tiny(),
    "v3-no-query-latent": tiny().replace(q_lora_rank=None, num_nextn_predict_layers=0),
    "v3-two-mtp": tiny().replace(num_nextn_predict_layers=2, n_shared_experts=2),
    "v3-no-shared": tiny().replace(n_shared_experts=0),
    "v3-tied": tiny().replace(tie_word_embeddings=True),
    "v3-every-other": tiny().replace(moe_layer_freq=2, first_k_dense_replace=0),
    "v3-biases": tiny().replace(attention_bias=True),
    "v3-no-router-bias": tiny().replace(topk_method="greedy"),
    "v3-dense": tiny().replace(first_k_dense_replace=3, num_nextn_predict_layers=0),
    "v2": tiny().replace(num_nextn_predict_layers=0, **_V2),
    "v2-biases-no-shared": tiny().replace(num_nextn_predict_layers=0, mlp_bias=True, n_shared_experts=0, **_V2),
    "llama": ModelConfig(model_type="llama", **_GQA),
    "llama-biases": ModelConfig(model_type="llama", attention_bias=True, mlp_bias=True, **_GQA),
    "qwen2": ModelConfig(model_type="qwen2", tie_word_embeddings=True, **_GQA),
    "qwen3": ModelConfig(model_type="qwen3", **_GQA),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Every variant of every family in turn."""
    return CONFIGS[request.param]


@pytest.fixture
def configs() -> dict[str, ModelConfig]:
    return CONFIGS


@pytest.fixture
def random_tensors() -> Callable[..., Tensors]:
    """random_tensors(config, dtype=float32, seed=0) -> a state dict under internal names."""

    def make(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        tensors: Tensors = {}
        for row in names.rows(config):
            if row.role is names.Role.PART:
                shape = (row.experts, row.stacked_rows, *row.shape[1:]) if row.experts else row.shape
                kept = torch.float32 if row.internal.endswith("e_score_correction_bias") else dtype
                tensors[row.internal] = torch.randn(shape, generator=generator).to(kept)
        return tensors

    return make


@pytest.fixture
def same() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]:
    """same(a, b) asserts equal names, types and bits."""

    def check(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        assert sorted(actual) == sorted(expected)
        for name, tensor in expected.items():
            assert actual[name].dtype == tensor.dtype, name
            assert torch.equal(actual[name], tensor), name

    return check


# ---------------------------------------------------------------------------------------------------- GGUF

TYPE_NUMBERS = {"F32": 0, "F16": 1, "Q8_0": 8, "BF16": 30}


def encode(tensor: Tensor, kind: str) -> bytes:
    """The numbers of a tensor in a GGUF type."""
    flat = tensor.float().contiguous().flatten()
    if kind == "Q8_0":
        blocks = flat.view(-1, 32)
        scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
        q = (blocks / scale.float().clamp(min=1e-12)).round().clamp(-127, 127).to(torch.int8)
        return torch.cat((scale.view(torch.uint8), q.view(torch.uint8)), 1).numpy().tobytes()
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    return flat.to(dtype).view(torch.uint8).numpy().tobytes()


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    """Type number and value; arrays take the type of their first item."""
    if isinstance(value, list):
        items = [_value(item) for item in value] or [_value(0)]
        return (
            struct.pack("<I", 9)
            + items[0][:4]
            + struct.pack("<Q", len(value))
            + b"".join(i[4:] for i in items if value)
        )
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<II", 4, value)


@pytest.fixture
def write_gguf() -> Callable[..., Path]:
    """write_gguf(path, metadata, tensors, kinds={}, version=3, alignment=32): a file, F32 unless `kinds` says else."""

    def write(
        path: Path,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        kinds: Mapping[str, str] | None = None,
        version: int = 3,
        alignment: int = 32,
    ) -> Path:
        if alignment != 32:
            metadata = {**metadata, "general.alignment": alignment}
        header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
        header += b"".join(_string(key) + _value(value) for key, value in metadata.items())
        body = b""
        for name, tensor in tensors.items():
            kind = (kinds or {}).get(name, "F32")
            dims = struct.pack(f"<I{tensor.ndim}Q", tensor.ndim, *reversed(tensor.shape))
            header += _string(name) + dims + struct.pack("<IQ", TYPE_NUMBERS[kind], len(body))
            body += encode(tensor, kind)
            body += bytes(-len(body) % alignment)
        path.write_bytes(header + bytes(-len(header) % alignment) + body)
        return path

    return write
