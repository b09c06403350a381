"""Fits the planner's coefficients to published measurements, and says how well they predict what they were not fitted to.

    python benchmarks/fit.py             writes minga/planner/coefficients.json and prints the validation
    python benchmarks/fit.py --check     prints only, and fails if the file is not what the rows say

The rows are in benchmarks/published, each file with its source and licence: throughput of MPT models (llm-foundry), of Llama,
Qwen, gpt-oss, DeepSeek-V3 and Kimi K2 (Megatron-Bridge), of Llama 3.1 (torchtitan), and GPU-hours of whole runs. `models.json`
has the public configs. Append rows of your own: nothing else needs to change.

The terms that only models with experts or tensor parallelism have are shared by all devices, the others belong to a family of
devices. A family starts from the coefficients of all rows together and leaves them as far as its own rows say (`PULL`).
DeepSeek-V3's own run is in no fit; of the other runs about every second one, by a hash of its name, is held out.
"""

from __future__ import annotations

import argparse
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
from minga.errors import UserError
from minga.planner.architecture import architecture_of
from minga.planner.layout import choose_setup
from minga.planner.memory import GREEN, training_memory
from minga.planner.setup import Setup
from minga.planner.time import (
    BOUNDS,
    FAMILIES,
    SHIPPED,
    Coefficients,
    Measured,
    calibrate,
    least_squares,
    shares_of,
    step_parts,
    work_of,
)

PUBLISHED = Path(__file__).with_name("published")
SHARED = ("experts", "calls", "dispatch", "tensor", "routing")
PULL = 0.3
FEW = 5  # rows of a stack, below which it says nothing about its spread
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
    return [sum(fits[family or row.family][term] * share for term, share in row.shares.items()) - 1 for row in rows]


def leave_out(
    rows: Sequence[Throughput], key: Callable[[Throughput], Any], *, beside: Sequence[Throughput] = ()
) -> list[tuple[Throughput, float]]:
    """Each row's error in a fit to the rows (and `beside`) that differ from it in `key`."""
    found = []
    for value in sorted({key(row) for row in rows}):
        fits = fit([row for row in (*rows, *beside) if key(row) != value])
        unseen = [row for row in rows if key(row) == value]
        found += [(row, errors([row], fits, family=None if row.family in fits else "other")[0]) for row in unseen]
    return found


def middle(values: Iterable[float], share: float = 0.9) -> tuple[float, float]:
    """Between which a further value lies with that chance: the ranks p (n + 1) of the n values (conformal prediction)."""
    ordered = sorted(values)

    def at(place: float) -> float:
        place = min(max(place, 0.0), len(ordered) - 1.0)
        low = min(int(place), len(ordered) - 2)
        return ordered[low] + (place - low) * (ordered[low + 1] - ordered[low])

    cut = (1 - share) / 2 * (len(ordered) + 1) - 1
    return at(cut), at(len(ordered) - 1 - cut)


# -------------------------------------------------------------------------------------------------------------- whole runs


@dataclass(frozen=True)
class Run:
    """A published run, and the set-up that the planner chooses for it where its makers do not say."""

    name: str
    use: str  # "fit", "held out"; "never" is in neither
    figure: str  # "rate": hours of its steps alone; "bill": of everything
    gpu_hours: float
    tokens: float
    setup: Setup
    machine: Machine

    def step_hours(self, fits: Mapping[str, Terms]) -> float:
        """GPU-hours of its steps alone."""
        terms = fits[family_of(self.machine.device.name)]
        work = work_of(models()[self.name], self.setup.seq_len, mtp=self.setup.mtp)
        seconds = sum(step_parts(work, self.setup, self.machine, Coefficients(terms)).values())
        return seconds * self.tokens / self.setup.step_tokens * self.setup.devices / 3600


def runs(fits: Mapping[str, Terms], *, only: str = "") -> list[Run]:
    found = []
    for r in lines("runs.csv"):
        if not only or r["name"] == only:
            half = "fit" if hashlib.sha256(r["name"].encode()).digest()[0] % 2 else "held out"
            hours, tokens = float(r["gpu_hours"]), float(r["tokens"])
            found.append(Run(r["name"], r["fit"] or half, r["figure"], hours, tokens, *_setup(r, fits)))
    return found


