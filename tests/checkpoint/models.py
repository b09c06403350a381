"""Small models for the tests of files, and a writer of GGUF files."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def random_tensors(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for row in names.rows(config):
        if row.role is names.Role.PART:
            shape = (row.experts, row.stacked_rows, *row.shape[1:]) if row.experts else row.shape
            kept = torch.float32 if row.internal.endswith("e_score_correction_bias") else dtype
            tensors[row.internal] = torch.randn(shape, generator=generator).to(kept)
    return tensors


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


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, str] | None = None,
    version: int = 3,
    alignment: int = 32,
) -> Path:
    """A GGUF file at `path`, its tensors in F32 unless `kinds` says else."""
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


ARCH = {"deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2"}


def to_gguf(config: ModelConfig, internal: dict[str, Tensor], *, split: bool = True) -> tuple[dict, dict[str, Tensor]]:
    """Metadata and tensors as llama.cpp's converter writes them. `split`: kv_b in two parts, as since 2025."""
    arch = ARCH.get(config.model_type, config.model_type)
    tensors = {}
    for name, entry in names.gguf_table(config).items():
        tensor = internal[entry.internal]
        tensor = tensor[entry.place] if entry.place else tensor
        if arch == "llama" and ("attn_q." in name or "attn_k." in name):
            heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
            # LlamaModel.permute of convert_hf_to_gguf.py
            rows = tensor.shape[0]
            tensor = (
                tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
            )
        if split and name.endswith("attn_kv_b.weight"):
            per_head = tensor.view(config.num_attention_heads, -1, tensor.shape[-1])
            k, v = per_head.split([config.qk_nope_head_dim, config.v_head_dim], 1)
            tensors[name.replace("kv_b", "k_b")] = k.transpose(1, 2)
            tensors[name.replace("kv_b", "v_b")] = v
        else:
            tensors[name] = tensor
    return metadata_of(config, arch, split=split), tensors


def metadata_of(config: ModelConfig, arch: str, *, split: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers + config.num_nextn_predict_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope.rope_theta,
        "rope.dimension_count": config.rope_dim,
    }
    if config.is_mla:
        plain = {"attention.key_length": config.qk_head_dim, "attention.value_length": config.v_head_dim}
        absorbed = {
            "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
            "attention.value_length": config.kv_lora_rank,
            "attention.key_length_mla": config.qk_head_dim,
            "attention.value_length_mla": config.v_head_dim,
        }
        values |= (absorbed | {"attention.head_count_kv": 1}) if split else plain
        values |= {
            "attention.kv_lora_rank": config.kv_lora_rank,
            "leading_dense_block_count": config.first_k_dense_replace,
            "expert_count": config.n_routed_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_shared_count": config.n_shared_experts,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_weights_scale": config.routed_scaling_factor,
            "expert_weights_norm": config.norm_topk_prob,
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
        }
        values |= {"attention.q_lora_rank": config.q_lora_rank} if config.q_lora_rank else {}
        values |= {"expert_gating_func": 2} if config.scoring_func == "sigmoid" else {}
        values |= {"nextn_predict_layers": config.num_nextn_predict_layers} if config.num_nextn_predict_layers else {}
    elif config.head_dim * config.num_attention_heads != config.hidden_size:
        values |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in values.items()}}
