"""What training costs: compute to equal loss, speed, memory and what eight bits lose, side by side with the peers.

    minga bench train [--quick] [--only train/tokens-per-second] [--data shards] [--minutes 40] [--threads 2]

    train/compute-to-equal-loss/10m, /30m   CPU-seconds of a 2023-style baseline (baseline.py: GPT-2, AdamW, cosine, the
                        best of three learning rates) over those Minga needs for the baseline's last bits a byte
    train/tokens-per-second/a, /b, /b-int8  forward, backward and update of one DeepSeek-V3 config at 4 x 512 tokens,
                        against transformers with `grouped_mm` experts; fused AdamW on both sides
    train/mfu/b         of the same runs: model FLOPs over the float32 GEMM peak
    train/peak-memory/b resident bytes at the most, theirs of those runs, ours as one trains with it (int8, Muon in 8 bits)
    train/fp8-loss-gap, train/int8-loss-gap, train/optimizer8-loss-gap
                        relative difference of the held-out loss from float32, 2,000 steps, same seed and data. Two runs
                        that start a rounding apart drift apart too: a gap of a tenth of a percent says "equal"
    train/balance/max-over-mean             the fullest expert of any layer over its layer's mean, in the last third of
                        a 30m run with eight experts and MTP, as long as a baseline; median over the steps
    train/mtp-acceptance/30m                of the same run: first drafts on held-out text that the model agrees with

Every measurement has a process of its own; where two sides are timed they alternate, and ratio and spread are over the
pairs. The text is that of corpus.py unless --data names shards that `minga data` wrote; both sides read the same tokens
and are scored on the same held-out windows of 256 tokens. CPU-seconds are those of all threads, evaluations left out.

--quick does with a baseline of `QUICK_MINUTES`, of one size, and shorter runs; its rows say so. What each part of the
recipe gives is in ablation.py.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import baseline
import common
import corpus
import ours
from common import Failed, Row, measure, row, say

from minga.config import ModelConfig, TrainConfig
from minga.config.presets import small, tiny
from minga.planner.counts import forward_flops

QUICK_MINUTES = 1.5
QUICK_LR = 2e-3  # of the baseline where no sweep is paid for
BATCH, LENGTH = 4, 512  # of the speed rows

IDS = (
    *("train/tokens-per-second/a", "train/tokens-per-second/b", "train/tokens-per-second/b-int8"),
    *("train/peak-memory/b", "train/mfu/b"),
    *("train/fp8-loss-gap", "train/int8-loss-gap", "train/optimizer8-loss-gap"),
    *("train/compute-to-equal-loss/10m", "train/compute-to-equal-loss/30m"),
    *("train/balance/max-over-mean", "train/mtp-acceptance/30m"),
)


# ---------------------------------------------------------------------------------------------- what is trained


def bench_a() -> ModelConfig:
    """Model A of the benchmarks: 29.0 M parameters, 16.6 M active."""
    return ModelConfig(
        vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=8192, q_lora_rank=192, kv_lora_rank=128, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4,
        moe_intermediate_size=128, first_k_dense_replace=1, routed_scaling_factor=2.5,
    )  # fmt: skip


SPEED_MODELS: dict[str, Callable[[], ModelConfig]] = {"a": bench_a, "b": small, "tiny": tiny}


# Of the baseline's CPU time, the part that our schedule is laid over: where it ends should be where the losses meet.
SHARE = {"10m": 1 / 30, "30m": 1 / 24}


# ---------------------------------------------------------------------------------------------- measurements


def measure_peak() -> float:
    """Float32 peak in FLOP/s of the better of torch's product and ours."""
    from minga.kernels import cpu
    from minga.recipes.watch import peak

    cpu.load(say)
    return peak("float32")


