"""The plan of that very run, before it begins: what `minga train` takes of this machine, and what makes it fit.

    made = training_plan(config, machine, num_tokens=..., free=...)    # a Plan, as `minga plan` makes them
    for changed, flags in ways_to_train(config, free): ...             # flags: "--set batch_size=4 --set accumulate=2"

Memory is that of `own_memory`: the peak of one process, against what the machine has free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from minga.config import ModelConfig, TrainConfig
from minga.config.hardware import Machine
from minga.errors import UserError
from minga.planner import cost
from minga.planner.architecture import architecture_of
from minga.planner.counts import count_parameters, training_flops
from minga.planner.estimate import Estimate, Fact
from minga.planner.memory import RULE, RULE_SOURCE, Change, Memory, cheapest, verdict
from minga.planner.own_memory import own_training_memory
from minga.planner.plan import Plan, Section, carbon_fact, electricity_fact, energy_fact
from minga.planner.time import LOST
from minga.planner.words import batches, count, machine_words, size

OWN_MEMORY = "peak of the process, from the code's own tensors (minga/planner/own_memory.py)"


# ---------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Timing:
    """Seconds of a step of the run, the mean over it, and of a token of an evaluation; and how they are known."""

    step: Estimate
    evaluated_token: float
    source: str


@dataclass(frozen=True)
class Length:
    """What a run reads: `trained` and `evaluated` tokens, from a `corpus` of so many. `steps`: given, or what its hours allow."""

    steps: int
    trained: int
    evaluated: int
    corpus: int


def training_plan(
    config: TrainConfig,
    machine: Machine,
    *,
    length: Length,
    timing: Timing,
    free: float | None,
    watts: Estimate,
    ways: Sequence[str] = (),
) -> Plan:
    """A run in one process.

    free: bytes of memory, None where the system does not say. ways: flags with which it would fit (`ways_to_train`), for a note.
    """
    memory = own_training_memory(config)
    notes = [] if free is None else list(_memory_notes(memory.total, free, ways))
    seconds = Estimate.exactly(config.hours * 3600)
    if config.steps:
        seconds = (timing.step * length.steps + Estimate.exactly(timing.evaluated_token * length.evaluated)) * LOST
    sections = (
        Section("model", tuple(_model_facts(config))),
        Section("training", tuple(_training_facts(config, length, timing, seconds))),
        memory_section(memory, free, "memory"),
        Section("energy and electricity", energy_facts(seconds / 3600, watts)),
    )
    title = f"{length.steps:,} steps of {_step_tokens(config):,} tokens on {machine_words(machine)}"
    return Plan(title, architecture_of(config.model), machine, sections, tuple(notes), memory=memory)


def _step_tokens(config: TrainConfig) -> int:
    return config.batch_size * config.accumulate * config.seq_len


def _model_facts(config: TrainConfig) -> Iterator[Fact]:
    counts, exact = count_parameters(config.model), "exact: sum over the matrices of the config"
    yield Fact("params.total", counts.total, "", "parameters", "embedding + blocks + head", source=exact)
    yield Fact("params.active", counts.active, "", "active for a token", "total - experts not chosen", source=exact)
    if counts.mtp:
        yield Fact("params.mtp", counts.mtp, "", "multi-token prediction, besides", source=exact)
    yield Fact(
        "flops_per_token",
        _flops(config),
        "FLOP",
        f"training a token of {config.seq_len:,}",
        "forward 2 x active matrices + attention over a causal sequence; backward twice that; MTP for its share of the run",
        {"seq_len": config.seq_len, "mtp_from": config.mtp_from},
        exact,
    )


def _flops(config: TrainConfig) -> float:
    """Of a token, the mean over the run."""
    without, with_mtp = (training_flops(config.model, config.seq_len, mtp=on) for on in (False, True))
    return config.mtp_from * without + (1 - config.mtp_from) * with_mtp


def _training_facts(c: TrainConfig, length: Length, timing: Timing, seconds: Estimate) -> Iterator[Fact]:
    shape = {"batch_size": c.batch_size, "accumulate": c.accumulate, "seq_len": c.seq_len}
    tokens, step, flops = _step_tokens(c), timing.step, _flops(c) * length.trained
    speed = Estimate(*(tokens / each for each in (step.high, step.typical, step.low)))
    words = f"{c.precision}, {batches(c.accumulate, c.batch_size, c.seq_len)}"
    words += f", weights in {c.weight_dtype}" * (c.weight_dtype != "float32")
    words += ", recomputation" * c.recompute + f", optimizer in {c.optimizer_bits} bits" * (c.optimizer_bits != 32)
    known = "(steps x seconds of a step + evaluations) x what runs lose to checkpoints and restarts"
    yield Fact("train.steps", length.steps, "", "steps", "given" if c.steps else "that fit into the hours")
    yield Fact("train.tokens", length.trained, "", "tokens", "steps x sequences of a step x tokens of each", shape)
    yield Fact("train.epochs", length.trained / length.corpus, "", "epochs", "tokens / tokens of the training split")
    yield Fact(
        "train.evaluated", length.evaluated, "", "tokens of evaluations", "on the way, and all held out at the end"
    )
    yield Fact("train.setup", words, "", "set-up")
    yield Fact("train.flops", flops, "FLOP", "operations", "operations of a token x tokens", source="exact")
    yield Fact("train.step_seconds", step, "s", f"a step of {count(tokens)} tokens", source=timing.source)
    yield Fact("train.tokens_per_second", speed, "tokens/s", "speed", "tokens / seconds", source=timing.source)
    yield Fact("train.days", seconds / 86400, "days", "time", known if c.steps else "given")


def energy_facts(hours: Estimate, watts: Estimate) -> tuple[Fact, ...]:
    pue = Estimate.exactly(cost.PUE)
    kwh = cost.energy(hours, watts, overhead=Estimate.exactly(1.0), pue=pue)
    return (
        energy_fact(kwh, {"hours": hours, "watts": watts, "pue": pue}),
        electricity_fact(kwh, cost.PRICE_PER_KWH),
        carbon_fact(kwh, None),
    )


@dataclass(frozen=True)
class _Run:
    """A run as flags say it: `preset` where another architecture is asked for."""

    config: TrainConfig
    preset: str | None = None


def ways_to_train(
    config: TrainConfig, free: float, *, presets: Mapping[str, ModelConfig] | None = None, resuming: bool = False
) -> list[tuple[TrainConfig, str]]:
    """The two or three cheapest changes with which a run fits into `free` bytes, as settings and as flags, best first.

    presets: architectures that may take the model's place. resuming: only what a run may change after it was begun. Each step
    reads as many tokens as before, or a few more where they do not divide.
    """
    begun = _Run(config)
    changes = list(_training_changes(config, presets or {}, resuming))
    found = cheapest(begun, changes, lambda run: own_training_memory(run.config).total, free)
    return [(run.config, _flags(config, run)) for run, _ in found]


def _training_changes(c: TrainConfig, presets: Mapping[str, ModelConfig], resuming: bool) -> Iterator[Change[_Run]]:
    """What keeps the result, then what costs time, then what changes the result."""
    if not c.recompute:
        yield 2.5, "recompute", lambda run: _with(run, recompute=True)
    if resuming:
        return
    batch, worse = c.batch_size, 1.5
    while batch > 1:
        batch, worse = batch // 2, worse + 0.5
        yield worse, f"batch_size {batch}", _smaller_batch(batch)
    if c.optimizer_bits == 32:
        yield 3, "optimizer_bits", lambda run: _with(run, optimizer_bits=8)
    if c.ema_decay:
        yield 4, "ema_decay", lambda run: _with(run, ema_decay=0.0)
    length, worse = c.seq_len, 7.0
    while length >= 256 and not c.seq_warmup:
        length, worse = length // 2, worse + 1
        yield worse, f"seq_len {length}", _shorter(length)
    total = count_parameters(c.model).total
    smaller = {
        name: model
        for name, model in presets.items()
        if count_parameters(model).total < total and c.seq_len <= model.max_position_embeddings
    }
    for rank, name in enumerate(sorted(smaller, key=lambda name: -count_parameters(smaller[name]).total)):
        yield 12 + rank, f"preset {name}", _other_model(name, smaller[name])


def _with(run: _Run, **changes: Any) -> _Run:
    return replace(run, config=replace(run.config, **changes))


def _smaller_batch(batch: int) -> Callable[[_Run], _Run]:
    return lambda run: _with(
        run, batch_size=batch, accumulate=-(-run.config.accumulate * run.config.batch_size // batch)
    )


def _shorter(length: int) -> Callable[[_Run], _Run]:
    return lambda run: _with(run, seq_len=length, accumulate=-(-run.config.accumulate * run.config.seq_len // length))


def _other_model(name: str, model: ModelConfig) -> Callable[[_Run], _Run]:
    return lambda run: replace(_with(run, model=model), preset=name)


def _flags(before: TrainConfig, run: _Run) -> str:
    changed = [f"--preset {run.preset}"] if run.preset is not None else []
    for f in fields(TrainConfig):
        value = getattr(run.config, f.name)
        if f.name != "model" and value != getattr(before, f.name):
            changed.append(f"--set {f.name}={str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(changed)


# ---------------------------------------------------------------------------------------------- memory, of both


def memory_section(memory: Memory, free: float | None, title: str) -> Section:
    parts = memory.parts
    fits = "" if free is None else verdict(memory.total, free)
    label = "peak" if free is None else f"of {size(free)} free: {fits}"
    facts = [
        Fact("memory.device_bytes", memory.total, "bytes", label, "sum of the parts", parts, OWN_MEMORY),
        *(Fact(f"memory.{name}", value, "bytes", source=OWN_MEMORY) for name, value in parts.items()),
    ]
    if free is None:
        return Section(title, tuple(facts))
    facts.append(Fact("memory.available", free, "bytes", formula="free when the command began"))
    facts.append(Fact("memory.verdict", fits, formula=RULE, source=RULE_SOURCE))
    return Section(title, tuple(facts), bar=(parts, free))


def _memory_notes(total: float, free: float, ways: Sequence[str]) -> Iterator[str]:
    fits = verdict(total, free)
    if fits == "amber":
        yield f"memory is amber: {amber(total, free)}"
    elif fits == "red":
        yield f"memory is red: without --force it is refused. {offered(ways)}"


def check_fits(config: TrainConfig, free: float, ways: Callable[[], Sequence[str]]) -> str | None:
    """What to say of a run before it begins: nothing, or that little memory is left.

    ways: flags with which it would fit; asked for only where they are needed. Raises `UserError` where it does not fit.
    """
    total = own_training_memory(config).total
    fits = verdict(total, free)
    if fits == "red":
        raise UserError(
            f"the run needs about {size(total)} and {size(free)} of memory are free (train). {offered(ways())}; "
            "--force runs it anyway"
        )
    return f"memory: {amber(total, free)}" if fits == "amber" else None


def amber(total: float, free: float) -> str:
    return f"about {size(total)} of {size(free)} free memory are needed: little is left for other programs"


def offered(ways: Sequence[str]) -> str:
    """What would fit, in a sentence."""
    if not ways:
        return "no change of settings makes it fit: close other programs, or take a smaller model"
    *others, last = ways
    return f"{', or '.join([*others, last])} would fit"
