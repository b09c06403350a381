"""pytest tests/model/test_parity.py -- the same logits as transformers, on random weights."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from minga.config import ModelConfig
from minga.model.transformer import Transformer

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
LENGTH = 80  # beyond the 64 positions that the stretched ropes below were trained on

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
MLA = BASE | {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
GQA = BASE | {"num_key_value_heads": 2}
TRAINED = {"factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
YARN |= TRAINED
UNEQUAL = YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, **TRAINED},
    "yarn-untruncated": {"rope_type": "yarn", "rope_theta": 1e4, "truncate": False, **TRAINED},
    "llama3": {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **TRAINED},
}


def v3_cases(count: int) -> list[dict[str, Any]]:
    """A sample of all combinations, the same in every run."""
    choices = {
        "q_lora_rank": (None, 24),
        "groups": ((1, 1), (2, 1), (4, 2)),
        "rope_parameters": (ROPES["default"], YARN, UNEQUAL),
        "tie_word_embeddings": (False, True),
        "first_k_dense_replace": (0, 1, 2),
        "n_shared_experts": (0, 1, 2),
        "norm_topk_prob": (False, True),
        "attention_bias": (False, True),
    }
    every = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    sample = random.Random(0).sample(every, count)
    for case in sample:
        case["n_group"], case["topk_group"] = case.pop("groups")
    return [MLA | {"routed_scaling_factor": 2.5} | case for case in sample]


def v2_cases() -> list[dict[str, Any]]:
    fixed = MLA | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5}
    combinations = itertools.product((None, 24), ("greedy", "group_limited_greedy"), (ROPES["default"], UNEQUAL))
    return [
        fixed | {"q_lora_rank": rank, "topk_method": method, "rope_parameters": rope, "n_shared_experts": 2}
        for rank, method, rope in combinations
    ]


def theirs(model_type: str, options: dict[str, Any]) -> transformers.PreTrainedModel:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(*((1.0, 0.1) if parameter.ndim == 1 else (0.0, 0.08)))
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.normal_(0.0, 0.2)
    if model_type.startswith("deepseek"):
        model.set_experts_implementation("eager")  # the grouped product that is the default has no float64
    return model


def ours(peer: transformers.PreTrainedModel) -> Transformer:
    config = ModelConfig.from_hf(peer.config.to_dict()).replace(num_nextn_predict_layers=0)
    model = Transformer(config).eval()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    # with no shared expert transformers still has its matrices, of no rows
    model.load_state_dict({name: t for name, t in peer.state_dict().items() if name not in tied and t.numel()})
    return model


@torch.no_grad()
def assert_equal_logits(model_type: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    peer = theirs(model_type, options)
    model = ours(peer)
    ids = torch.randint(0, options["vocab_size"], (2, LENGTH))
    for dtype, tolerance in TOLERANCE.items():
        expected = peer.to(dtype)(ids).logits
        logits = model.to(dtype)(ids).logits
        assert expected.std() > 0.1, "logits near zero would prove nothing"
        torch.testing.assert_close(logits, expected.to(logits.dtype), rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("options", v3_cases(24), ids=range(24))
def test_deepseek_v3(options):
    assert_equal_logits("deepseek_v3", options)


@pytest.mark.parametrize("options", v2_cases(), ids=range(8))
def test_deepseek_v2(options):
    assert_equal_logits("deepseek_v2", options)


@pytest.mark.parametrize("rope", ROPES)
def test_llama_rope(rope):
    assert_equal_logits("llama", GQA | {"rope_parameters": ROPES[rope]})


def test_llama_dynamic_rope_beyond_its_positions():
    assert_equal_logits("llama", GQA | {"rope_parameters": ROPES["dynamic"], "max_position_embeddings": 64})


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-3},
        {"head_dim": 24},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_dense_families(model_type, changes):
    families = {"head_dim": ("llama", "qwen3"), "attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}
    options = {k: v for k, v in changes.items() if model_type in families.get(k, (model_type,))}
    assert_equal_logits(model_type, GQA | {"pad_token_id": None} | options)