def measure_speed(
    side: str, model: str, steps: int, precision: str = "float32", muon: bool = False
) -> dict[str, float]:
    """Tokens per second of a step (the median) and the most memory the process ever held, in bytes.

    Both sides update with AdamW, unless ours is asked for as one trains with it: Muon, its momentum in 8 bits.
    """
    import torch

    config = SPEED_MODELS[model]()
    torch.manual_seed(0)
    window_BL = torch.randint(config.vocab_size, (BATCH, LENGTH + 1))
    step = _their_step(config, window_BL) if side == "theirs" else _our_step(config, window_BL, precision, muon)
    times = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return {"tokens_per_second": BATCH * LENGTH / statistics.median(times[1:]), "peak_bytes": _peak_bytes()}


def _our_step(config: ModelConfig, window_BL: Any, precision: str, muon: bool) -> Callable[[], object]:
    from minga.data.packing import Batch
    from minga.kernels import cpu
    from minga.recipes.pretrain import _build
    from minga.train.balance import LoadCounter
    from minga.train.step import train_step

    cpu.load(say)
    if not muon:
        ours.adamw_alone()
    bits = 8 if muon else 32
    run = TrainConfig(model=config, steps=1, batch_size=BATCH, seq_len=LENGTH, precision=precision, optimizer_bits=bits)
    model, optimizer = _build(run)
    model.train()
    counter = LoadCounter(model.moe_layers())
    rates = [run.balance_rate] * len(counter.layers)
    batch = Batch(window_BL[:, :-1].contiguous(), window_BL[None, :, 1:].contiguous(), None, None)
    return lambda: train_step(model, [batch], optimizer, run, counter, with_mtp=False, balance_rates=rates)


