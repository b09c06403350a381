"""Fits the planner's coefficients to published measurements, and says how well they predict what they were not fitted to.

    python benchmarks/fit.py             writes minga/planner/coefficients.json and prints the validation
    python benchmarks/fit.py --check     prints only, and fails if the file is not what the rows say

The rows are in benchmarks/published, each file with its source and licence: throughput of MPT models (llm-foundry), of Llama,
Qwen, gpt-oss, DeepSeek-V3 and Kimi K2 (Megatron-Bridge), of Llama 3.1 (torchtitan), and GPU-hours of whole runs. `models.json`
has the public configs. Append rows of your own: nothing else needs to change.

Three terms that only models with experts or tensor parallelism have are shared by all devices, the others belong to a family
of devices. A family starts from the coefficients of all rows together and leaves them as far as its own rows say (`PULL`).
DeepSeek-V3's own run is in no fit: `runs.csv` marks it, and every second other run by a hash of its name, as held out.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from minga.config.hardware import Machine, find_device
from minga.config.hardware import machine as machine_of
from minga.planner.setup import Setup
from minga.planner.time import BOUNDS, FAMILIES, SHIPPED, Measured, least_squares, shares_of

PUBLISHED = Path(__file__).with_name("published")
SHARED = ("experts", "calls", "dispatch", "tensor", "routing")
PULL = 0.3
Terms = Mapping[str, float]


@dataclass(frozen=True)
class Throughput:
    """A published measurement: its step, and each ideal time as a part of the measured one."""

    source: str  # the file
    model: str
    family: str
    devices: int
    precision: str
    step: Measured
    shares: Terms

    @property
    def sparse(self) -> bool:
        return self.shares["experts"] > 0


# --------------------------------------------------------------------------------------------------------------- published


@cache
def models() -> dict[str, dict[str, Any]]:
    return json.loads((PUBLISHED / "models.json").read_text())


def lines(name: str) -> list[dict[str, str]]:
    with (PUBLISHED / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def family_of(device: str) -> str:
    return next((name for name, members in FAMILIES.items() if device in members), "other")


def _throughput(source: str, model: str, r: Mapping[str, str], setup: Setup, tokens_per_second: float) -> Throughput:
    device = find_device(r["device"])
    if r.get("bandwidth"):
        device = dataclasses.replace(device, bandwidth=float(r["bandwidth"]))
    machine = Machine(device, setup.devices, device.per_node, device.network)
    step = Measured(models()[model], setup, machine, setup.step_tokens / tokens_per_second)
    return Throughput(source, model, family_of(device.name), setup.devices, setup.precision, step, shares_of(step))


@cache
def foundry() -> tuple[Throughput, ...]:
    """llm-foundry's 209 rows in bf16 and 7 in fp8."""
    found = []
    for r in lines("foundry.csv"):
        keys = ("seq_len", "micro_batch", "accumulate")
        sizes = {key: int(r[key]) for key in keys} | {"dp": int(r["devices"]), "shard": int(r["sharding"])}
        setup = Setup(**sizes, precision=r["precision"], recompute=r["recompute"])
        found.append(_throughput("foundry", f"mpt-{r['model']}", r, setup, float(r["tokens_per_second"])))
    return tuple(found)


@cache
def others() -> tuple[Throughput, ...]:
    """Megatron-Bridge's and torchtitan's rows."""
    found = []
    for source in ("megatron", "torchtitan"):
        for r in lines(f"{source}.csv"):
            keys = ("seq_len", "micro_batch", "accumulate", "dp", "tp", "pp", "chunks", "ep", "shard")
            setup = Setup(
                **{key: int(r[key]) for key in keys if key in r},
                precision=r["precision"],
                recompute=r.get("recompute", "none"),
                mtp=r.get("mtp") == "1",
                lora_rank=16 if r.get("task") == "lora" else None,
            )
            rate = float(r["tokens_per_second"]) * int(r["devices"])
            found.append(_throughput(source, r["model"], r, setup, rate))
    return tuple(found)


# --------------------------------------------------------------------------------------------------------------------- fit


def fit(rows: Sequence[Throughput]) -> dict[str, dict[str, float]]:
    """Coefficients of each family in `rows`, and of "other": what all rows say together."""
    middle = {term: (low + high) / 2 for term, (low, high) in BOUNDS.items()}
    pooled = least_squares([row.shares for row in rows], BOUNDS, middle, pull=0.01)
    families = sorted({row.family for row in rows})

    def name(term: str, family: str) -> str:
        return term if term in SHARED else f"{family} {term}"

    names = {name(term, family): term for term in BOUNDS for family in families}
    found = least_squares(
        [{name(term, row.family): share for term, share in row.shares.items()} for row in rows],
        {key: BOUNDS[term] for key, term in names.items()},
        {key: pooled[term] for key, term in names.items()},
        pull=PULL,
    )
    fits = {family: {term: found[name(term, family)] for term in BOUNDS} for family in families}
    return fits | {"other": pooled}


def errors(rows: Iterable[Throughput], fits: Mapping[str, Terms], *, family: str | None = None) -> list[float]:
    """Predicted time / measured time - 1. family: whose coefficients, where not those of the row's device."""
    return [
        sum(fits[family or row.family][term] * share for term, share in row.shares.items()) - 1 for row in rows
    ]


def leave_out(
    rows: Sequence[Throughput], key: Callable[[Throughput], Any], *, beside: Sequence[Throughput] = ()
) -> list[tuple[Throughput, float]]:
    """Each row's error in a fit to the rows (and `beside`) that differ from it in `key`."""
    found = []
    for value in sorted({key(row) for row in rows}):
        fits = fit([row for row in (*rows, *beside) if key(row) != value])
        unseen = [row for row in rows if key(row) == value]
        found += [
            (row, errors([row], fits, family=None if row.family in fits else "other")[0]) for row in unseen
        ]
    return found


def inner(values: Iterable[float], share: float = 0.9) -> tuple[float, float]:
    """The ends of the middle `share` of the values."""
    ordered = sorted(values)
    cut = (1 - share) / 2 * (len(ordered) - 1)

    def at(place: float) -> float:
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return at(cut), at(len(ordered) - 1 - cut)
