"""pytest tests/planner/test_counts.py"""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minga.config import PRESETS, ModelConfig, TrainConfig
from minga.config.presets import tiny, v2_lite, v3
from minga.kernels import cpu
from minga.model.cache import Cache, Pages
from minga.model.transformer import Transformer
from minga.planner.architecture import architecture_of
from minga.planner.counts import (
    cache_bytes,
    cache_bytes_per_token,
    count_parameters,
    forward_flops,
    muon_flops,
    parameters_read,
    speculation_limit,
    training_flops,
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


# Configs: keys without influence left out. Where they were read, 2026-11-25 (config_from): "copy", the model's own
# config.json in that public repository; "sizes", all sizes in another table or in the config of a model of the same sizes,
# switches that these do not show from memory; "total", from memory, but no other sizes of that kind give the exact number in
# the files; "memory", neither. Totals by source: "files", the parameters in the published files as their pages and indexes
# count them (a second copy of a tied head, MTP modules and correction biases taken off), looked up 2026-11-25; "card", the
# rounded number of the model's card or paper; "counted", by transformers' own class, not by others: kept so that it stays.
# active: of the card or paper; some leave out tables.
PUBLISHED = [json.loads(line) for line in (Path(__file__).parent / "published_models.jsonl").read_text().splitlines()]
BY_NAME = {row["model"]: row["config"] for row in PUBLISHED}


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["model"])
def test_published_parameters(row):
    counts, arch = count_parameters(row["config"]), architecture_of(row["config"])
    assert counts.total == pytest.approx(row["total"], rel=1e-3 if row["source"] == "card" else 0)
    if "active" in row:
        left_out = row["tables_left_out"] * arch.vocab_size * arch.hidden_size
        assert counts.active - left_out == pytest.approx(row["active"], rel=0.025)  # cards round, mostly down


def test_published_parameters_are_many():
    assert Counter(row["source"] for row in PUBLISHED) == {"files": 46, "card": 3, "counted": 29}
    read = Counter(row["config_from"].split(":")[0] for row in PUBLISHED)
    assert read == {"copy": 25, "sizes": 47, "total": 3, "memory": 3}
    assert len({row["config"]["model_type"] for row in PUBLISHED}) >= 35


def test_glm_4_5_equals_its_files():
    """Which hold the MTP module with copies of both tables, and the correction biases."""
    for name, files in (("zai-org/GLM-4.5", 358_337_791_296), ("zai-org/GLM-4.5-Air", 110_468_824_832)):
        counts, arch = count_parameters(BY_NAME[name]), architecture_of(BY_NAME[name])
        routers = [(n, b.feed_forward.experts) for n, b in [*arch.blocks, (1, arch.mtp[0])]]
        assert counts.total_with_mtp + 2 * counts.embedding + sum(n * experts for n, experts in routers) == files


@pytest.mark.parametrize(
    ("name", "number", "bytes_per_token"),
    [  # DeepSeek's and Meta's papers; 2 layers key heads head_dim for the grouped ones
        ("deepseek-ai/DeepSeek-V3", "bf16", 70_272),
        ("deepseek-ai/DeepSeek-V2-Lite", "bf16", 31_104),
        ("deepseek-ai/DeepSeek-V2", "bf16", 69_120),
        ("moonshotai/Kimi-K2-Instruct", "fp8", 35_136),
        ("meta-llama/Meta-Llama-3.1-8B", "bf16", 131_072),
        ("meta-llama/Meta-Llama-3.1-405B", "float16", 516_096),
        ("Qwen/Qwen3-235B-A22B", "bf16", 192_512),
        ("meta-llama/Llama-2-7b-hf", "float32", 1_048_576),
    ],
)
def test_published_cache_sizes(name, number, bytes_per_token):
    assert cache_bytes_per_token(BY_NAME[name], number=number) == bytes_per_token


