"""Each family beside the model that transformers builds from the same config. pytest tests/planner/test_architecture.py"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from minga.config import PRESETS
from minga.errors import UserError
from minga.planner.architecture import FAMILIES, Architecture, architecture_of
from minga.planner.counts import cache_bytes, cache_bytes_per_token, count_parameters, forward_flops, training_flops

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_HEADS = {"head_dim": 20}
_BIAS = {"attention_bias": True}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_NUM = {"num_experts": 6, **_EXPERTS}
_LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
_ROUTED = {
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 2,
    "n_group": 2,
    "topk_group": 1,
    **_EXPERTS,
}
_MLA = {
    "num_key_value_heads": 6,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
_INDEXER = {"index_n_heads": 3, "index_head_dim": 16, "index_topk": 8}
_GPT2 = {"vocab_size": 96, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}
_TIED = {"tie_word_embeddings": True}
_UNTIED = {"tie_word_embeddings": False}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
}
_V4 = {
    "vocab_size": 96, "hidden_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 1, "head_dim": 20, "qk_rope_head_dim": 4, "q_lora_rank": 18, "o_groups": 3, "o_lora_rank": 7,
    "num_experts_per_tok": 2, "n_routed_experts": 6, "n_shared_experts": 1, "sliding_window": 16, "hc_mult": 4,
    "index_n_heads": 2, "index_head_dim": 12, "index_topk": 3, "max_position_embeddings": 64,
}  # fmt: skip
_FALCON = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
_OPT = {k: v for k, v in _SIZES.items() if k not in ("intermediate_size", "num_key_value_heads")} | {"ffn_dim": 80}
_NESTED = {"d_model": 48, "n_heads": 6, "n_layers": 3, "max_seq_len": 64, "vocab_size": 96}

# family -> configs, each with other switches of that family; sizes are added where the config has none of its own
CASES: dict[str, list[dict[str, Any]]] = {
    "afmoe": [{**_HEADS, **_NUM, "sliding_window": 16, "num_shared_experts": 2, "num_dense_layers": 2,
               "global_attn_every_n_layers": 2},
              {**_HEADS, **_NUM, **_BIAS, "sliding_window": 16, "num_shared_experts": 1, "num_dense_layers": 0}],
    "apertus": [{**_BIAS}, {}],
    "arcee": [{**_HEADS, **_BIAS, "mlp_bias": True}, _HEADS],
    "biogpt": [{**_OPT, "intermediate_size": 80}],
    "bloom": [{"vocab_size": 96, "hidden_size": 48, "n_layer": 3, "n_head": 6}],
    "codegen": [{**_GPT2, "rotary_dim": 4}, {**_GPT2, "n_inner": 64, "rotary_dim": 4}],
    "cohere": [{**_BIAS, "use_qk_norm": True}, {}],
    "cohere2": [{**_HEADS, "sliding_window": 16}],
    "dbrx": [{**_NESTED, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
              "ffn_config": {"hidden_size": 48, "ffn_hidden_size": 80, "moe_num_experts": 6, "moe_top_k": 2}}],
    "deepseek_v2": [{**_MLA, **_ROUTED, **_BIAS, "mlp_bias": True, "topk_method": "group_limited_greedy"},
                    {**_MLA, **_ROUTED, "q_lora_rank": None, **_TIED}],
    "deepseek_v3": [{**_MLA, **_ROUTED, **_BIAS, "num_nextn_predict_layers": 1}, {**_MLA, **_ROUTED, "q_lora_rank": None}],
    "deepseek_v32": [{**_MLA, **_ROUTED, **_INDEXER}],
    "deepseek_v4": [{**_V4, "compress_ratios": [0, 0, 4, 128, 4, 0], "num_hash_layers": 2, "num_nextn_predict_layers": 1},
                    {**_V4, "compress_ratios": [128, 128, 4, 128, 4], "hc_mult": 2, "mlp_bias": True, **_TIED},
                    {**_V4, "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 2
                     + ["sliding_attention"], "compress_rates": {"compressed_sparse_attention": 2,
                                                                 "heavily_compressed_attention": 8}}],
    "dots1": [{**_HEADS, **_ROUTED, **_BIAS, "sliding_window": 16, "max_window_layers": 2}],
    "ernie4_5": [{**_HEADS, "use_bias": True}, {**_HEADS, **_UNTIED}],
    "ernie4_5_moe": [{"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 2,
                      "use_bias": True, "moe_layer_start_index": 1, "moe_layer_end_index": 3},
                     {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 0,
                      "moe_layer_interval": 2, "moe_layer_start_index": 0, "moe_layer_end_index": -1}],
    "exaone4": [{**_HEADS, "sliding_window": 16, "sliding_window_pattern": 4}],
    "exaone_moe": [{**_HEADS, **_NUM, "sliding_window": 16, "num_shared_experts": 1, "first_k_dense_replace": 1}],
    "falcon": [_FALCON, {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
               {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}],
    "flex_olmo": [_NUM],
    "gemma": [{**_HEADS, **_BIAS}, _HEADS],
    "gemma2": [{**_HEADS, "sliding_window": 16}],
    "gemma3_text": [{**_HEADS, **_BIAS, "sliding_window": 16}],
    "glm": [{**_HEADS, **_BIAS}, {**_HEADS, "attention_bias": False}],
    "glm4": [{**_HEADS, **_BIAS}],
    "glm4_moe": [{**_HEADS, **_ROUTED, **_BIAS, "use_qk_norm": True}, {**_HEADS, **_ROUTED, "use_qk_norm": False}],
    "glm4_moe_lite": [{**_MLA, **_ROUTED, "mlp_layer_types": ["dense", "sparse", "sparse", "dense", "sparse"]}],
    "glm_moe_dsa": [{**_MLA, **_ROUTED, **_INDEXER},
                    {**_MLA, **_ROUTED, **_INDEXER, "indexer_types": ["full", "shared", "full", "shared", "shared"]},
                    {**_MLA, **_ROUTED, **_INDEXER, "index_topk_freq": 3}],
    "gpt2": [_GPT2, {**_GPT2, "n_inner": 100, **_UNTIED}],
    "gpt_bigcode": [_GPT2, {**_GPT2, "multi_query": False}],
    "gpt_neo": [{"vocab_size": 96, "hidden_size": 48, "num_layers": 4, "num_heads": 6, "max_position_embeddings": 64,
                 "attention_types": [[["global", "local"], 2]], "window_size": 16}],
    "gpt_neox": [{"num_key_value_heads": 6}, {"num_key_value_heads": 6, "attention_bias": False, **_TIED}],
    "gpt_oss": [{**_HEADS, **_LOCAL, "sliding_window": 16}],
    "gptj": [{**_GPT2, "rotary_dim": 4}],
    "granite": [{**_BIAS, "mlp_bias": True}, _TIED],
    "granitemoe": [{**_BIAS, **_LOCAL}],
    "granitemoeshared": [{**_LOCAL, "shared_intermediate_size": 32}, {**_LOCAL}],
    "helium": [{"head_dim": 8, **_BIAS, "mlp_bias": True}],
    "hunyuan_v1_dense": [{**_HEADS, **_BIAS}],
    "hunyuan_v1_moe": [{**_HEADS, "num_experts": 6, "moe_topk": 2}],
    "hy_v3": [{**_HEADS, **_NUM, **_BIAS, "num_shared_experts": 2,
               "mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse"]}],
    "iquestcoder": [{**_HEADS, **_BIAS, "mlp_bias": True}],
    "internlm3": [{**_HEADS}],
    "jais2": [_HEADS, {**_HEADS, "attention_bias": False, "mlp_bias": False}],
    "llama": [{**_HEADS, **_BIAS, "mlp_bias": True}, _TIED],
    "llama4_text": [{**_HEADS, **_LOCAL, "intermediate_size_mlp": 112, "interleave_moe_layer_step": 2,
                     "attention_chunk_size": 16},
                    {**_HEADS, **_LOCAL, **_BIAS, "intermediate_size_mlp": 112, "attention_chunk_size": 16}],
    "minicpm3": [{**_MLA}],
    "minimax": [{**_HEADS, **_LOCAL},
                {**_HEADS, **_LOCAL, "layer_types": ["linear_attention"] * 4 + ["full_attention"]}],
    "minimax_m2": [{**_HEADS, **_LOCAL}],
    "ministral": [{**_HEADS, "sliding_window": 16}],
    "ministral3": [_HEADS],
    "mistral": [{**_HEADS, "sliding_window": 16}],
    "mixtral": [{**_HEADS, **_LOCAL}],
    "mpt": [_NESTED],
    "nanochat": [{}, _BIAS],
    "nemotron": [{**_HEADS, **_BIAS, "mlp_bias": True}, _HEADS],
    "olmo": [_BIAS],
    "olmo2": [_BIAS, {}],
    "olmo3": [{"sliding_window": 16}],
    "olmoe": [{**_NUM}],
    "opt": [_OPT, {**_OPT, "word_embed_proj_dim": 20, "do_layer_norm_before": False},
            {**_OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}],
    "persimmon": [{"num_key_value_heads": 6}, {"num_key_value_heads": 6, "qk_layernorm": False}],
    "phi": [{"qk_layernorm": True}, {}],
    "phi3": [{"sliding_window": 16}],
    "phimoe": [{**_LOCAL, **_BIAS, "lm_head_bias": True}, _LOCAL],
    "qwen2": [{**_TIED}, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}],
    "qwen2_moe": [{**_NUM, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
                  {**_NUM, "shared_expert_intermediate_size": 32, "qkv_bias": False}],
    "qwen3": [{**_HEADS, **_BIAS}, {**_HEADS, **_TIED}],
    "qwen3_moe": [{**_HEADS, **_NUM, **_BIAS, "mlp_only_layers": [1]}],
    "qwen3_5_moe_text": [{**_HEADS, **_NUM, **_DELTA, "shared_expert_intermediate_size": 32}],
    "qwen3_5_text": [{**_HEADS, **_DELTA}],
    "qwen3_next": [{**_HEADS, **_NUM, **_DELTA, "shared_expert_intermediate_size": 32},
                   {**_HEADS, **_NUM, **_DELTA, **_BIAS, "shared_expert_intermediate_size": 32, "full_attention_interval": 2}],
    "seed_oss": [{**_HEADS, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
                 {**_HEADS, "attention_bias": False}],
    "smollm3": [{**_BIAS, "mlp_bias": True}, _UNTIED],
    "solar_open": [{**_HEADS, **_ROUTED, **_BIAS, "first_k_dense_replace": 0}],
    "stablelm": [{"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True}, {}],
    "starcoder2": [{}, {"use_bias": False, **_UNTIED}],
    "vaultgemma": [{**_HEADS, "sliding_window": 16}],
    "xglm": [{"vocab_size": 96, "d_model": 48, "ffn_dim": 80, "num_layers": 3, "attention_heads": 6}],
    "youtu": [{**_MLA}],
}  # fmt: skip
# Part of a larger model; code of their own beside the weights.
NO_CAUSAL_MODEL = {"qwen2_5_vl_text", "qwen2_vl_text", "qwen3_vl_moe_text", "qwen3_vl_text"}
NOT_IN_TRANSFORMERS = {
    *("deepseek", "kimi_k2", "minimax_m1", "minimax_text_01"),
    *("Yi", "baichuan", "bailing_moe", "internlm", "internlm2"),
}


OWN_NAMES = {
    "biogpt",
    "bloom",
    "codegen",
    "dbrx",
    "deepseek_v4",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gptj",
    "mpt",
    "opt",
    "xglm",
}


def config_of(family: str, options: dict[str, Any]) -> dict[str, Any]:
    return ({} if family in OWN_NAMES else _SIZES) | options | {"model_type": family, "pad_token_id": 0}


@pytest.mark.parametrize(("family", "case"), [(family, i) for family in CASES for i in range(len(CASES[family]))])
def test_parameters_equal_the_transformers_model(family: str, case: int) -> None:
    config = config_of(family, CASES[family][case])
    theirs = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_parameters(config).total == trained
    written_out = architecture_of(theirs.to_dict())  # its own spelling, every default and layer type with it
    assert count_parameters(written_out).total == trained
    assert written_out.blocks == architecture_of(config).blocks


@pytest.mark.parametrize("family", sorted(NO_CAUSAL_MODEL))
def test_the_text_model_of_a_multimodal_one(family: str) -> None:
    config = config_of(family, {**(_HEADS if "qwen3" in family else {}), **(_NUM if "moe" in family else {})})
    theirs = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(theirs)
    counts = count_parameters({"model_type": "seeing", "text_config": config})
    assert counts.head == 96 * 48
    assert counts.total - counts.head == sum(parameter.numel() for parameter in model.parameters())


def test_every_family_is_compared() -> None:
    assert set(CASES) == set(FAMILIES) - NOT_IN_TRANSFORMERS - NO_CAUSAL_MODEL
    # those that are not, beside a family that has the same parts
    v3 = {**_MLA, **_ROUTED}
    assert architecture_of(config_of("kimi_k2", v3)).blocks == architecture_of(config_of("deepseek_v3", v3)).blocks
    v1 = config_of("deepseek", {**_ROUTED, "first_k_dense_replace": 1})
    qwen = config_of("qwen3_moe", {**_NUM, "mlp_only_layers": [0]})
    shared = 4 * 3 * 48 * 2 * 24  # and no norms of queries and keys
    assert count_parameters(v1).total == count_parameters(qwen).total + shared - 5 * 2 * 8
    llama = config_of("llama", {})
    for family in ("Yi", "internlm2"):
        assert architecture_of(config_of(family, {})).blocks == architecture_of(llama).blocks
    biased = architecture_of(config_of("llama", {"attention_bias": True})).blocks
    assert architecture_of(config_of("internlm", {})).blocks == biased
    theirs, ours = CASES["minimax"][1], {"attn_type_list": [0, 0, 0, 0, 1]}
    for family in ("minimax_m1", "minimax_text_01"):
        remote = architecture_of(config_of(family, {**_HEADS, **_LOCAL, **ours}))
        assert remote.blocks == architecture_of(config_of("minimax", theirs)).blocks


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_and_its_dictionary_are_the_same(name: str) -> None:
    config = PRESETS[name]()
    arch = architecture_of(config)
    assert arch == architecture_of(config.to_hf()) == architecture_of(json.loads(json.dumps(config.to_hf())))
    assert architecture_of(arch) is arch
    assert arch.num_layers == config.num_hidden_layers


def test_blocks_stand_in_the_order_of_the_model() -> None:
    arch = architecture_of(config_of("gemma3_text", {**_HEADS, "sliding_window": 16, "num_hidden_layers": 13}))
    assert [(count, block.attention.window) for count, block in arch.blocks] == [
        (5, 16),
        (1, None),
        (5, 16),
        (1, None),
        (1, 16),
    ]
    arch = architecture_of(config_of("qwen2", CASES["qwen2"][1]))
    assert [(count, block.attention.window) for count, block in arch.blocks] == [(2, None), (3, 16)]
    arch = architecture_of(config_of("exaone4", {**_HEADS, "sliding_window": 16, "sliding_window_pattern": "LG"}))
    assert [block.attention.window for _, block in arch.blocks] == [16, None, 16, None, 16]
    arch = architecture_of(config_of("gpt_neo", CASES["gpt_neo"][0]))
    assert [block.attention.window for _, block in arch.blocks] == [None, 16, None, 16]
    arch = architecture_of(config_of("llama4_text", {**CASES["llama4_text"][0], "no_rope_layers": [1, 0, 1, 1, 0]}))
    assert [block.attention.window for _, block in arch.blocks] == [16, None, 16, 16, None]
    assert arch.blocks[0][1].attention.chunked
    arch = architecture_of(config_of("deepseek_v3", {**_MLA, **_ROUTED, "num_nextn_predict_layers": 2}))
    assert [(count, block.feed_forward.experts) for count, block in arch.blocks] == [(2, 0), (3, 6)]
    assert [block.feed_forward.experts for block in arch.mtp] == [6, 6]


def test_the_text_part_of_a_multimodal_config() -> None:
    text = config_of("qwen3", {**_HEADS})
    whole = {"model_type": "some_vision_language_model", "vision_config": {"hidden_size": 7}, "text_config": text}
    assert architecture_of(whole) == architecture_of(text)
    assert architecture_of({**whole, "tie_word_embeddings": True}).tied


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("lama", {}, "llama"),
        ("deepseek_v9", {}, "deepseek_v3"),
        (None, {}, "model_type"),
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("mistral", {"hidden_size": None}, "hidden_size"),
        ("mistral", {"num_hidden_layers": 0}, "num_hidden_layers"),
        ("mistral", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("mistral", {"vocab_size": -1}, "vocab_size"),
        ("mistral", {"vocab_size": math.nan}, "vocab_size"),
        ("mistral", {"vocab_size": 10**400}, "vocab_size"),
        ("mistral", {"vocab_size": True}, "vocab_size"),
        ("mistral", {"intermediate_size": "wide"}, "intermediate_size"),
        ("mistral", {"num_attention_heads": 7, "num_key_value_heads": 7}, "num_attention_heads"),
        ("mistral", {"num_key_value_heads": 4}, "num_key_value_heads"),
        ("mistral", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ("mistral", {"sliding_window": -4}, "sliding_window"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads"),
        ("deepseek_v3", {**_MLA, **_ROUTED, "num_experts_per_tok": 7}, "num_experts_per_tok"),
        ("deepseek_v32", {**_MLA, **_ROUTED, **_INDEXER, "n_group": 4}, "n_group"),
        ("deepseek_v32", {**_MLA, **_ROUTED, **_INDEXER, "topk_group": 3}, "topk_group"),
        ("deepseek_v32", {**_MLA, **_ROUTED, **_INDEXER, "num_experts_per_tok": 4}, "topk_group"),
        ("deepseek_v32", {**_MLA, **_ROUTED}, "index_topk"),
        ("mixtral", {**_LOCAL, "num_experts_per_tok": 7}, "num_experts_per_tok"),
        ("mixtral", {}, "n_routed_experts"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma2", {"layer_types": ["mamba"] * 5}, "mamba"),
        ("gpt_neo", {"attention_types": 3}, "attention_types"),
        ("mpt", {**_NESTED, "attn_config": 3}, "attn_config"),
        ("deepseek_v32", {**_MLA, **_ROUTED, **_INDEXER, "mlp_only_layers": 3}, "mlp_only_layers"),
        ("deepseek_v4", _V4, "compress_ratios"),
        ("deepseek_v4", {**_V4, "compress_ratios": [0, 0, 4, 16, 4]}, "16"),
        ("deepseek_v4", {**_V4, "compress_ratios": [0, 0, 4]}, "compress_ratios"),
        ("deepseek_v4", {**_V4, "layer_types": ["full_attention"] * 5}, "full_attention"),
        ("deepseek_v4", {**_V4, "layer_types": [["full_attention"]] * 5}, "layer_types"),
        ("deepseek_v4", {**_V4, "compress_ratios": [0] * 5, "o_groups": 4}, "o_groups"),
        ("deepseek_v4", {**_V4, "compress_ratios": [0] * 5, "n_shared_experts": 2}, "n_shared_experts"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(family: str | None, change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        architecture_of({**_SIZES, **change, "model_type": family})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


_KEYS = (
    "hidden_size n_head num_hidden_layers layer_types mlp_only_layers attn_config num_experts n_group sliding_window"
)
_KEYS += " sliding_window_pattern attention_types text_config moe_layers head_dim num_experts_per_tok no_rope_layers"
_KEYS += " compress_ratios compress_rates hc_mult o_groups"
_KEYS += " attn_type_list indexer_types index_topk_freq mlp_layer_types num_nextn_predict_layers expansion_ratio"
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner)
)


@given(family=st.sampled_from(sorted(CASES)), key=st.sampled_from(_KEYS.split()), value=_VALUES)
def test_any_value_is_described_or_refused(family: str, key: str, value: Any) -> None:
    try:
        arch = architecture_of(config_of(family, {**CASES[family][0], key: value}))
    except UserError:
        return
    assert 0 < count_parameters(arch).active <= count_parameters(arch).total


def test_a_window_caps_what_is_computed_and_kept() -> None:
    windowed = architecture_of(config_of("mistral", {**_HEADS, "sliding_window": 16}))
    full = architecture_of(config_of("mistral", _HEADS))
    assert cache_bytes_per_token(windowed) == cache_bytes_per_token(full)
    assert cache_bytes(windowed, 16) == cache_bytes(full, 16)
    assert cache_bytes(windowed, 1000) == cache_bytes(full, 16)
    assert forward_flops(windowed, 16) == forward_flops(full, 16)
    assert forward_flops(windowed, 1000) == forward_flops(full, 16)
    assert training_flops(windowed, 8) == training_flops(full, 8)


@pytest.mark.parametrize("seq_len", [1, 7, 16, 17, 40, 64])
@pytest.mark.parametrize(
    ("family", "case"),
    [("mistral", 0), ("llama4_text", 0), ("gpt_oss", 0), ("deepseek_v32", 0), ("deepseek_v4", 0), ("deepseek_v4", 2)],
)
def test_the_mean_of_a_causal_sequence_is_the_mean_over_its_tokens(family: str, case: int, seq_len: int) -> None:
    arch = architecture_of(config_of(family, CASES[family][case]))
    chunk = 16 if family == "llama4_text" else None

    def at(position: int) -> float:  # chunks and what sees everything, each with its context
        whole = forward_flops(arch, position)
        if chunk is None:
            return whole
        chunked = sum(
            2 * n * b.attention.heads * (b.attention.qk_dim + b.attention.v_dim)
            for n, b in arch.blocks
            if b.attention.chunked
        )
        return whole - chunked * (min(position, chunk) - ((position - 1) % chunk + 1))

    mean = sum(at(position) for position in range(1, seq_len + 1)) / seq_len
    assert training_flops(arch, seq_len, mtp=False) == pytest.approx(3 * mean)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_the_products_of_deepseek_v4_equal_those_of_transformers(case: int) -> None:
    """Which computes all keys, entries and scores, and then hides what a token may not see."""
    config = config_of("deepseek_v4", {**CASES["deepseek_v4"][case]})
    theirs = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(theirs, experts_implementation="eager")
    tokens, arch = 32, architecture_of(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    expected = forward_flops(arch, 0)
    for count, block in arch.blocks:
        x, entries = block.attention, tokens // block.attention.compression if block.attention.compression else 0
        each = x.heads * (x.qk_dim + x.v_dim) * (tokens + entries) + x.indexed * entries
        expected += 2 * count * (each + 2 * arch.streams**2 * arch.hidden_size)  # streams with each other, not counted
    assert counter.get_total_flops() == tokens * expected


def test_compressed_entries_beside_a_window() -> None:
    arch = architecture_of(config_of("deepseek_v4", CASES["deepseek_v4"][0]))
    assert [(n, b.attention.compression) for n, b in arch.blocks] == [(2, None), (1, 4), (1, 128), (1, 4)]
    assert [block.attention.compression for block in arch.mtp] == [None]
    states = 2 * (2 * (2 * 4) * 2 * (20 + 12)) + 2 * 128 * 20  # value and weight of two windows of 4, of one of 128
    for context, window, fours, large in ((3, 3, 0, 0), (20, 16, 5, 0), (300, 16, 75, 2)):
        numbers = 5 * window * 20 + 2 * fours * (20 + 12) + large * 20
        assert cache_bytes(arch, context) == 2 * numbers + 4 * states
        seen = 5 * window + 2 * min(fours, 3) + large
        core = forward_flops(arch, context) - forward_flops(arch, 0)
        assert core == 2 * (6 * 2 * 20 * seen + 2 * 12 * 2 * fours)
    assert cache_bytes_per_token(arch) == 5 * 40 + 2 * 64 // 4 + 1  # 40 bytes for 128 tokens


def test_a_linear_attention_keeps_a_state() -> None:
    arch = architecture_of(config_of("qwen3_5_text", CASES["qwen3_5_text"][0]))
    linear = arch.blocks[0][1].attention
    state = 4 * 12 * 10 + (2 * 2 * 12 + 4 * 10) * 3  # a matrix per head, and three tokens of the convolution
    assert linear.state == state
    assert cache_bytes(arch, 100) == 100 * cache_bytes_per_token(arch) + 4 * 4 * state
    assert cache_bytes_per_token(arch) == 1 * 2 * 2 * 20 * 2  # one layer of five


def test_numbers_of_the_cache() -> None:
    arch: Architecture = architecture_of(config_of("deepseek_v3", {**_MLA, **_ROUTED, "num_nextn_predict_layers": 1}))
    assert cache_bytes_per_token(arch) == 5 * (16 + 8) * 2
    assert cache_bytes_per_token(arch, number="fp8", mtp=True) == 6 * (16 + 8)
    assert cache_bytes_per_token(arch, number="int8") == 5 * (16 + 8 + 2)
    assert cache_bytes(arch, 10, number="float32") == 10 * 5 * (16 + 8) * 4
    indexed = architecture_of(config_of("deepseek_v32", CASES["deepseek_v32"][0]))
    assert cache_bytes_per_token(indexed) == 5 * (16 + 8 + 16) * 2
    assert dataclasses.replace(indexed, mtp=()) == indexed
