"""What training costs: compute to equal loss, speed, memory and what eight bits lose, side by side with the peers.

    minga bench train [--quick] [--only train/tokens-per-second] [--data shards] [--minutes 40] [--threads 2]
    python benchmarks/train.py --ablation --data shards --minutes 4

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

--quick does with a baseline of `QUICK_MINUTES`, of one size, and shorter runs; its rows say so. --ablation prints what
each part of the recipe gives instead.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import baseline
import common
import corpus
from common import Failed, Row, measure, row, say

from minga.config import ModelConfig, TrainConfig
from minga.config.presets import small, tiny
from minga.planner.counts import forward_flops

SHARDS = Path(".cache/bench/shards")
QUICK_MINUTES = 1.5
QUICK_LR = 2e-3  # of the baseline where no sweep is paid for, and of the AdamW ablation
SEQ_LEN = baseline.SEQ_LEN
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
    # short rows: more documents in a batch, and cheaper attention; both sides are scored on windows of SEQ_LEN. Muon's
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


# Of the baseline's CPU time, the part that our schedule is laid over: where it ends should be where the losses meet.
SHARE = {"10m": 1 / 30, "30m": 1 / 24}


def gap_recipe(**changes: Any) -> TrainConfig:
    """2.9 M parameters with experts, 2.0 M active; its hidden widths are multiples of FP8's blocks of 128."""
    model = ModelConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=1024, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64,
        n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=128,
        first_k_dense_replace=1,
    )  # fmt: skip
    values: dict[str, Any] = {"model": model, "batch_size": 4, "seq_len": SEQ_LEN, "steps": 1, "checkpoint_every": 0}
    return TrainConfig(**{**values, **changes})


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
        _adamw_alone()
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
    options["say"] = lambda r: say(f"  baseline {size} lr {r['lr']:g} {_progress(r)}")
    best = lr or baseline.sweep(shards, size, budget=budget / 10, **options)
    return baseline.train(shards, size, budget=budget, lr=best, **options)


