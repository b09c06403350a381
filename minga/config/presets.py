"""Named architectures. Each is a function, so that a preset is read like any other code and can be changed by `replace`.

`v2_lite` and `v3` are the published configurations, number for number (15.706 B and 671.026 B parameters without MTP);
they are here to be counted and planned with. `small` is the model B of our benchmarks. `laptop` is what `make demo`
trains in five minutes on two cores, and `tiny` what the tests build in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable

from minga.config.model import ModelConfig, RopeConfig


def tiny() -> ModelConfig:
    """0.2 M parameters with every part of the architecture present: query latent, groups, shared expert, MTP."""
    return ModelConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
        moe_intermediate_size=32, first_k_dense_replace=1, n_group=2, topk_group=1, routed_scaling_factor=1.0,
        num_nextn_predict_layers=1,
    )  # fmt: skip


def laptop() -> ModelConfig:
    """The demo's model: 3.3 M active of 5.3 M parameters (and 1.2 M of MTP), sized for two cores and five minutes.

    Twice the width reads fewer tokens in that time and ends higher (docs/log.md, 2026-11-22).
    """
    return ModelConfig(
        vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=3, max_position_embeddings=1024, q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
        moe_intermediate_size=192, first_k_dense_replace=1, routed_scaling_factor=1.0, num_nextn_predict_layers=1,
    )  # fmt: skip


def small() -> ModelConfig:
    """Model B of the benchmarks: 394 M parameters, 121.6 M active; 96.4 M read for a decoded token (one row of the embedding)."""
    return ModelConfig(
        vocab_size=32768, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=8192, q_lora_rank=384, kv_lora_rank=256, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=32, n_shared_experts=1, num_experts_per_tok=4,
        moe_intermediate_size=384, first_k_dense_replace=1, routed_scaling_factor=2.5,
    )  # fmt: skip


def v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite as published: 15.706 B parameters, 31,104 bytes of bf16 cache per token."""
    yarn = RopeConfig(
        "yarn",
        factor=40,
        original_max_position_embeddings=4096,
        beta_fast=32,
        beta_slow=1,
        mscale=0.707,
        mscale_all_dim=0.707,
    )
    return ModelConfig(
        model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=163840, bos_token_id=100000,
        eos_token_id=100001, rope=yarn, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408,
        first_k_dense_replace=1, topk_method="greedy", scoring_func="softmax", norm_topk_prob=False,
    )  # fmt: skip


def v3() -> ModelConfig:
    """DeepSeek-V3 as published: 671.026 B parameters and one MTP module besides, 70,272 bytes of bf16 cache per token."""
    yarn = RopeConfig(
        "yarn",
        factor=40,
        original_max_position_embeddings=4096,
        beta_fast=32,
        beta_slow=1,
        mscale=1.0,
        mscale_all_dim=1.0,
    )
    return ModelConfig(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61, num_attention_heads=128,
        num_key_value_heads=128, max_position_embeddings=163840, bos_token_id=0, eos_token_id=1, rope=yarn,
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048,
        first_k_dense_replace=3, n_group=8, topk_group=4, routed_scaling_factor=2.5, num_nextn_predict_layers=1,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "laptop": laptop,
    "small": small,
    "v2-lite": v2_lite,
    "v3": v3,
}
