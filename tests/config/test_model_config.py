"""pytest tests/config/test_model_config.py"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from minga.config import PRESETS, ModelConfig, RopeConfig
from minga.config.presets import tiny, v3
from minga.errors import UserError

V3: dict[str, Any] = tiny().to_hf()
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
V2 = {**V3, "model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": V3,
    "deepseek_v2": V2,
    "llama": {**LLAMA, "mlp_bias": True, "attention_bias": True, "head_dim": 16},
    "qwen2": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": False},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 20, "layer_types": ["full_attention"] * 2},
}
YARN = {"factor": 40, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.9, "beta_fast": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = [("linear", {"factor": 2.0}), ("dynamic", {"factor": 2.0}), ("yarn", YARN), ("llama3", LLAMA3)]


def through_json(config: ModelConfig) -> ModelConfig:
    return ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())))


# ---------------------------------------------------------------------- the public format


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_loses_nothing(family):
    config = ModelConfig.from_hf(FAMILIES[family])
    again = through_json(config)
    assert again.replace(extra={}) == config.replace(extra={})
    assert config.extra.items() <= again.extra.items()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name):
    config = PRESETS[name]()
    assert through_json(config).replace(extra={}) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_we_do_not_use_are_kept_and_stale_ones_dropped(family):
    stale = {"transformers_version": "4.1", "quantization_config": {"bits": 8}, "torch_dtype": "bfloat16"}
    extra = {"aux_loss_alpha": 0.001, "my_note": {"a": [1, 2]}, "pad_token_id": 7}
    hf = ModelConfig.from_hf({**FAMILIES[family], **stale, **extra}).to_hf()
    assert extra.items() <= hf.items()
    assert not stale.keys() & hf.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_architecture_is_named_for_its_readers(family):
    hf = ModelConfig.from_hf(FAMILIES[family]).to_hf()
    name = {"deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3"}.get(family, family.capitalize())
    assert hf["architectures"] == [f"{name}ForCausalLM"]
    assert ("topk_method" in hf) == family.startswith("deepseek")  # without it vLLM drops the router's bias


@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
@pytest.mark.parametrize(("kind", "scaling"), SCALINGS)
def test_both_spellings_of_rope_read_the_same(family, kind, scaling):
    base = {k: v for k, v in FAMILIES[family].items() if not k.startswith("rope_") or k == "rope_interleave"}
    spellings = [
        {"rope_theta": 5000.0, "rope_scaling": {"type": kind, **scaling}},
        {"rope_theta": 5000.0, "rope_scaling": {"rope_type": kind, **scaling}},
        {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **scaling}},
    ]
    first, *others = (ModelConfig.from_hf({**base, **spelling}) for spelling in spellings)
    assert first.rope == RopeConfig(kind, 5000.0, **scaling)
    assert all(other == first for other in others)
    assert through_json(first).rope == first.rope


def test_both_spellings_of_rope_are_written():
    hf = v3().to_hf()
    assert hf["rope_scaling"]["type"] == hf["rope_scaling"]["rope_type"] == hf["rope_parameters"]["rope_type"] == "yarn"
    assert hf["rope_theta"] == hf["rope_parameters"]["rope_theta"] == 10000.0
    assert tiny().to_hf()["rope_scaling"] is None


def test_truncate_is_written_only_when_it_is_off():
    rope = RopeConfig("yarn", factor=4.0, original_max_position_embeddings=64, truncate=False)
    assert "truncate" not in v3().to_hf()["rope_parameters"]
    assert through_json(tiny().replace(rope=rope)).rope == rope


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), (2, (2,)), ([2, 5], (2, 5)), ((2, 5), (2, 5))])
def test_end_tokens_may_be_none_one_or_several(eos, ids):
    config = ModelConfig.from_hf({**LLAMA, "eos_token_id": eos})
    assert config.eos_token_ids == ids
    assert through_json(config).eos_token_ids == ids


def test_what_a_family_leaves_open_is_filled_in():
    llama = ModelConfig.from_hf(LLAMA)
    assert (llama.head_dim, llama.rope_style, llama.qkv_bias, llama.qk_norm) == (12, "halves", False, False)
    qwen2 = ModelConfig.from_hf(FAMILIES["qwen2"])
    assert (qwen2.qkv_bias, qwen2.o_bias) == (True, False)
    assert ModelConfig.from_hf(FAMILIES["qwen3"]).qk_norm
    without = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert ModelConfig.from_hf(without).num_key_value_heads == 4
    old = {k: v for k, v in V2.items() if k not in ("topk_method", "scoring_func", "norm_topk_prob")}
    v2 = ModelConfig.from_hf(old)
    assert (v2.topk_method, v2.scoring_func, v2.norm_topk_prob, v2.rope_style) == (
        "greedy",
        "softmax",
        False,
        "complex",
    )
    new = ModelConfig.from_hf({**old, "model_type": "deepseek_v3"})
    assert (new.topk_method, new.scoring_func, new.norm_topk_prob) == ("noaux_tc", "sigmoid", True)


def test_layers_with_experts():
    config = tiny().replace(num_hidden_layers=6, first_k_dense_replace=1, moe_layer_freq=2)
    assert [config.is_moe_layer(layer) for layer in range(7)] == [False, False, True, False, True, False, True]
    assert not config.replace(n_routed_experts=0).is_moe_layer(6)


def test_the_softmax_scale_of_v3():
    assert v3().attention_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert tiny().attention_scale == pytest.approx(24**-0.5)


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("model_type", ["gpt2", None, "", 5, ["llama"], {}])
def test_a_family_that_is_not_known(model_type):
    with pytest.raises(UserError, match="model_type"):
        ModelConfig.from_hf({**LLAMA, "model_type": model_type})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_key_is_named(family):
    required = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    if family.startswith("deepseek"):
        required += ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts"]
    for key in required:
        with pytest.raises(UserError, match=f"'{key}' is missing"):
            ModelConfig.from_hf({k: v for k, v in FAMILIES[family].items() if k != key})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"qk_rope_head_dim": 7}, "rotated head dimension"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"num_experts_per_tok": 5}, "topk_group"),  # one group of four is kept
        ({"n_group": 3}, "n_group"),
        ({"topk_group": 3}, "topk_group"),
        ({"n_group": 8, "topk_group": 8}, "n_group"),  # one expert a group
        ({"topk_method": "best"}, "topk_method"),
        ({"scoring_func": "relu"}, "scoring_func"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        ({"n_shared_experts": -1}, "n_shared_experts"),
    ],
)
def test_numbers_that_make_no_expert_model(changes, named):
    with pytest.raises(UserError, match=named):
        ModelConfig.from_hf({**V3, **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"head_dim": 15}, "rotated head dimension"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope type"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": "four"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": math.inf}}, "factor"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"rope_theta": -10000.0}, "rope_theta"),
        ({"rope_theta": math.nan}, "rope_theta"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_theta": "many"}, "rope_theta"),
        ({"rope_theta": [10000.0]}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor"),
        ({"rope_scaling": {"type": "yarn", **YARN, "beta_fast": "32"}}, "beta_fast"),
        ({"rope_scaling": {"type": "yarn", **YARN, "mscale": math.nan}}, "mscale"),
        ({"rope_scaling": {"type": "yarn", **YARN, "attention_factor": -1.0}}, "attention_factor"),
        ({"rope_scaling": {"type": "yarn", **YARN, "truncate": "no"}}, "truncate"),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"layer_types": 5}, "layer_types"),
        # numbers whose products or quotients are no numbers
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1e308}}, "original_max"),
        ({"rope_scaling": {"type": "yarn", **YARN, "beta_fast": 1e-300}}, "beta_fast"),
        ({"rope_scaling": {"type": "dynamic", "factor": 10**308}}, "factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "head_dim": 2}, "no dynamic rope"),
    ],
)
def test_attention_and_rope_that_we_do_not_have(changes, named):
    with pytest.raises(UserError, match=named):
        ModelConfig.from_hf({**LLAMA, **changes})


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
SIZES += ["num_key_value_heads", "max_position_embeddings"]
MLA_SIZES = ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
EXPERT_SIZES = ["num_experts_per_tok", "moe_intermediate_size", "moe_layer_freq", "n_group", "topk_group"]
COUNTS = ["n_routed_experts", "n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"]
NOT_WHOLE = ["64", "", [], [64], {}, {"a": 1}, True, False, 1.5, 64.0, math.nan, math.inf, -math.inf]
HUGE = [2**31, 2**63, 10**400]


@pytest.mark.parametrize("value", [*NOT_WHOLE, -1, 0, *HUGE], ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", [*SIZES, *MLA_SIZES, *EXPERT_SIZES])
def test_a_size_that_is_none(name, value):
    with pytest.raises(UserError, match=name):
        ModelConfig.from_hf({**V3, name: value})


@pytest.mark.parametrize("value", [*NOT_WHOLE, -1, *HUGE], ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", COUNTS)
def test_a_count_that_is_none(name, value):
    with pytest.raises(UserError, match=name):
        ModelConfig.from_hf({**V3, name: value})


@pytest.mark.parametrize("value", [*NOT_WHOLE, -1, 0, *HUGE], ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"])
def test_a_size_that_is_none_without_latents(name, value):
    with pytest.raises(UserError, match=name):
        ModelConfig.from_hf({**LLAMA, name: value})


@pytest.mark.parametrize(
    "value", ["1e-6", [], {}, True, math.nan, math.inf, 10**400], ids=lambda value: repr(value)[:12]
)
@pytest.mark.parametrize("name", ["rms_norm_eps", "initializer_range", "routed_scaling_factor"])
def test_a_number_that_is_none(name, value):
    with pytest.raises(UserError, match=name):
        ModelConfig.from_hf({**V3, name: value})


def test_a_negative_initializer_range():
    with pytest.raises(UserError, match="initializer_range"):
        ModelConfig.from_hf({**V3, "initializer_range": -0.02})


@pytest.mark.parametrize("value", ["true", 1, 0, [], 1.0, math.nan], ids=repr)
@pytest.mark.parametrize("name", ["tie_word_embeddings", "attention_bias", "norm_topk_prob"])
def test_a_switch_that_is_none(name, value):
    with pytest.raises(UserError, match=name):
        ModelConfig.from_hf({**V3, name: value})


@pytest.mark.parametrize("value", ["2", True, 2.0, ["2"], [2, None], {"a": 1}, math.nan], ids=repr)
def test_an_end_token_that_is_none(value):
    with pytest.raises(UserError, match="eos_token_id"):
        ModelConfig.from_hf({**V3, "eos_token_id": value})


def test_a_latent_model_is_a_deepseek_model_and_no_other():
    with pytest.raises(UserError, match="kv_lora_rank"):
        tiny().replace(kv_lora_rank=None)
    with pytest.raises(UserError, match="kv_lora_rank"):
        tiny().replace(model_type="llama")