def measure_ours(data: str, config: dict[str, Any], budget: float, eval_tokens: int) -> dict[str, Any]:
    """A run of about `budget` CPU-seconds, its schedule laid over it. `config` as `_config` reads it."""
    from minga.data.shards import open_shards
    from minga.kernels import cpu
    from minga.recipes.pretrain import fit_to_tokenizer
    from minga.recipes.pretrain import measure as measure_pace

    shards = open_shards(data)
    cpu.load(say)  # the pace is that of the kernels
    run = fit_to_tokenizer(_config(config, data=data), shards)
    seconds = measure_pace(run, shards, seconds=10, clock=time.process_time).step
    steps = max(16, round(budget / seconds))
    say(f"  {steps} steps of {run.batch_size * run.accumulate * run.seq_len} tokens, {seconds:.2f} CPU-seconds each")
    return _train(dataclasses.replace(run, steps=steps, eval_every=max(1, steps // 16), eval_tokens=eval_tokens))


def measure_steps(data: str, config: dict[str, Any], steps: int, eval_tokens: int) -> dict[str, Any]:
    """A run of a given number of steps."""
    return _train(_config(config, data=data, steps=steps, eval_every=-(-steps // 4), eval_tokens=eval_tokens))


def _config(value: dict[str, Any], **changes: Any) -> TrainConfig:
    """{"recipe": "10m", "30m", "watched" or "gap"; "ablation": a name; field: value} -> the settings of a run."""
    value = dict(value)
    name, ablation = value.pop("recipe"), value.pop("ablation", FULL)
    make = {"gap": gap_recipe, "watched": watched_recipe}.get(name) or partial(recipe, name)
    config = make(**value, **changes)
    return ABLATIONS[ablation].apply(config)


def _train(config: TrainConfig) -> dict[str, Any]:
    """Runs `pretrain` in a folder that is thrown away. Its evaluations, each with the CPU time of the steps before it."""
    from minga.recipes import pretrain as recipes
    from minga.runtime.metrics import read_metrics

    evaluate = recipes._evaluate
    # The last evaluation reads the windows of the others instead of the whole split: both sides are scored on the same.
    recipes._evaluate = lambda model, shards, run, parallel, max_tokens: evaluate(
        model, shards, dataclasses.replace(run, batch_size=8, seq_len=SEQ_LEN), parallel, run.eval_tokens
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
                say(f"  {_progress(evaluations[-1])}")
    low, middle, high = (sorted(fullest)[int(part * (len(fullest) - 1))] for part in (0.05, 0.5, 0.95))
    return {"evaluations": evaluations, "balance": {"median": middle, "spread": [low, high], "steps": len(fullest)}}


def _progress(record: dict[str, Any]) -> str:
    return f"{record['seconds']:7.0f} CPU-s {record['tokens'] / 1e6:6.2f} M tokens  {record['bits_per_byte']:.4f} bits a byte"


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
        """The folder that both sides read; made from the packages of corpus.py where none is given."""
        from minga.data.shards import build_shards, open_shards

        if self.data is not None:
            open_shards(self.data)
            return str(self.data)
        if not SHARDS.is_dir():
            say(f"text: no --data, so {corpus.DEFAULT} is fetched and tokenized")
            corpus.fetch(corpus.DEFAULT, say)
            build_shards([str(corpus.DEFAULT)], SHARDS, vocab_size=4096, val_fraction=0.012)
        return str(SHARDS)

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
                config = {"recipe": "gap", **changes}
                run = self.measure("steps", data=self.shards, config=config, steps=steps, eval_tokens=self.eval_tokens)
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
        return self.measure(
            "ours", data=self.shards, config={"recipe": name}, budget=budget, eval_tokens=self.eval_tokens
        )

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


# ---------------------------------------------------------------------------------------------- ablation


FULL = "full-recipe"


@dataclass(frozen=True)
class Ablation:
    """One part of the recipe taken out, or put in. `against`: the run that differs in this part alone."""

    change: Callable[[TrainConfig], TrainConfig] | None = None
    patch: Callable[[], None] | None = None  # of this process, for what no setting can say
    against: str = FULL

    def apply(self, run: TrainConfig) -> TrainConfig:
        if self.patch is not None:
            self.patch()
        return self.change(run) if self.change is not None else run


def _with(**values: Any) -> Callable[[TrainConfig], TrainConfig]:
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    assert known >= values.keys(), f"settings that no run has: {values.keys() - known}"
    return lambda run: dataclasses.replace(run, **values)


def _model(change: Callable[[ModelConfig], ModelConfig]) -> Callable[[TrainConfig], TrainConfig]:
    return lambda run: dataclasses.replace(run, model=change(run.model))


def _dense(model: ModelConfig) -> ModelConfig:
    """The same active parameters without a choice of experts, in layers that are all alike."""
    chosen = model.moe_intermediate_size * (model.num_experts_per_tok + model.n_shared_experts)
    first = model.first_k_dense_replace
    width = (first * model.intermediate_size + (model.num_hidden_layers - first) * chosen) / model.num_hidden_layers
    return model.replace(n_routed_experts=0, n_shared_experts=0, intermediate_size=64 * round(width / 64))


def _grouped_query(model: ModelConfig) -> ModelConfig:
    """The dense model with Qwen3's attention, a key head for each two query heads; such a model has no MTP."""
    dense = _dense(model)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return ModelConfig(
        model_type="qwen3", **{name: getattr(dense, name) for name in names}, head_dim=dense.v_head_dim,
        num_key_value_heads=dense.num_attention_heads // 2, max_position_embeddings=dense.max_position_embeddings,
        rope_interleave=False,
    )  # fmt: skip


def _adamw_alone() -> None:
    """AdamW for the hidden matrices too, at the baseline's learning rate and weight decay."""
    import torch

    from minga.recipes import pretrain
    from minga.train.optim import Optimizer

    class AdamWAlone(Optimizer):
        def __init__(self, model: torch.nn.Module, config: TrainConfig):
            super().__init__(model, config)
            matrices = [p for group in self._parts[0].param_groups for p in group["params"]]
            self._parts[0] = torch.optim.AdamW(matrices, lr=QUICK_LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
            self._base[0] = [QUICK_LR]

    pretrain.optimizer_of = lambda model, config, parallel: AdamWAlone(model, config)


def _documents_run_on() -> None:
    """Attention and positions pass over the ends of documents, as nanoGPT's do."""
    from minga.data import loader, packing

    pack = packing.pack
    loader.pack = lambda *args, **options: dataclasses.replace(
        pack(*args, **options), segments_BT=None, positions_BT=None
    )


def _mtp(model: ModelConfig) -> ModelConfig:
    return model.replace(num_nextn_predict_layers=1)


def _half_batches(run: TrainConfig) -> TrainConfig:
    """A step begins with half its rows and has all of them from the middle of the run on."""
    return dataclasses.replace(run, batch_size=run.batch_size // 2, accumulate=2, batch_warmup=1.0)


def _long_rows(run: TrainConfig) -> TrainConfig:
    return dataclasses.replace(run, batch_size=run.batch_size // 2, seq_len=2 * run.seq_len)


ABLATIONS: dict[str, Ablation] = {
    FULL: Ablation(),
    "adamw": Ablation(patch=_adamw_alone),
    "dense": Ablation(_model(_dense)),
    "gqa": Ablation(_model(_grouped_query), against="dense"),
    "eight-experts": Ablation(_model(lambda model: model.replace(n_routed_experts=8))),
    "mtp": Ablation(_model(_mtp)),
    "mtp-all-along": Ablation(lambda run: dataclasses.replace(run, model=_mtp(run.model), mtp_from=0.0)),
    "batch-schedule": Ablation(_half_batches),
    "rows-of-256": Ablation(_long_rows),
    "length-schedule": Ablation(lambda run: dataclasses.replace(_long_rows(run), seq_len_start=128, seq_warmup=0.5)),
    "float32": Ablation(_with(precision="float32")),
    "no-document-mask": Ablation(patch=_documents_run_on),
}


def run_ablation(bench: Bench, size: str) -> None:
    """Each variant gets the same CPU time. A row: its last bits a byte, its reference's, and the time to equal loss.

    The ratio is the time the variant needs over the time its reference needs to the higher of their two ends: above 1,
    the part that was changed pays.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    wanted = {name for name in ABLATIONS if bench.wants(f"train/ablation/{name}")}
    wanted |= {ABLATIONS[name].against for name in wanted}
    for name in ABLATIONS:
        if name not in wanted:
            continue
        say(f"ablation {size}: {name}")
        try:
            run = bench.measure(
                "ours", data=bench.shards, config={"recipe": size, "ablation": name},
                budget=bench.minutes * 60 * bench.threads, eval_tokens=bench.eval_tokens,
            )  # fmt: skip
        except Failed as error:
            bench.failures.append(f"{name}: {error}")
            continue
        curves[name] = [(e["seconds"], e["bits_per_byte"]) for e in run["evaluations"]]
    for name, curve in curves.items():
        reference = curves.get(ABLATIONS[name].against)
        if reference and name != FULL:
            level = max(curve[-1][1], reference[-1][1])
            ratio = time_to(curve, level) / time_to(reference, level)
            bench.rows.append(
                row(f"train/ablation/{name}", curve[-1][1], reference[-1][1], peer=ABLATIONS[name].against,
                    unit="bits a byte", ratio=ratio, note=f"{size}, {curve[-1][0]:.0f} CPU-seconds; ratio of time to {level:.4f}")
            )  # fmt: skip


def time_to(curve: Sequence[tuple[float, float]], level: float) -> float:
    """CPU-seconds at which a falling curve of (seconds, bits a byte) first comes down to `level`, between its points."""
    for index, (seconds, bits) in enumerate(curve):
        if bits <= level:
            if not index:
                return seconds
            before, above = curve[index - 1]
            return before + (seconds - before) * (above - level) / (above - bits)
    raise AssertionError("the level is above the curve's end")


# ---------------------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if common.answer(globals(), argv):
        return 0
    parser = common.parser(__doc__)
    parser.add_argument(
        "--data", type=Path, help=f"folder that `minga data` wrote (default: {SHARDS}, made if need be)"
    )
    parser.add_argument("--minutes", type=float, help="of a baseline (default 40), or of each run of the ablation (4)")
    parser.add_argument("--ablation", action="store_true", help="what each part of the recipe gives, and nothing else")
    parser.add_argument("--size", choices=SHARE, default="10m", help="of the ablation (default 10m)")
    args = parser.parse_args(argv)
    if args.only and not args.ablation and not any(id.startswith(args.only) for id in IDS):
        parser.error(f"no row's id begins with {args.only!r}. the rows are {', '.join(IDS)}")
    minutes = args.minutes or (4 if args.ablation else 40)
    bench = Bench(args.data, minutes, args.threads, args.quick, args.only)
    if args.ablation:
        run_ablation(bench, args.size)
    else:
        run_all(bench)
    return common.finish("train", bench.rows, as_json=args.json, failures=bench.failures)


if __name__ == "__main__":
    sys.exit(main())
