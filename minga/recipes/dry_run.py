"""The plan of a run that is about to begin: its steps timed or known from a calibration, its memory, energy and money.

made = plan_of_run(config, open_shards("shards"), free=memory()[1], watts=...)     # a `minga.planner.plan.Plan`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from minga.config import TrainConfig
from minga.config.hardware import Machine
from minga.data.shards import Shards
from minga.kernels import cpu
from minga.planner.estimate import Estimate
from minga.planner.own_memory import own_training_memory
from minga.planner.own_plan import Length, Timing, training_plan
from minga.planner.plan import Plan
from minga.planner.time import Coefficients, coefficients_of, step_time
from minga.recipes.calibrate import own_setup
from minga.recipes.here import this_processor
from minga.recipes.pretrain import CALIBRATION_SECONDS, CALIBRATION_SHARE, Pace, measure
from minga.train.schedule import num_micro_batches

TIMED_STEPS = 6  # at least, with and without MTP (`pretrain.measure`)


def plan_of_run(
    config: TrainConfig, shards: Shards, *, free: float | None, watts: Estimate, ways: Sequence[str] = ()
) -> Plan:
    """Of a run in one process, whose model has the tokenizer's vocabulary (`pretrain.fit_to_tokenizer`).

    The time is that of a calibration of this machine; without one a few steps are timed, where that is done within a minute;
    else it is a roofline of what two products and a copy took. free: bytes of memory. ways: flags with which the run would fit.
    """
    machine, coefficients = this_processor()
    timing = _roofline(config, machine, coefficients)
    fits = free is None or own_training_memory(config).total <= free
    if coefficients is None and fits and TIMED_STEPS * timing.step.typical <= CALIBRATION_SECONDS:
        timing = _timed(config, shards)
    length = _length(config, shards, timing)
    return training_plan(config, machine, length=length, timing=timing, free=free, watts=watts, ways=ways)


def _length(config: TrainConfig, shards: Shards, timing: Timing) -> Length:
    held_out, steps = shards.manifest.splits["val"].num_tokens, config.steps
    if not steps:
        pace = Pace(timing.step.typical, timing.evaluated_token)
        steps = pace.steps(config, config.hours * 3600 - pace.evaluated_token * held_out)
    on_the_way = (steps - 1) // config.eval_every if config.eval_every else 0
    evaluated = on_the_way * min(config.eval_tokens, held_out) + held_out * (2 if config.ema_decay else 1)
    return Length(steps, num_tokens(config, steps), evaluated, shards.manifest.splits["train"].num_tokens)


def num_tokens(config: TrainConfig, steps: int) -> int:
    """That so many steps read."""
    warm = min(steps, int(steps * config.batch_warmup) + 1) if config.batch_warmup else 0
    grown = sum(num_micro_batches(step / steps, config) for step in range(warm))
    return config.batch_size * config.seq_len * (grown + (steps - warm) * config.accumulate)


def _timed(config: TrainConfig, shards: Shards) -> Timing:
    cpu.load()
    share = CALIBRATION_SHARE * config.hours * 3600 if config.hours else CALIBRATION_SECONDS
    pace = measure(config, shards, seconds=min(CALIBRATION_SECONDS, share))
    return Timing(Estimate.exactly(pace.step), pace.evaluated_token, "a few steps of this run, measured just now")


def _roofline(config: TrainConfig, machine: Machine, coefficients: Coefficients | None) -> Timing:
    share = config.mtp_from if config.model.num_nextn_predict_layers else 1.0  # of the run, without MTP
    setup, known = own_setup(config), coefficients or coefficients_of(machine.device)
    without, with_mtp = (
        step_time(config.model, replace(setup, mtp=on), machine, coefficients=known).total for on in (False, True)
    )
    step = without * share + with_mtp * (1 - share)
    # a token costs a third of what it does in training
    return Timing(step, step.typical / setup.step_tokens / 3, f"roofline; coefficients: {known.source}")