def test_deepseek_v4():
    """Sizes of its card; vLLM's 9.62 GiB of bf16 cache for 2^20 tokens, 8.7 times less than V3.2's, which the float32 state of
    the compressors is 0.02 GiB of; and DeepSeek's 27 % of V3.2's FLOPs for a token there.
    """
    flash, pro = (BY_NAME[f"deepseek-ai/DeepSeek-V4-{name}"] for name in ("Flash", "Pro"))
    indexer = {"model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
    v32, million = BY_NAME["deepseek-ai/DeepSeek-V3"] | indexer, 2**20
    assert count_parameters(flash).total == pytest.approx(284e9, abs=0.5e9)
    assert count_parameters(pro).total_with_mtp == pytest.approx(1.6e12, abs=0.05e12)
    assert cache_bytes(pro, million) / 2**30 == pytest.approx(9.62, abs=0.025)
    assert cache_bytes(v32, million) / cache_bytes(pro, million) == pytest.approx(8.7, abs=0.05)
    flops = forward_flops(pro, million) / forward_flops(v32, million, absorbed=True)
    assert flops == pytest.approx(0.27, abs=0.01)


def _nvidia_rows():
    path = Path(__file__).parents[2] / "benchmarks" / "published" / "nvidia_flops.csv"
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


def test_flops_of_nvidias_published_pairs():
    """Each row gives tokens and model FLOPs a second: their quotient is NVIDIA's count of a token.

    It is causal (half the square), three times the forward pass, with MTP, without recomputation.
    """
    far, compared = [], 0
    for row in _nvidia_rows():
        published = float(row["tflops"]) * 1e12 / float(row["tokens_per_s"])
        arch, seq_len = architecture_of(BY_NAME[row["model"]]), int(row["seq_len"])
        moe = bool(arch.blocks[-1][1].feed_forward.experts)
        if row["run"] == "lora":
            # SQuAD's texts packed to 4,096 tokens, which attend to their own text only; they have a few hundred tokens
            assert training_flops(arch, 1, lora=16) < published * 1.01
            assert training_flops(arch, 512, lora=16) == pytest.approx(published, rel=0.03)
            continue
        if "gpt-oss" in row["model"] and row["release"] < "26.06":
            # until then NVIDIA counted two of the three matrices of each expert, and no window
            arch = dataclasses.replace(arch, blocks=tuple((n, _two_matrices_no_window(b)) for n, b in arch.blocks))
        ours = training_flops(arch, seq_len, mtp=row["mtp"] == "1")
        compared += 1
        if ours != pytest.approx(published, rel=0.01 if moe else 0.03):
            far.append((row["release"], row["model"], row["system"], row["tokens_per_s"]))
        if seq_len > 1 and moe:
            fewer = 1.01 if "V4" in row["model"] else 1.05  # most of its keys are a window's and chosen ones
            assert training_flops(arch, seq_len, causal=False) > fewer * published
    assert compared == 234
    # the one that is 1.2 % off: 27,136 tokens were rounded to a multiple of 128 tokens for each of 4 sequences
    assert far == [("26.04.01", "Qwen/Qwen3-30B-A3B", "B200", "27136")]


def _two_matrices_no_window(block):
    feed_forward = dataclasses.replace(block.feed_forward, expert=block.feed_forward.expert[:2])
    attention = dataclasses.replace(block.attention, window=None)
    return dataclasses.replace(block, feed_forward=feed_forward, attention=attention)


def test_flops_of_training():
    """Three times the forward pass at the mean context; what recomputation, LoRA and a teacher add."""
    for name in ("tiny", "no-experts", "llama", "v3"):
        config = CONFIGS[name]
        plain = training_flops(config, 9, mtp=False)
        assert plain == 3 * forward_flops(config, 5)  # 1..9 keys
        assert training_flops(config, 9) == 3 * forward_flops(config, 5, mtp=True)
        assert training_flops(config, 9, causal=False) == 3 * forward_flops(config, 9, mtp=True)
        head = 2 * config.vocab_size * config.hidden_size
        assert training_flops(config, 9, mtp=False, recompute="full") == plain + forward_flops(config, 5) - head
        up = config.num_hidden_layers * config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        selective = training_flops(config, 9, mtp=False, recompute="selective") - plain
        queries = (config.q_lora_rank or 0) * config.num_attention_heads * config.qk_head_dim * config.num_hidden_layers
        assert selective == 2 * (up * config.kv_lora_rank + queries if config.is_mla else 0)
        taught = training_flops(config, 9, teacher=CONFIGS["v2-lite"])
        assert taught == training_flops(config, 9) + forward_flops(CONFIGS["v2-lite"], 5)
        lora = training_flops(config, 9, mtp=False, lora=4)
        core = forward_flops(config, 5) - forward_flops(config, 0)
        assert 2 * forward_flops(config, 5) + core < lora < plain + 3 * 2 * 4 * 10**9


@given(seq_len=st.integers(1, 10**6), more=st.integers(1, 10**6), name=st.sampled_from(sorted(BY_NAME)))
def test_longer_sequences_cost_no_less(seq_len, more, name):
    arch = architecture_of(BY_NAME[name])
    longer = seq_len + more
    assert training_flops(arch, seq_len) <= training_flops(arch, longer) * (1 + 1e-12) or any(
        block.attention.chunked
        for _, block in arch.blocks  # the last chunk may be short
    )
    assert training_flops(arch, seq_len) <= training_flops(arch, seq_len, causal=False)
    assert (
        cache_bytes(arch, seq_len)
        <= cache_bytes(arch, longer)
        <= longer * (cache_bytes_per_token(arch) + 4 * sum(n * b.attention.state for n, b in arch.blocks))
    )
    assert forward_flops(arch, seq_len) <= forward_flops(arch, longer)
