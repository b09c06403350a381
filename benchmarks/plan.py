"""What `minga plan` predicts beside what others published and measured, and beside a rule of thumb.

    minga bench plan [--only plan/foundry]

  plan/foundry/leave-one-model-out  mean error of the time of 209 published steps, each size of model predicted from the others;
                                    beside one constant share of the peak for each kind of device, fitted to the same rows
  plan/foundry/large-from-small     the same on 64 devices and more, from measurements on 8 and fewer
  plan/v3-hours                     hours of DeepSeek-V3's pre-training, no row of that model in the fit, beside its report
  plan/runs/held-out                median error of the GPU-hours of published runs that were not fitted
  plan/serving-day, plan/serving    see benchmarks/plan_serving.py

  plan/memory/train, plan/memory/serve  peak of memory of our own commands, three sizes each: the worst of them

Only the last two measure on this machine. The other rows are in benchmarks/published, their fit in benchmarks/fit.py.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import common
import fit
import plan_memory
import plan_serving
from common import Row, row

CONSTANT = "a constant share of the peak"


def leave_one_model_out(id: str) -> Row:
    """The ratio is ours of theirs: below 1 is better."""
    rows = _foundry()
    theirs = []
    for model in sorted({r.model for r in rows}):
        shares = _constants([r for r in rows if r.model != model])
        theirs += [_constant_error(r, shares) for r in rows if r.model == model]
    return _errors(id, fit.leave_one_model_out(), theirs)


def large_from_small(id: str) -> Row:
    rows = _foundry()
    shares = _constants([r for r in rows if r.devices <= 8])
    theirs = [_constant_error(r, shares) for r in rows if r.devices >= 64]
    return _errors(id, fit.large_from_small(), theirs)


def v3_hours(id: str) -> Row:
    ours, theirs = fit.v3_hours()
    note = "steps alone, as the report counts (180K hours for each 1T tokens), in the published layout"
    return row(id, ours, theirs, unit="H800 hours", peer="DeepSeek-V3 report", ratio=ours / theirs, note=note)


def held_out(id: str) -> Row:
    found = fit.document()
    fits = {name: family["terms"] for name, family in found["families"].items()}
    runs = [run for run in fit.runs(fits) if run.use == "held out"]
    errors = [fit.run_error(run, fits, found["runs"]) for run in runs]
    sizes = [100 * abs(error) for error, _ in errors]
    inside = sum(within for _, within in errors) / len(errors)
    return row(
        id,
        statistics.median(sizes),
        unit="% median error",
        runs=len(sizes),
        spread=(min(sizes), max(sizes)),
        note=f"{inside:.0%} of them between low and high",
    )


@cache
def _serving() -> dict[str, Row]:
    return {found["id"]: found for found in plan_serving.rows()}


def serving(id: str) -> Row:
    return _serving()[id]


SERVING_DAY = ("", "/cost", "/revenue", "/margin", "/prefill-node", "/decode-node")
ROWS: dict[str, Callable[[str], Row]] = {
    "plan/foundry/leave-one-model-out": leave_one_model_out,
    "plan/foundry/large-from-small": large_from_small,
    "plan/v3-hours": v3_hours,
    "plan/runs/held-out": held_out,
    **{f"plan/serving-day{part}": serving for part in SERVING_DAY},
    "plan/serving/fit": serving,
    "plan/serving/held": serving,
}


def _foundry() -> list[fit.Throughput]:
    return [r for r in fit.foundry() if r.precision == "bf16"]


def _ideal(r: fit.Throughput) -> float:
    """The time of its operations at the peak, as a share of the measured time; attention as the full square, as it is usually
    counted in such shares (and the better rule of thumb: it stands for what attention cannot reach).
    """
    return r.shares["linear"] + 2 * r.shares["attention"]


def _constants(rows: Sequence[fit.Throughput]) -> dict[str, float]:
    return {
        family: statistics.fmean(_ideal(r) for r in rows if r.family == family) for family in {r.family for r in rows}
    }


def _constant_error(r: fit.Throughput, shares: Mapping[str, float]) -> float:
    return _ideal(r) / shares[r.family] - 1


def _errors(id: str, ours: Sequence[float], theirs: Sequence[float]) -> Row:
    mean, constant = (100 * statistics.fmean(map(abs, errors)) for errors in (ours, theirs))
    spread = (100 * min(map(abs, ours)), 100 * max(map(abs, ours)))
    return row(
        id, mean, constant, unit="% mean error", peer=CONSTANT, ratio=mean / constant, runs=len(ours), spread=spread
    )


def main() -> int:
    parser = common.parser(__doc__)
    args = parser.parse_args()
    rows = {**ROWS, **plan_memory.rows(quick=args.quick, threads=args.threads)}
    return common.measure_rows("plan", rows, parser, args)


if __name__ == "__main__":
    sys.exit(main())
