"""What training in fewer bits costs in loss: runs that differ in one setting, from the same weights and the same batches.

    python benchmarks/loss_gap.py --data shards [--steps 2000] [--seed 0] [--control]

Prints, for block-FP8 products and for 8-bit optimizer states, the held-out loss (nats a token, all held-out text) beside
that of float32 and the relative gap. Two runs that start a rounding apart drift apart too, so a gap means little beside
that of chance: `--control` adds the float32 run from another seed. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import minga
from minga.config import ModelConfig, TrainConfig
from minga.recipes.pretrain import pretrain
from minga.runtime.machine import describe

CHANGES: dict[str, dict[str, Any]] = {
    "fp8": {"precision": "fp8"},
    "int8": {"precision": "int8"},
    "optimizer8": {"optimizer_bits": 8},
    "bf16-weights": {"weight_dtype": "bf16"},
}


def model() -> ModelConfig:
    """Latent attention and experts, small enough for 2,000 steps in minutes; widths that leave partial FP8 blocks."""
    return ModelConfig(
        vocab_size=4096, hidden_size=144, intermediate_size=288, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, q_lora_rank=None, kv_lora_rank=48, qk_nope_head_dim=24,
        qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
        moe_intermediate_size=96, first_k_dense_replace=1, routed_scaling_factor=1.0, num_nextn_predict_layers=0,
    )  # fmt: skip


def held_out_loss(data: Path, *, steps: int, seed: int = 0, **changes: Any) -> float:
    """Nats a token on all held-out text after `steps` steps of 4 × 128 tokens; `changes` are settings of the run."""
    with tempfile.TemporaryDirectory() as out:
        sizes = {"batch_size": 4, "seq_len": 128, "eval_every": 0, "checkpoint_every": 0}
        config = TrainConfig(data=str(data), out=out, model=model(), steps=steps, seed=seed, **sizes, **changes)
        result = pretrain(config)
    assert result.evaluation is not None  # steps were reached: nobody stopped the run
    return result.evaluation.val_loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder that `minga data` wrote")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=["fp8", "optimizer8"], metavar="CHANGE")
    parser.add_argument("--control", action="store_true", help="also the float32 run from the next seed")
    args = parser.parse_args()
    exact = held_out_loss(args.data, steps=args.steps, seed=args.seed)
    print(f"float32, seed {args.seed}    {exact:.4f}", flush=True)
    rows = []
    for name in args.only:
        loss = held_out_loss(args.data, steps=args.steps, seed=args.seed, **CHANGES[name])
        rows.append({"id": f"train/{name}-loss-gap", "ours": loss, "theirs": exact, "peer": "minga float32"})
        rows[-1] |= {"unit": "nats/token", "ratio": loss / exact, "runs": 1, "spread": None}
        print(f"{name:<18} {loss:.4f}  {loss / exact - 1:+.3%}", flush=True)
    document: dict[str, Any] = {"bench": "loss_gap", "machine": describe(), "rows": rows}
    document["versions"] = {"minga": minga.__version__, "torch": torch.__version__}
    document["commit"] = document["machine"].get("commit")
    if args.control:
        other = held_out_loss(args.data, steps=args.steps, seed=args.seed + 1)
        document["seed_gap"] = other / exact - 1
        print(f"float32, seed {args.seed + 1}    {other:.4f}  {other / exact - 1:+.3%}")
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