def _their_step(config: ModelConfig, window_BL: Any) -> Callable[[], object]:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    settings = {key: value for key, value in config.to_hf().items() if key not in ("architectures", "model_type")}
    model = DeepseekV3ForCausalLM._from_config(
        DeepseekV3Config(**settings), attn_implementation="sdpa", experts_implementation="grouped_mm"
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits_BTV = model(window_BL[:, :-1], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), window_BL[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _peak_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_baseline(data: str, size: str, budget: float, lr: float | None, eval_tokens: int) -> dict[str, Any]:
    """The baseline's last evaluation, its learning rate swept at a tenth of the budget if none is given."""
    from minga.data.shards import open_shards

    shards = open_shards(data)
    options: dict[str, Any] = {"batch_tokens": baseline.BATCH_TOKENS[size], "eval_tokens": eval_tokens}
    options["say"] = lambda r: say(f"  baseline {size} lr {r['lr']:g} {ours.progress(r)}")
    best = lr or baseline.sweep(shards, size, budget=budget / 10, **options)
    return baseline.train(shards, size, budget=budget, lr=best, **options)


def measure_ours(data: str, recipe: str, budget: float, eval_tokens: int) -> dict[str, Any]:
    """A run of about `budget` CPU-seconds."""
    return ours.for_seconds(ours.make(recipe, data=data), budget, eval_tokens)


def measure_steps(data: str, changes: dict[str, Any], steps: int, eval_tokens: int) -> dict[str, Any]:
    """A run of a given number of steps, of the recipe for gaps."""
    values = {**changes, "steps": steps, "eval_every": -(-steps // 4), "eval_tokens": eval_tokens}
    return ours.train(ours.make("gap", data=data, **values))


# ---------------------------------------------------------------------------------------------- rows


@dataclass
class Bench:
    """One call of the benchmark: its settings, and what it has found so far."""

    data: Path | None
    minutes: float
    threads: int
    quick: bool
    only: str
    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def wants(self, *ids: str) -> bool:
        return any(id.startswith(self.only) for id in ids)

    def add(self, row: Row) -> None:
        if self.wants(row["id"]):
            self.rows.append(row)

    def measure(self, name: str, **arguments: Any) -> Any:
        return measure(__file__, name, threads=self.threads, **arguments)

    @property
    def eval_tokens(self) -> int:
        return 50_000 if self.quick else baseline.EVAL_TOKENS

    @cached_property
    def shards(self) -> str:
        return corpus.shards(self.data, say)

    # ------------------------------------------------------------------------------------------ one group each

    def speed(self, model: str, precisions: Sequence[str], rounds: int, steps: int) -> None:
        """Both sides in turn, a process for each; every round gives one ratio."""
        theirs, peaks, muon = [], [], []
        ours: dict[str, list[dict[str, float]]] = {precision: [] for precision in precisions}
        for turn in range(rounds):
            theirs.append(self.measure("speed", side="theirs", model=model, steps=steps))
            for precision in precisions:
                ours[precision].append(
                    self.measure("speed", side="ours", model=model, steps=steps, precision=precision)
                )
            peaks.append(self.measure("peak"))
            if f"train/peak-memory/{model}" in IDS:
                muon.append(self.measure("speed", side="ours", model=model, steps=1, precision="int8", muon=True))
            speeds = "  ".join(f"{p} {runs[-1]['tokens_per_second']:,.0f}" for p, runs in ours.items())
            say(f"  speed {model}, {turn + 1} of {rounds}: theirs {theirs[-1]['tokens_per_second']:,.0f}  {speeds}")
        for precision, runs in ours.items():
            suffix = "" if precision == "float32" else f"-{precision}"
            self._compare(f"train/tokens-per-second/{model}{suffix}", runs, theirs, "tokens_per_second", "tokens/s")
        if "float32" in ours and f"train/mfu/{model}" in IDS:
            runs = ours["float32"]
            self._compare(f"train/peak-memory/{model}", muon, theirs, "peak_bytes", "bytes")
            flops = 3 * forward_flops(SPEED_MODELS[model](), (LENGTH + 1) // 2)
            utilization = [
                [flops * run["tokens_per_second"] / peak for run, peak in zip(side, peaks, strict=True)]
                for side in (runs, theirs)
            ]
            mine, yours = map(statistics.median, utilization)
            self.add(
                row(f"train/mfu/{model}", mine, yours, unit="of the float32 GEMM peak", peer=PEER, ratio=mine / yours,
                    runs=rounds, spread=[min(utilization[0]), max(utilization[0])],
                    note=f"peak {statistics.median(peaks) / 1e9:.0f} GFLOP/s")
            )  # fmt: skip

    def _compare(self, id: str, ours: Sequence[Any], theirs: Sequence[Any], key: str, unit: str) -> None:
        mine, yours = ([run[key] for run in side] for side in (ours, theirs))
        ratios = [a / b for a, b in zip(mine, yours, strict=True)]
        self.add(row(id, statistics.median(mine), statistics.median(yours), unit=unit, peer=PEER, ratios=ratios))

    def gaps(self) -> None:
        steps = 120 if self.quick else 2000
        note = f"{steps} steps" + (", 2,000 without --quick" if self.quick else "")
        losses = {}
        for name, changes in GAPS.items():
            if name == "float32" or self.wants(f"train/{name}-loss-gap"):
                say(f"loss gap: {name}, {steps} steps")
                run = self.measure(
                    "steps", data=self.shards, changes=changes, steps=steps, eval_tokens=self.eval_tokens
                )
                losses[name] = run["evaluations"][-1]["val_loss"]
        reference = losses.pop("float32")
        for name, loss in losses.items():
            self.add(
                row(f"train/{name}-loss-gap", loss / reference - 1, unit="of float32's held-out loss",
                    peer="minga float32", note=f"{loss:.4f} against {reference:.4f} nats a token; {note}")
            )  # fmt: skip

    def equal_loss(self, size: str) -> None:
        """Ours until it is as low as the baseline's end. A schedule that ends too early is laid over more time."""
        minutes = QUICK_MINUTES if self.quick else self.minutes
        budget = minutes * 60 * self.threads
        say(f"baseline {size}: {minutes:g} minutes of {self.threads} threads")
        lr = QUICK_LR if self.quick else None
        theirs = self.measure(
            "baseline", data=self.shards, size=size, budget=budget, lr=lr, eval_tokens=self.eval_tokens
        )
        target, share, tries = theirs["bits_per_byte"], SHARE[size], 0
        while True:
            tries += 1
            run = self.ours(size, share * theirs["seconds"])
            reached = next((e for e in run["evaluations"] if e["bits_per_byte"] <= target), None)
            if reached or share >= 1:
                break
            share = min(1.0, 1.3 * share)
        note = f"to {target:.4f} bits a byte, lr {theirs['lr']:g}, baseline of {minutes:g} minutes"
        if reached:
            note += f"; {reached['tokens'] / 1e6:.2f} M tokens against {theirs['tokens'] / 1e6:.2f} M"
        else:
            note += f"; not reached: {run['evaluations'][-1]['bits_per_byte']:.4f}"
        if tries > 1:
            note += f"; try {tries}: shorter schedules ended above it"
        seconds = reached["seconds"] if reached else None
        self.add(
            row(f"train/compute-to-equal-loss/{size}", seconds, theirs["seconds"], unit="CPU-seconds", peer=BASELINE,
                ratio=theirs["seconds"] / seconds if seconds else None, note=note)
        )  # fmt: skip

    def ours(self, name: str, budget: float) -> dict[str, Any]:
        say(f"minga {name}: {budget:.0f} CPU-seconds")
        return self.measure("ours", data=self.shards, recipe=name, budget=budget, eval_tokens=self.eval_tokens)

    def watched(self) -> None:
        """What a longer run shows beside its loss."""
        run = self.ours("watched", (QUICK_MINUTES if self.quick else self.minutes) * 60 * self.threads)
        balance, last = run["balance"], run["evaluations"][-1]
        note = f"{last['tokens'] / 1e6:.2f} M tokens, {last['bits_per_byte']:.3f} bits a byte"
        self.add(
            row("train/balance/max-over-mean", balance["median"], unit="of the mean load", spread=balance["spread"],
                note=f"{note}; 5th to 95th of the last {balance['steps']} steps")
        )  # fmt: skip
        self.add(row("train/mtp-acceptance/30m", last["mtp_acceptance"], unit="of the first drafts", note=note))


GAPS: dict[str, dict[str, Any]] = {
    "float32": {},
    "fp8": {"precision": "fp8"},
    "int8": {"precision": "int8"},
    "optimizer8": {"optimizer_bits": 8},
}
PEER = "transformers grouped_mm"
BASELINE = "GPT-2 + AdamW"


def run_all(bench: Bench) -> None:
    """The groups of rows that are wanted; one that fails does not take the others with it."""
    b = ("train/tokens-per-second/b", "train/peak-memory/b", "train/mfu/b")
    precisions = [p for p, ids in (("float32", b), ("int8", ("train/tokens-per-second/b-int8",))) if bench.wants(*ids)]
    groups: list[tuple[str, bool, Callable[[], None]]] = [
        ("speed a", bench.wants("train/tokens-per-second/a"),
         lambda: bench.speed("a", ["float32"], rounds=2 if bench.quick else 5, steps=3)),
        ("speed b", bool(precisions),
         lambda: bench.speed("b", precisions, rounds=2 if bench.quick else 5, steps=1 if bench.quick else 2)),
        ("loss gaps", bench.wants(*(f"train/{name}-loss-gap" for name in GAPS)), bench.gaps),
        ("equal loss 10m", bench.wants("train/compute-to-equal-loss/10m"), lambda: bench.equal_loss("10m")),
        ("equal loss 30m", bench.wants("train/compute-to-equal-loss/30m") and not bench.quick,
         lambda: bench.equal_loss("30m")),
        ("the 30m run", bench.wants("train/balance/max-over-mean", "train/mtp-acceptance/30m"), bench.watched),
    ]  # fmt: skip
    for name, wanted, group in groups:
        if wanted:
            say(name)
            try:
                group()
            except Failed as error:
                bench.failures.append(f"{name}: {error}")


# ---------------------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if common.answer(globals(), argv):
        return 0
    parser = common.parser(__doc__)
    corpus.add_argument(parser)
    parser.add_argument("--minutes", type=float, default=40, help="of a baseline (default 40)")
    args = parser.parse_args(argv)
    common.wanted(parser, args.only, IDS)
    bench = Bench(args.data, args.minutes, args.threads, args.quick, args.only)
    run_all(bench)
    return common.finish("train", bench.rows, as_json=args.json, failures=bench.failures)


if __name__ == "__main__":
    sys.exit(main())
