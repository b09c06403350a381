"""pytest tests/planner/test_counts.py"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minga.config import PRESETS, ModelConfig, TrainConfig
from minga.config.presets import tiny, v2_lite, v3
from minga.kernels import cpu
from minga.model.cache import Cache, Pages
from minga.model.transformer import Transformer
from minga.planner.counts import (
    cache_bytes_per_token,
    count_parameters,
    forward_flops,
    muon_flops,
    parameters_read,
    speculation_limit,
)
from minga.train.optim import Optimizer

_LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_key_value_heads=2,
    head_dim=20,
    rope_interleave=False,
)
CONFIGS = {name: preset() for name, preset in PRESETS.items()} | {
    "no-query-latent": tiny().replace(q_lora_rank=None, num_nextn_predict_layers=2),
    "no-shared": tiny().replace(n_shared_experts=0),
    "every-other": tiny().replace(first_k_dense_replace=0, moe_layer_freq=2, tie_word_embeddings=True),
    "no-experts": tiny().replace(n_routed_experts=0),
    "mla-biases": tiny().replace(attention_bias=True, mlp_bias=True),
    "llama": _LLAMA,
    "llama-biases": _LLAMA.replace(attention_bias=True, mlp_bias=True),
    "qwen2": _LLAMA.replace(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": _LLAMA.replace(model_type="qwen3"),
}


def part_of(name: str) -> str:
    """The part of `ParameterCounts` that a parameter of the model belongs to."""
    rules = [
        ("mtp.", "mtp"),
        ("embed_tokens", "embedding"),
        ("lm_head", "head"),
        ("norm", "norms"),
        ("self_attn", "attention"),
        ("shared_experts", "shared_experts"),
        ("mlp.experts", "routed_experts"),
        ("mlp.gate.", "router"),
        ("mlp.", "dense"),
    ]
    return next(part for pattern, part in rules if pattern in name)


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_equal_the_model_part_by_part(name):
    config = CONFIGS[name]
    with torch.device("meta"):
        model = Transformer(config)
    expected = Counter()
    for parameter_name, parameter in model.named_parameters():
        expected[part_of(parameter_name)] += parameter.numel()
    counts = count_parameters(config)
    for part in (
        "embedding",
        "head",
        "attention",
        "dense",
        "routed_experts",
        "shared_experts",
        "router",
        "norms",
        "mtp",
    ):
        assert getattr(counts, part) == expected[part], part
    assert counts.total_with_mtp == expected.total()
    assert counts.total == expected.total() - expected["mtp"]


def test_the_published_sizes():
    assert count_parameters(v3()).total == 671_026_404_352
    assert count_parameters(v2_lite()).total == 15_706_484_224
    assert count_parameters(v3()).active / 1e9 == pytest.approx(37.55, abs=0.01)  # the paper's "37B activated"
    assert count_parameters(v2_lite()).active / 1e9 == pytest.approx(2.66, abs=0.01)  # and "2.4B" without the embedding


def test_every_parameter_of_a_dense_model_is_active():
    counts = count_parameters(_LLAMA)
    assert counts.active == counts.total


def test_the_published_cache_sizes():
    assert cache_bytes_per_token(v3()) == 70_272
    assert cache_bytes_per_token(v2_lite()) == 31_104


@pytest.mark.parametrize("config", [tiny(), _LLAMA], ids=["latent", "grouped"])
def test_cache_bytes_equal_the_cache(config):
    for number in ("float32", "float16", "int8"):
        pages = Pages(config, 1, dtype=getattr(torch, number))
        assert cache_bytes_per_token(config, number=number, mtp=True) == pages.bytes_per_token


@pytest.mark.parametrize("name", ["tiny", "no-query-latent", "every-other", "no-experts", "llama", "qwen2", "qwen3"])
def test_flops_equal_what_torch_counts(name):
    config = CONFIGS[name]
    model = Transformer(config).init_weights().eval()
    tokens = 12
    segments = torch.zeros(1, tokens, dtype=torch.long)  # a mask makes attention multiply whole rows: context = tokens
    plain = sdpa_kernel(SDPBackend.MATH)  # torch does not count its fused attention on the CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        model(torch.zeros(1, tokens, dtype=torch.long), segments_BT=segments)
    assert counter.get_total_flops() == tokens * forward_flops(config, tokens)


def test_flops_of_absorbed_decoding_equal_what_torch_counts():
    config = tiny()
    model = Transformer(config).init_weights().eval()
    cache = Cache.of(config, 1, 200, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():  # so far into the cache that absorbing is chosen
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache, positions_BT=torch.tensor([[199]]))
    assert counter.get_total_flops() == forward_flops(config, 200, absorbed=True)


def test_flops_of_mtp_equal_what_torch_counts():
    config = tiny()
    model = Transformer(config).init_weights().eval()
    ids, segments = torch.zeros(1, 12, dtype=torch.long), torch.zeros(1, 12, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.head(model.mtp_hidden(0, ids, torch.randn(1, 12, config.hidden_size), segments_BT=segments))
    assert counter.get_total_flops() == 12 * (forward_flops(config, 12, mtp=True) - forward_flops(config, 12))


def test_the_planner_does_not_import_torch():
    code = "import sys, minga.planner.counts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("name", ["tiny", "no-query-latent", "no-shared", "every-other", "no-experts", "llama"])
def test_muon_flops_equal_those_counted_in_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)  # torch counts its own products only
    model = Transformer(CONFIGS[name]).init_weights()
    optimizer = Optimizer(model, TrainConfig(steps=1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as counted:
        optimizer.step()
    assert counted.get_total_flops() == muon_flops(CONFIGS[name], mtp=True)


def test_what_a_step_reads():
    """One token reads the active parameters but the embedding; very many read all; more tokens wake more experts."""
    for config in CONFIGS.values():
        counts = count_parameters(config)
        head = config.vocab_size * config.hidden_size
        without = counts.total - counts.embedding - counts.head + head
        assert parameters_read(config, 1e9) == pytest.approx(without)
        assert parameters_read(config, 1) == pytest.approx(counts.active - counts.embedding - counts.head + head)
        assert parameters_read(config, 1) <= parameters_read(config, 2) <= without
        if config.num_nextn_predict_layers:
            assert parameters_read(config, 1e9, mtp=True) == counts.mtp / config.num_nextn_predict_layers + head


def test_guesses_gain_more_where_no_experts_wake():
    dense = CONFIGS["no-experts"].replace(num_hidden_layers=60)
    experts = v3()
    assert speculation_limit(experts, 0.8) < 1.4 < speculation_limit(dense, 0.8) < 1.8
    assert speculation_limit(dense, 0.0) < 1
