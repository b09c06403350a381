"""Measures what the planner needs to know of this machine: its products, its memory, and a few short training steps.

Of its processors: they are what `minga train` runs on. What a card does, its row in the table says.

calibrate()           # a minute or two; kept in the user's configuration, and found there by `minga.recipes.here`
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minga.config import TrainConfig
from minga.config.hardware import Device, Machine
from minga.data.shards import Shards, build_shards, open_shards
from minga.kernels import cpu
from minga.planner.dial import architecture
from minga.planner.setup import Setup
from minga.planner.time import Measured
from minga.planner.time import calibrate as fit
from minga.recipes.here import check_writable, cpu_device, store
from minga.recipes.pretrain import fit_to_tokenizer, measure
from minga.recipes.watch import peak
from minga.runtime import machine as runtime

SECONDS = 80.0  # for all steps
# Width, sequences, tokens of each: sizes, batches and contexts that tell the terms of a step apart.
RUNS = ((64, 8, 256), (128, 4, 1024), (256, 8, 256), (256, 4, 128), (384, 8, 256), (512, 4, 512))
VOCABULARY = 4096
_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstv" for vowel in "aeiou"]
BUSY = 0.5  # of the cores, by the mean of the last minute
_COPY = 2**28


def calibrate(*, seconds: float = SECONDS, note: Callable[[str], None] = lambda line: None) -> Path:
    """Times products, a copy and `RUNS`, and stores what follows. Returns where."""
    check_writable()
    name, cores = runtime.cpu()[0] or "CPU", runtime.cores()
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * cores:
        note(
            "this machine is busy with other work: what is measured now will be too slow. better measure again when it is idle"
        )
    device = measured_cpu(name, cores)
    note(f"{device.name}: " + ", ".join(f"{rate / 1e9:,.0f} GFLOP/s {kind}" for kind, rate in device.flops.items()))
    precision = "int8" if "int8" in device.flops else "float32"
    rows = measure_steps(Machine(device), precision, seconds=seconds, note=note)
    return store(name, cores, device, fit(rows))


def measured_cpu(name: str, cores: int) -> Device:
    """The processors, by the best products that training does on them, and by copies."""
    flops = {"float32": peak("float32")}
    if cpu.load():
        flops["int8"] = peak("int8")
    source, target = torch.zeros(_COPY, dtype=torch.uint8), torch.zeros(_COPY, dtype=torch.uint8)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - began)
    when = time.strftime("%Y-%m-%d")
    return cpu_device(name, cores, flops, 2 * _COPY / best, f"measured by minga plan --calibrate, {when}")


def measure_steps(
    machine: Machine, precision: str, *, seconds: float, note: Callable[[str], None] = lambda line: None
) -> list[Measured]:
    """Whole optimizer steps of small models on made-up text, an equal share of the time each."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shards = _shards(Path(folder))
        for width, batch, seq_len in RUNS:
            model = architecture(width, VOCABULARY).replace(num_nextn_predict_layers=0)
            run = TrainConfig(
                data=str(shards.path), model=model, steps=1, batch_size=batch, seq_len=seq_len, precision=precision
            )
            config = fit_to_tokenizer(run, shards)
            step = measure(config, shards, seconds=seconds / len(RUNS)).step
            note(f"width {width}, {batch} x {seq_len} tokens: {1000 * step:,.0f} ms a step")
            rows.append(Measured(config.model, own_setup(config), machine, step))
    return rows


def own_setup(config: TrainConfig) -> Setup:
    """How `minga train` trains on one device."""
    return Setup(
        seq_len=config.seq_len,
        micro_batch=config.batch_size,
        accumulate=config.accumulate,
        precision=config.precision,
        optimizer="muon",
        master=False,
        fused_loss=True,
        mtp=bool(config.model.num_nextn_predict_layers),
        recompute="selective" if config.recompute else "none",
    )


def _shards(folder: Path) -> Shards:
    rng = random.Random(0)
    words = ["".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4))) for _ in range(3 * VOCABULARY)]
    for n in range(64):
        (folder / f"{n}.txt").write_text(" ".join(rng.choices(words, k=4000)), encoding="utf-8")
    build_shards([folder], folder / "shards", vocab_size=VOCABULARY)
    return open_shards(folder / "shards")
