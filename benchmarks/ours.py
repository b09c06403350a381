"""Minga's side of the benchmarks: the recipes it trains with, and runs of them that are measured and thrown away."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import baseline
from common import say

from minga.config import ModelConfig, TrainConfig

ADAMW_LR = 2e-3  # of the hidden matrices where AdamW takes Muon's place


def recipe(size: str, **changes: Any) -> TrainConfig:
    """Minga's side of compute-to-equal-loss: about 10 M and 30 M active parameters."""
    shape: dict[str, Any] = {
        "10m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 6,
                "moe_intermediate_size": 192},
        "30m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 9, "num_attention_heads": 8,
                "moe_intermediate_size": 448},
    }[size]  # fmt: skip
    model = ModelConfig(
        **shape, num_key_value_heads=shape["num_attention_heads"], max_position_embeddings=1024, kv_lora_rank=128,
        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, first_k_dense_replace=1,
    )  # fmt: skip
    # short rows: more documents in a batch, and cheaper attention; both sides are scored on windows of baseline.SEQ_LEN. Muon's
    # work does not depend on the batch, so the larger model takes a larger one.
    values: dict[str, Any] = {"model": model, "precision": "int8", "seq_len": 128, "steps": 1}
    values["batch_size"] = {"10m": 32, "30m": 48}[size]
    values["checkpoint_every"] = 0
    return TrainConfig(**{**values, **changes})


def watched_recipe(**changes: Any) -> TrainConfig:
    """The 30m model for a run as long as the baseline's: there more experts pay, and MTP has time to learn."""
    run = recipe("30m", batch_size=64, mtp_from=0.2)
    model = run.model.replace(n_routed_experts=8, num_nextn_predict_layers=1)
    return dataclasses.replace(run, model=model, **changes)


def gap_recipe(**changes: Any) -> TrainConfig:
    """2.9 M parameters with experts, 2.0 M active; its hidden widths are multiples of FP8's blocks of 128."""
    model = ModelConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=1024, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64,
        n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=128,
        first_k_dense_replace=1,
    )  # fmt: skip
    values: dict[str, Any] = {
        "model": model,
        "batch_size": 4,
        "seq_len": baseline.SEQ_LEN,
        "steps": 1,
        "checkpoint_every": 0,
    }
    return TrainConfig(**{**values, **changes})


def make(name: str, **changes: Any) -> TrainConfig:
    """The settings of a recipe: "10m", "30m", "watched" or "gap"."""
    return ({"gap": gap_recipe, "watched": watched_recipe}.get(name) or partial(recipe, name))(**changes)


def adamw_alone() -> None:
    """AdamW for the hidden matrices too, at the baseline's learning rate and weight decay."""
    import torch

    from minga.recipes import pretrain
    from minga.train.optim import Optimizer

    class AdamWAlone(Optimizer):
        def __init__(self, model: torch.nn.Module, config: TrainConfig):
            super().__init__(model, config)
            matrices = [p for group in self._parts[0].param_groups for p in group["params"]]
            self._parts[0] = torch.optim.AdamW(matrices, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
            self._base[0] = [ADAMW_LR]

    pretrain.optimizer_of = lambda model, config, parallel: AdamWAlone(model, config)


def for_seconds(run: TrainConfig, budget: float, eval_tokens: int) -> dict[str, Any]:
    """Trains for about `budget` CPU-seconds, the schedule laid over them. Returns what `train` does."""
    from minga.data.shards import open_shards
    from minga.kernels import cpu
    from minga.recipes.pretrain import fit_to_tokenizer, measure

    shards = open_shards(run.data)
    cpu.load(say)  # the pace is that of the kernels
    run = fit_to_tokenizer(run, shards)
    seconds = measure(run, shards, seconds=10, clock=time.process_time).step
    steps = max(16, round(budget / seconds))
    say(f"  {steps} steps of {run.batch_size * run.accumulate * run.seq_len} tokens, {seconds:.2f} CPU-seconds each")
    return train(dataclasses.replace(run, steps=steps, eval_every=max(1, steps // 16), eval_tokens=eval_tokens))


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs `pretrain` in a folder that is thrown away. Its evaluations, each with the CPU time of the steps before it."""
    from minga.recipes import pretrain as recipes
    from minga.runtime.metrics import read_metrics

    evaluate = recipes._evaluate
    # The last evaluation reads the windows of the others instead of the whole split: both sides are scored on the same.
    recipes._evaluate = lambda model, shards, run, parallel, max_tokens: evaluate(
        model, shards, dataclasses.replace(run, batch_size=8, seq_len=baseline.SEQ_LEN), parallel, run.eval_tokens
    )
    seconds, evaluations, fullest = 0.0, [], []
    with tempfile.TemporaryDirectory() as folder:
        recipes.pretrain(dataclasses.replace(config, out=folder))
        for entry in read_metrics(Path(folder) / "run.jsonl"):
            if entry["kind"] == "step":
                seconds, tokens = seconds + entry["cpu_seconds"], entry["tokens"]
                if entry["step"] > 2 / 3 * config.steps:
                    fullest.append(entry["expert_max_over_mean"])
            elif entry["kind"] == "eval":
                names = ("step", "val_loss", "bits_per_byte", "mtp_acceptance")
                evaluations.append({"seconds": seconds, "tokens": tokens, **{name: entry[name] for name in names}})
                say(f"  {progress(evaluations[-1])}")
    low, middle, high = (sorted(fullest)[int(part * (len(fullest) - 1))] for part in (0.05, 0.5, 0.95))
    return {"evaluations": evaluations, "balance": {"median": middle, "spread": [low, high], "steps": len(fullest)}}


def progress(record: dict[str, Any]) -> str:
    return f"{record['seconds']:7.0f} CPU-s {record['tokens'] / 1e6:6.2f} M tokens  {record['bits_per_byte']:.4f} bits a byte"