def _setup(r: Mapping[str, str], fits: Mapping[str, Terms]) -> tuple[Setup, Machine]:
    """What is published, and for the rest what the planner chooses. Some runs were planned closer to the edge of the memory
    than we advise: where nothing fits in that part, all of it may be used.
    """
    arch, device, count = architecture_of(models()[r["name"]]), find_device(r["device"]), int(r["devices"])
    network = float(r["network"]) if r["network"] else device.network
    machine = Machine(device, count, min(count, device.per_node), network)

    def choose(room: float) -> Setup:
        return choose_setup(
            arch,
            machine,
            precision=r["precision"],
            seq_len=int(r["seq_len"]),
            fits=lambda setup: training_memory(arch, setup).total <= room,
            tokens=float(r["tokens"]),
            batch_tokens=float(r["batch_tokens"]) if r["batch_tokens"] else None,
            coefficients=Coefficients(fits[family_of(device.name)]),
            **{key: int(r[key]) if r[key] else None for key in ("tp", "pp", "ep")},
        )

    try:
        return choose(GREEN * device.memory), machine
    except UserError:
        return choose(device.memory), machine


def overhead(published: Iterable[Run], fits: Mapping[str, Terms]) -> dict[str, float]:
    """What runs are billed beyond the hours of their steps as predicted, from those that are to be fitted."""
    ratios = [run.gpu_hours / run.step_hours(fits) for run in published if run.use == "fit" and run.figure == "bill"]
    low, high = middle(ratios)
    factors = {"low": low, "typical": _least_error(ratios), "high": high}
    return {name: round(factor, 3) for name, factor in factors.items()} | {"runs": len(ratios)}


def _least_error(ratios: Sequence[float]) -> float:
    """The prediction with the least mean relative error: their median, each weighted by its inverse."""
    ordered, half = sorted(ratios), sum(1 / ratio for ratio in ratios) / 2
    for ratio in ordered:
        half -= 1 / ratio
        if half <= 0:
            return ratio
    raise AssertionError(ratios)


def run_error(run: Run, fits: Mapping[str, Terms], factors: Mapping[str, float]) -> tuple[float, bool]:
    """Predicted / published hours - 1, of the typical value, and whether the published ones are between low and high."""
    hours = run.step_hours(fits)
    typical = hours * (factors["typical"] if run.figure == "bill" else 1.0)
    return typical / run.gpu_hours - 1, factors["low"] * hours <= run.gpu_hours <= factors["high"] * hours


def v3_hours() -> tuple[float, float]:
    """Hours of the steps of DeepSeek-V3's pre-training in its published set-up, in a fit without any row of that model; and
    the published ones: 180K for each trillion tokens, times 14.8.
    """
    fits = fit([row for row in measured_rows() if row.model != "deepseek-v3"])
    run = next(run for run in runs(fits, only="deepseek-v3"))
    return run.step_hours(fits), run.gpu_hours


# ------------------------------------------------------------------------------------------------------------------ result


def measured_rows() -> list[Throughput]:
    return [*foundry(), *others()]


def leave_one_model_out() -> list[float]:
    """Errors of llm-foundry's 209 rows in bf16, each size predicted from the other sizes."""
    rows = [row for row in foundry() if row.precision == "bf16"]
    return [error for _, error in leave_out(rows, lambda row: row.model)]


def large_from_small() -> list[float]:
    """Errors of llm-foundry's rows with 64 devices and more in a fit to those with 8 and fewer."""
    rows = [row for row in foundry() if row.precision == "bf16"]
    fits = fit([row for row in rows if row.devices <= 8])
    return errors([row for row in rows if row.devices >= 64], fits)


