"""The one dial with its hands on the machine: time two small models, then let the planner choose (`minga.planner.dial`).

plan = plan_run(open_shards("shards"), hours=1.0)
result = pretrain(TrainConfig(data="shards", out="runs/mine", hours=1.0, model=..., **plan.values()), plan=plan)
"""

from __future__ import annotations

import time
from typing import Any

from minga.config import PRESETS, TrainConfig
from minga.data.shards import Shards
from minga.kernels import cpu
from minga.planner.counts import forward_flops, muon_flops
from minga.planner.dial import Budget, Corpus, Decisions, MachineSpeed, architecture, choose
from minga.recipes.pretrain import fit_to_tokenizer, measure
from minga.runtime.machine import memory

CALIBRATION_SECONDS = (
    40.0  # for both probes; the chosen model is timed in another 20, and all three are within a minute
)
CALIBRATION_SHARE = 0.04  # of the time that was asked for, if that is less
PROBE_WIDTHS = (64, 384)


def plan_run(
    shards: Shards, *, hours: float | None = None, tokens: int | None = None, size: int | None = None, preset: str = ""
) -> Decisions:
    """Calibrates and chooses. `preset` pins the architecture. Raises `UserError` for a budget that makes no run."""
    began = time.monotonic()
    manifest = shards.manifest
    train = manifest.splits["train"]
    corpus = Corpus(
        train.num_tokens, -(-manifest.vocab_size // 64) * 64, train.num_tokens / max(1, train.num_documents)
    )
    model = PRESETS[preset]() if preset else None
    seconds = None if hours is None else hours * 3600
    budget = Budget(seconds, tokens, size, model)
    choose(budget, MachineSpeed(((64, 1e9),)), corpus)  # a budget that makes no run is refused before anything is timed
    speed = calibrate(shards, min(CALIBRATION_SECONDS, CALIBRATION_SHARE * (seconds or float("inf"))))
    asked: dict[str, Any] = {"tokens": tokens, "size": size, "preset": preset or None}
    return Decisions(asked, tuple(choose(budget, speed, corpus)), time.monotonic() - began)


def calibrate(shards: Shards, seconds: float) -> MachineSpeed:
    """FLOP/s of whole optimizer steps of two small models on the corpus itself, in about `seconds` altogether.

    The wide one is left out where it would not come to three steps in its half of the time.
    """
    precision = "int8" if cpu.load() else "float32"
    probes: list[tuple[int, float]] = []
    for width in PROBE_WIDTHS:
        model = architecture(width, shards.manifest.vocab_size).replace(num_nextn_predict_layers=0)
        seq_len = max(1, min(256, shards.manifest.splits["train"].num_tokens // 16))
        run = TrainConfig(data=str(shards.path), model=model, steps=1, seq_len=seq_len, precision=precision)
        config = fit_to_tokenizer(run, shards)
        tokens = config.batch_size * seq_len
        flops = 3 * tokens * forward_flops(config.model, (seq_len + 1) // 2) + muon_flops(config.model)
        half = seconds / len(PROBE_WIDTHS)
        if not probes or 3 * flops / probes[0][1] <= half:
            probes.append((width, flops / measure(config, shards, seconds=half).step))
    return MachineSpeed(tuple(probes), memory()[1], precision)