def unseen_device(calibrated: int = 0) -> list[float]:
    """Errors of llm-foundry's rows on each family of devices in a fit to the others. calibrated: after so many measured
    steps of that family, every n-th of its rows.
    """
    rows = [row for row in foundry() if row.precision == "bf16"]
    found = []
    for family in sorted({row.family for row in rows}):
        pooled = Coefficients(fit([row for row in rows if row.family != family])["other"])
        unseen = [row for row in rows if row.family == family]
        if calibrated:
            picked = [unseen[(2 * n + 1) * len(unseen) // (2 * calibrated)] for n in range(calibrated)]
            unseen = [row for row in unseen if row not in picked]
            pooled = calibrate([row.step for row in picked], start=pooled)
        found += errors(unseen, {family: pooled.terms})
    return found


def document() -> dict[str, Any]:
    """What coefficients.json holds."""
    rows = measured_rows()
    fits = fit(rows)
    by_model = leave_out(rows, lambda row: row.model)
    by_family = leave_out(rows, lambda row: row.family)

    def doubt(found: Iterable[tuple[Throughput, float]], sparse: bool) -> list[float]:
        """Between them lie nine of ten rows of every stack, for nobody knows which one a reader has."""
        stacks: dict[tuple[str, str], list[float]] = {}
        for row, error in found:
            if row.sparse == sparse:
                stacks.setdefault((row.source, row.precision), []).append(1 / (1 + error))
        ends = [middle(ratios) for ratios in stacks.values() if len(ratios) >= FEW]
        return [round(min(low for low, _ in ends), 3), round(max(high for _, high in ends), 3)]

    families = {}
    for name, terms in fits.items():
        # where a family has rows of few stacks, other stacks differ by as much as they do elsewhere
        found = [*by_model, *by_family] if name == "other" else by_model
        families[name] = {
            "terms": {term: float(f"{value:.4g}") for term, value in terms.items()},
            "dense": doubt(found, False),
            "sparse": doubt(found, True),
            "source": f"{sum(name in ('other', row.family) for row in rows)} published steps, fitted by benchmarks/fit.py",
        }
    return {"families": families, "runs": overhead(runs(fits), fits)}


def summary(values: Sequence[float]) -> str:
    sizes = sorted(abs(value) for value in values)
    mean, median = statistics.fmean(sizes), statistics.median(sizes)
    return f"mean {mean:6.1%}   median {median:6.1%}   most {sizes[-1]:6.1%}   of {len(sizes)}"


def report(fits: Mapping[str, Terms], factors: Mapping[str, float]) -> None:
    rows = measured_rows()
    print("relative error of the time of a step")
    print("  llm-foundry, each size from the others      ", summary(leave_one_model_out()))
    print("  llm-foundry, >= 64 devices from <= 8        ", summary(large_from_small()))
    print("  llm-foundry, each device from the others    ", summary(unseen_device()))
    print("  the same after 3 measured steps             ", summary(unseen_device(3)))
    unseen = leave_out(rows, lambda row: row.model)
    for label, wanted in (("dense", False), ("experts", True)):
        found = [error for row, error in unseen if row.sparse == wanted and row.source != "foundry"]
        print(f"  Megatron, torchtitan, {label}, models unseen ".ljust(46), summary(found))
    print("  all rows, as fitted                         ", summary(errors(rows, fits)))
    ours, theirs = v3_hours()
    print(f"\nDeepSeek-V3, its models unseen: {ours:,.0f} hours, published {theirs:,.0f}: {ours / theirs - 1:+.1%}")
    print(
        f"\nwhole runs: billed / steps  low {factors['low']:.2f}  typical {factors['typical']:.2f}  high {factors['high']:.2f}"
    )
    found = runs(fits)
    for use in ("fit", "held out", "never"):
        chosen = [(run, *run_error(run, fits, factors)) for run in found if run.use == use]
        inside = sum(inside for _, _, inside in chosen) / len(chosen)
        print(f"{use}: {summary([error for _, error, _ in chosen])}   between low and high {inside:.0%}")
        for run, error, within in sorted(chosen, key=lambda entry: entry[1]):
            s = run.setup
            layout = (
                f"dp {s.dp} tp {s.tp} pp {s.pp} ep {s.ep} shard {s.shard} micro-batch {s.micro_batch} {s.recompute}"
            )
            print(
                f"  {run.name:18} {run.figure:5} published {run.gpu_hours:12,.0f}   steps {run.step_hours(fits):12,.0f}"
                f"   error {error:+7.1%}{'' if within else ' outside'}   {layout}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is not what the rows say")
    check = parser.parse_args().check
    found = document()
    text = json.dumps(found, indent=1) + "\n"
    if check and text != SHIPPED.read_text():
        print(f"{SHIPPED} is not what the rows say. run python benchmarks/fit.py", file=sys.stderr)
        return 1
    if not check:
        SHIPPED.write_text(text)
    report({name: family["terms"] for name, family in found["families"].items()}, found["runs"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
