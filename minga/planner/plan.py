"""A plan: what a model costs on a machine, each number with its doubt and where it comes from.

    p = plan("config.json", "2048xH800", tokens=14.8e12, precision="fp8")
    p.kwh.typical, p.seconds.low, p.document()["train"]["gpu_hours"]

The parts are worked out by `counts` (exact), `layout`, `time`, `memory`, `serving`, `pool` and `cost`; here they are put
together in the order in which people ask: what is it, how long, does it fit, how much, what does it serve.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from functools import partial
from typing import Any

from minga.config import ModelConfig
from minga.config.hardware import HOST_LINK, Device, Machine, of_devices
from minga.config.hardware import machine as machine_named
from minga.errors import UserError
from minga.planner import cost
from minga.planner.architecture import Architecture, architecture_of
from minga.planner.counts import cache_bytes, cache_bytes_per_token, count_parameters, training_flops
from minga.planner.dial import usual_batch
from minga.planner.estimate import Estimate, Fact
from minga.planner.grids import find_grid
from minga.planner.layout import choose_setup, typical_batch
from minga.planner.memory import GREEN, RULE, RULE_SOURCE, Memory, training_memory, verdict, ways_to_fit
from minga.planner.models import read_model
from minga.planner.pool import METHODS, pool_estimate, split_over_link
from minga.planner.prices import purchase, rental
from minga.planner.scaling import Option
from minga.planner.serving import Serving, serve_estimate
from minga.planner.setup import Setup
from minga.planner.time import Coefficients, RunTime, coefficients_of, run_time, step_time
from minga.planner.words import batches, count, link, machine_words, size

HOME = ("consumer", "apple", "cpu")  # kinds of devices that mostly stand in a room of their owner
LONG = 32_768  # tokens of a long text
LEAST_STEPS = 200  # of a run: below, a batch as large as is usual would leave too few updates
SEQ_LEN, OWN_SEQ_LEN = 4096, 1024  # tokens of a sequence, of accelerators and of processors
ACCOUNTING = "Megatron's and ZeRO's accounting (1910.02054), activations after Korthikanti et al. 2022 (2205.05198)"
SERVED = "weights of a copy, and the cache of its sequences"
USER_SPEED = 20.0  # tokens/s; DeepSeek gives its users 20 to 22 (open-infra-index, day 6)
ACCEPTANCE = 0.85  # of the first guess: 85 to 90 % (DeepSeek-V3, 2412.19437, section 5.4.3)
POOL_BATCH = 2**19  # tokens of a peer's step
LATENCY = 0.02  # seconds one way, between cities
# Fields of `Setup` that can be decided by who asks; the others follow.
FIXABLE = (
    "shard",
    "tp",
    "pp",
    "ep",
    "recompute",
    "micro_batch",
    "optimizer",
    "master",
    "lora_rank",
    "stored",
    "mtp",
    "fused_loss",
)
PARALLEL = {"dp": "data", "tp": "tensor", "pp": "pipeline", "ep": "of them expert"}
LIFE_YEARS, LIFE_BUSY = 4, 0.5  # of a card that is bought: an assumption
HOME_PUE = Estimate(1.0, 1.1, 1.3)  # the losses of a power supply, and some cooling


@dataclass(frozen=True)
class Ask:
    """What a plan is asked for, beside model and machine. None: chosen or left out.

    tokens: of training (all else about training is ignored without it). fixed: fields of `Setup` that the user has decided.
    price: USD of a device and hour. watts: what the whole machine draws at the wall, for one that is no row of the table, or that
    was measured. utilization: share of the time that a server is busy. speed: tokens/s that each of its users
    gets at least. acceptance: share of multi-token prediction's guesses that are right.
    """

    tokens: float | None = None
    precision: str | None = None
    seq_len: int | None = None
    batch_tokens: float | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    teacher: Architecture | None = None
    utilization: float = 0.3
    weights: str | None = None
    cache: str = "bf16"
    prompt: int = 2000
    output: int = 500
    speed: float | None = None
    acceptance: float | None = None
    peers: int | None = None
    up: float = 20e6 / 8
    down: float = 100e6 / 8
    price: float | None = None
    watts: Estimate | None = None
    price_per_kwh: float = cost.PRICE_PER_KWH
    pue: float | None = None
    country: str | None = None
    coefficients: Coefficients | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "seq_len", "batch_tokens", "prompt", "output", "speed", "peers", "up", "down"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1e18:
                raise UserError(
                    f"{name.replace('_', ' ')} is {value!r:.30} (plan). it must be above 0, and at most 1e18"
                )
        for name in ("price", "price_per_kwh"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1e6:
                raise UserError(f"{name.replace('_', ' ')} is {value} (plan). it must be 0 or more")
        if unknown := set(self.fixed) - set(FIXABLE):
            raise UserError(f"{sorted(unknown)[0]!r} cannot be fixed (plan). what can: {', '.join(FIXABLE)}")
        if self.pue is not None and not 1 <= self.pue <= 10:
            raise UserError(f"pue is {self.pue} (plan). it is 1 or more: 1 for a machine in a room that is not cooled")
        if self.peers == 1:
            raise UserError("a pool of one has nobody to agree with (--peers). give 2 or more, or leave it out")
        if self.acceptance is not None and not 0 <= self.acceptance <= 1:
            raise UserError(f"acceptance is {self.acceptance} (plan). it is a share, from 0 to 1")
        if not 0 < self.utilization <= 1:
            raise UserError(f"utilization is {self.utilization} (plan). it is a share: above 0 and at most 1")


@dataclass(frozen=True)
class Section:
    title: str
    facts: tuple[Fact, ...]
    lines: tuple[str, ...] = ()  # in words, under the facts
    bar: tuple[Mapping[str, float], float] | None = None  # of memory: bytes by part, and of all there is


@dataclass(frozen=True)
class Plan:
    """`sections` hold every number as a `Fact`; `notes` are what the reader should know before relying on them."""

    title: str
    model: Architecture
    machine: Machine
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()
    setup: Setup | None = None
    memory: Memory | None = None  # of a device in training; without training, in serving
    front: tuple[Option, ...] = ()  # of a model that was chosen: those than which none is both quicker and better
    ask: Ask = Ask()  # what it answers

    @property
    def facts(self) -> tuple[Fact, ...]:
        return tuple(fact for section in self.sections for fact in section.facts)

    def value(self, name: str) -> Any:
        """Of a fact; None where this plan has none of that name."""
        return next((fact.value for fact in self.facts if fact.name == name), None)

    @property
    def flops(self) -> float | None:
        """Of the whole training."""
        value: float | None = self.value("train.flops")
        return value

    @property
    def seconds(self) -> Estimate | None:
        """Of the whole training."""
        days: Estimate | None = self.value("train.days")
        return None if days is None else days * 86400

    @property
    def bytes(self) -> float | None:
        """On the fullest device."""
        return None if self.memory is None else self.memory.total

    @property
    def money(self) -> Estimate | None:
        """USD of the final run."""
        value: Estimate | None = self.value("money.final_run")
        return value

    @property
    def kwh(self) -> Estimate | None:
        value: Estimate | None = self.value("energy_kwh")
        return value

    def document(self) -> dict[str, Any]:
        """For JSON: facts by their names, nested at the dots; an estimate has "low", "typical" and "high". What has no end,
        which JSON cannot say, is null.
        """
        document: dict[str, Any] = {"title": self.title}
        for fact in self.facts:
            *path, last = fact.name.split(".")
            place = document
            for part in path:
                place = place.setdefault(part, {})
            place[last] = fact.value
            if isinstance(fact.value, Estimate):
                place[last] = {end: v if math.isfinite(v) else None for end, v in asdict(fact.value).items()}
        return document | {"notes": list(self.notes)}


def plan(
    model: ModelConfig | Mapping[str, Any] | Architecture | str,
    machine: Machine | str,
    *,
    ask: Ask | None = None,
    **changes: Any,
) -> Plan:
    """What `model` costs on `machine`; `changes` are fields of `Ask`, such as tokens=1e12, or of `FIXABLE`, such as lora_rank=16.

    model: a config, the dictionary of a public config.json, a path to one or to a model, or a preset's name. machine: "8xH100".
    Raises `UserError` for what is impossible, and for a training that fits no set-up of the machine.
    """
    ask = ask or Ask()
    fixed = {name: changes.pop(name) for name in FIXABLE if name in changes}
    known = {f.name for f in fields(Ask)}
    if unknown := set(changes) - known:
        raise UserError(
            f"{sorted(unknown)[0]!r} is nothing to ask for (plan). known: {', '.join(sorted(known))}, {', '.join(FIXABLE)}"
        )
    ask = replace(ask, **{"fixed": {**ask.fixed, **fixed}, **changes})
    name, arch = architecture(model)
    where = machine_named(machine) if isinstance(machine, str) else machine
    title = f"{name} on {machine_words(where)}"
    sections, notes = [_model_section(arch, where, ask)], list(_device_notes(where))
    setup = memory = None
    if ask.tokens is not None:
        setup, memory, parts, said = _training(arch, where, ask)
        sections += parts
        notes += said
    try:
        serving = serve(arch, where, ask, notes)
        sections.append(Section(f"serving, busy {100 * ask.utilization:g} % of the time", serving.facts))
        if memory is None:
            memory = serving.memory
            sections.append(_memory_section(memory, where.device, "serving", SERVED, needed=serving.needed))
    except UserError as error:
        if ask.speed is not None:  # asked for, and not to be had
            raise
        notes.append(str(error))
    if ask.peers is not None:
        sections.append(_pool_section(arch, where, ask))
    return Plan(title, arch, where, tuple(sections), tuple(dict.fromkeys(notes)), setup, memory, ask=ask)


def architecture(
    model: ModelConfig | Mapping[str, Any] | Architecture | str, *, flag: str = "--config"
) -> tuple[str, Architecture]:
    """A short name, and the model. flag: who asked, for an error."""
    if isinstance(model, str):
        return read_model(model, flag=flag)
    arch = architecture_of(model)
    return arch.family, arch


# ---------------------------------------------------------------------------------------------- the model


def _model_section(a: Architecture, machine: Machine, ask: Ask) -> Section:
    counts, seq_len = count_parameters(a), _seq_len(ask, machine)
    inputs = {"layers": a.num_layers, "hidden_size": a.hidden_size, "vocab_size": a.vocab_size, "family": a.family}
    parts = {f.name: getattr(counts, f.name) for f in fields(counts) if getattr(counts, f.name)}
    source = "exact: sum over the matrices of the config"
    mtp = bool(a.mtp) and ask.fixed.get("mtp", True)
    context = min(a.max_positions or LONG, LONG)
    lora = ask.fixed.get("lora_rank") or 0
    flops, square = (
        training_flops(a, seq_len, causal=causal, mtp=mtp, lora=lora, teacher=ask.teacher) for causal in (True, False)
    )
    what = "forward 2 x active matrices + attention over a causal sequence; backward twice that"
    if lora:
        what = "forward, and backward through frozen weights: 2 x forward + the low-rank pairs"
    if ask.teacher is not None:
        what += "; + the teacher's forward"
    facts = [
        Fact("params.total", counts.total, "", "parameters", "embedding + blocks + head", {**inputs, **parts}, source),
        Fact("params.active", counts.active, "", "active for a token", "total - experts not chosen", parts, source),
    ]
    if counts.mtp:
        facts.append(Fact("params.mtp", counts.mtp, "", "multi-token prediction, besides", "", {}, source))
    facts += [
        Fact(
            "flops_per_token",
            flops,
            "FLOP",
            f"training a token of {seq_len:,}",
            what,
            {
                "seq_len": seq_len,
                "mtp": mtp,
                "six_n": 6 * counts.active,
                "full_square": square,
            },
            source,
        ),
        Fact(
            "kv_bytes_per_token",
            cache_bytes_per_token(a, number=ask.cache),
            "bytes",
            f"cache of a token, {ask.cache}",
            "numbers a token leaves in each layer x bytes",
            {"numbers": cache_bytes_per_token(a, number="fp8"), "cache": ask.cache},
            source,
        ),
        Fact(
            "kv_bytes_at_context",
            cache_bytes(a, context, number=ask.cache),
            "bytes",
            f"cache of {context:,} tokens",
            "that of a token x tokens, but for windows, compressed entries and linear attention, which keep less",
            {"context": context, "cache": ask.cache},
            source,
        ),
    ]
    return Section("model", tuple(facts))


# ---------------------------------------------------------------------------------------------- training


def lay_out(a: Architecture, machine: Machine, ask: Ask) -> Setup:
    """The fastest set-up that fits into memory with room to spare; else that just fits. Raises `UserError` if there is none.

    Without other wishes a processor trains as `minga train` does: Muon, no copy of the weights, small batches.
    """
    device, at_hand = machine.device, machine.device.kind == "cpu"
    batch, fixed = ask.batch_tokens, dict(ask.fixed)
    tokens, seq_len = ask.tokens or 20.0 * count_parameters(a).active, _seq_len(ask, machine)
    if batch is None:
        batch = usual_batch(tokens) if at_hand else typical_batch(a, tokens)
        batch = min(batch, max(seq_len, tokens / LEAST_STEPS))
    if at_hand:
        fixed = {"optimizer": "muon", "fused_loss": True, "master": False} | fixed
    precision = ask.precision or ("int8" if at_hand and "int8" in device.flops else _precision(device))

    def chosen(*verdicts: str) -> Setup:
        return choose_setup(
            a,
            machine,
            precision=precision,
            seq_len=seq_len,
            batch_tokens=batch,
            fits=lambda setup: verdict(_memory(a, setup, ask).total, device.memory) in verdicts,
            coefficients=ask.coefficients,
            **fixed,
        )

    try:
        return chosen("green")
    except UserError:
        return chosen("green", "amber")


def _memory(a: Architecture, setup: Setup, ask: Ask) -> Memory:
    """With the weights of a teacher, in 16 bits, cut and spread as the student's are."""
    memory = training_memory(a, setup)
    if ask.teacher is None:
        return memory
    ranks = setup.tp * setup.pp * (setup.dp if setup.shard == 3 else setup.ep)
    return replace(memory, weights=memory.weights + 2 * count_parameters(ask.teacher).total / ranks)


def what_would(a: Architecture, machine: Machine, ask: Ask) -> list[str]:
    """Up to three changes with which a training that does not fit does, each in words; what changes least comes first."""
    per_node = None if machine.nodes == 1 else machine.per_node
    devices = [of_devices(machine.device, machine.count * 2**n, per_node) for n in range(1, 15)]
    changes: list[tuple[str, Machine, dict[str, Any]]] = [
        ("8-bit optimizer states (--optimizer adamw8bit)", machine, {"optimizer": "adamw8bit"}),
        ("LoRA (--lora 16)", machine, {"lora_rank": 16}),
        ("LoRA over int4 weights (--lora 16 --stored int4)", machine, {"lora_rank": 16, "stored": "int4"}),
        *((f"{each.count:,} devices", each, {}) for each in devices if each.nodes == 1 or each.network),
    ]
    found: list[str] = []
    for words, where, change in changes:
        if len(found) == 3 or (found and found[-1].endswith("devices")):
            break
        if change.keys() & ask.fixed.keys():
            continue
        try:
            lay_out(a, where, replace(ask, fixed={**ask.fixed, **change}))
        except UserError:
            continue
        found.append(words)
    return found


def _training(a: Architecture, machine: Machine, ask: Ask) -> tuple[Setup, Memory, list[Section], list[str]]:
    assert ask.tokens is not None
    device, notes = machine.device, []
    try:
        setup = lay_out(a, machine, ask)
    except UserError as error:
        ways = what_would(a, machine, ask)
        raise UserError(
            f"{str(error).split('). ')[0]}). what would: {'; '.join(ways)}" if ways else str(error)
        ) from None
    if setup.precision == "fp8" and "fp8" not in device.flops:
        notes.append(f"{device.name} has no fp8 units: products are computed in bf16")
    memory = _memory(a, setup, ask)
    run = run_time(a, setup, machine, ask.tokens, coefficients=ask.coefficients)
    flops = partial(training_flops, a, setup.seq_len, mtp=bool(a.mtp) and setup.mtp, lora=setup.lora_rank or 0)
    per_token = flops(teacher=ask.teacher)
    if ask.teacher is not None:  # as if its products took as long as the student's
        run = run.slower(per_token / flops())
    training = Section("training", tuple(_training_facts(a, machine, ask, setup, run, per_token)))
    fits = verdict(memory.total, device.memory)
    if fits != "green":
        better = "; or ".join(words for _, words in ways_to_fit(a, setup, GREEN * device.memory))
        notes.append(
            f"memory is {fits}: it fits if the estimate is exact. {better and f'to be sure: {better}'}".strip()
        )
    sections = [training, _memory_section(memory, device, "training", ACCOUNTING)]
    sections.append(Section("money and energy", tuple(_money_facts(machine, ask, run, notes))))
    return setup, memory, sections, notes


def _memory_section(memory: Memory, device: Device, doing: str, source: str, *, needed: float | None = None) -> Section:
    """needed: what the verdict is on, where a part of the memory is filled by choice."""
    parts, fits = memory.parts, verdict(memory.total if needed is None else needed, device.memory)
    rule = RULE if needed is None else f"{RULE}, by weights and the cache of one sequence"
    facts = (
        Fact(
            "memory.device_bytes",
            memory.total,
            "bytes",
            f"of {size(device.memory)}: {fits}",
            f"{' + '.join(parts)}, on the fullest device",
            parts,
            source,
        ),
        *(Fact(f"memory.{name}", value, "bytes", source="memory.device_bytes") for name, value in parts.items()),
        Fact("memory.available", device.memory, "bytes", source=device.sources.get("memory", "")),
        Fact("memory.verdict", fits, formula=rule, source=RULE_SOURCE),
    )
    return Section(f"memory of a device in {doing}", facts, bar=(parts, device.memory))


def _training_facts(
    a: Architecture, machine: Machine, ask: Ask, setup: Setup, run: RunTime, per_token: float
) -> Iterator[Fact]:
    assert ask.tokens is not None
    step, device = run.step, machine.device
    fitted = f"roofline; coefficients: {(ask.coefficients or coefficients_of(device)).source}"
    yield Fact("train.tokens", ask.tokens, "", "tokens", "given")
    yield Fact(
        "train.setup", _setup_words(setup), "", "set-up", "least predicted time of those that fit", asdict(setup)
    )
    yield Fact(
        "train.flops",
        per_token * ask.tokens,
        "FLOP",
        "operations",
        "operations of a token x tokens, nothing computed twice",
        {"flops_per_token": per_token, "tokens": ask.tokens},
        "exact",
    )
    yield Fact(
        "train.step_seconds",
        step.total,
        "s",
        f"a step of {count(step.tokens)} tokens",
        "sum of each part's ideal time x its coefficient",
        {**step.parts, "tokens": step.tokens},
        fitted,
    )
    yield Fact(
        "train.tokens_per_second",
        step.tokens_per_second,
        "tokens/s",
        "speed",
        "tokens of a step / its seconds",
        {"step_seconds": step.total, "tokens": step.tokens},
        fitted,
    )
    rate = step.tokens_per_second * (per_token / machine.count)
    peak = device.rate("float32" if setup.precision == "float32" else "bf16")
    yield Fact(
        "train.mfu",
        rate / peak,
        "share",
        "of the bf16 peak (MFU)" if setup.precision != "float32" else "of the float32 peak (MFU)",
        "operations a second / the data sheet's dense rate; attention counted as causal",
        {"flops_per_second": rate, "peak": peak},
        f"peak: {device.sources.get('flops', 'measured')}",
    )
    yield Fact(
        "train.gpu_hours",
        run.gpu_hours,
        "",
        "device-hours",
        "a step's seconds x steps x devices; low: the fastest stacks, high: what the dearest published runs took in all",
        {"step_seconds": step.total, "steps": run.steps, "devices": setup.devices},
        fitted,
    )
    if run.billed is not None:
        yield Fact(
            "train.billed_hours",
            run.billed,
            "",
            "... as most runs are billed",
            "device-hours x what published runs took beyond: restarts, evaluation, checkpoints, a less tuned stack",
            {"gpu_hours": run.gpu_hours},
            "published runs: benchmarks/published/runs.csv, docs/plan.md",
        )
    yield Fact(
        "train.days",
        run.days,
        "days",
        "time",
        "device-hours / devices / 24",
        {"device_hours": run.gpu_hours, "devices": setup.devices},
        "train.gpu_hours",
    )


def _money_facts(machine: Machine, ask: Ask, run: RunTime, notes: list[str]) -> Iterator[Fact]:
    device, hours = machine.device, run.gpu_hours
    at_home = device.kind in HOME
    pue = Estimate.exactly(ask.pue) if ask.pue is not None else HOME_PUE if at_home else cost.DATA_CENTRE_PUE
    kwh = None
    if ask.watts is not None:
        kwh = cost.energy(hours, ask.watts / machine.count, overhead=Estimate.exactly(1.0), pue=pue)
        yield energy_fact(kwh, {"hours": hours / machine.count, "watts": ask.watts, "pue": pue})
    elif device.watts is not None:
        watts, node = cost.training_watts(device.watts), cost.NODE_OVERHEAD
        kwh = cost.energy(hours, watts, overhead=node, pue=pue)
        yield Fact(
            "energy_kwh",
            kwh,
            "kWh",
            "energy",
            "device-hours x power of a device x rest of the node x PUE",
            {"device_hours": hours, "watts": watts, "node": node, "pue": pue},
            "OLMo 3 (2605.01158) and BLOOM (2211.02001) for power; PUE: Uptime Institute 2024",
        )
    if kwh is not None:
        yield carbon_fact(kwh, ask.country)
    price, said = device_price(device, ask, notes)
    if price is not None:
        final = cost.rent(hours, price)
        yield Fact(
            "money.final_run",
            final,
            "USD",
            "rent of the final run",
            "device-hours x price",
            {"device_hours": hours, "price_per_hour": price},
            said,
        )
        if run.billed is not None:
            yield Fact(
                "money.as_billed",
                cost.rent(run.billed, price),
                "USD",
                "... as most runs are billed",
                "billed device-hours x price",
                {"billed_hours": run.billed, "price_per_hour": price},
                said,
            )
        yield Fact(
            "money.with_development",
            cost.with_development(final),
            "USD",
            "with experiments and failures",
            "final run x 2 to 5.6",
            {"final_run": final, "development": cost.DEVELOPMENT},
            "OLMo 2 (2503.05804): half of all; OLMo 3 (2605.01158): 82 % was not the final runs",
        )
    if kwh is not None:
        yield electricity_fact(kwh, ask.price_per_kwh, "" if price is None else ", if the machine is one's own")
        if (bought := purchase(device)) is not None:
            an_hour = bought.per_hour(years=LIFE_YEARS, busy=LIFE_BUSY)
            yield Fact(
                "money.owned",
                kwh * ask.price_per_kwh + hours * an_hour,
                "USD",
                f"... and its price, over {LIFE_YEARS} years, busy {100 * LIFE_BUSY:g} % of them",
                "electricity + device-hours x price of a device / hours of its life in which it works",
                {"price": bought.value, "an_hour": an_hour, "device_hours": hours},
                f"as of {bought.as_of:%Y-%m-%d}: {'; '.join(bought.sources)}",
            )
    yield Fact("money.currency", "USD")


def energy_fact(kwh: Estimate, inputs: Mapping[str, Any]) -> Fact:
    """Of a machine whose draw at the wall is known as a whole."""
    source = "given, or estimated from its chips (minga/planner/cost.py)"
    return Fact("energy_kwh", kwh, "kWh", "energy", "hours x what the machine draws at the wall x PUE", inputs, source)


def carbon_fact(kwh: Estimate, country: str | None) -> Fact:
    where = find_grid(country)
    return Fact(
        "carbon_kg",
        cost.carbon(kwh, where.grams),
        "kg",
        f"CO2 at {where.grams:g} g/kWh ({where.name})",
        "kWh x grams per kWh; making the machines is not in it",
        {"kwh": kwh, "grams_per_kwh": where.grams, "year": where.year},
        where.source,
    )


def electricity_fact(kwh: Estimate, price_per_kwh: float, condition: str = "") -> Fact:
    """condition: under which it is paid, in words behind the label."""
    is_mean = price_per_kwh == cost.PRICE_PER_KWH
    return Fact(
        "money.electricity",
        kwh * price_per_kwh,
        "USD",
        f"electricity at {price_per_kwh:g} a kWh{condition}",
        "kWh x price of a kWh",
        {"kwh": kwh, "price_per_kwh": price_per_kwh},
        "world mean of 2024 (globalpetrolprices.com)" if is_mean else "given, or that of the country (prices.json)",
    )


def device_price(device: Device, ask: Ask, notes: list[str]) -> tuple[Estimate | None, str]:
    """USD of a device-hour, and who says so."""
    if ask.price is not None:
        return Estimate.exactly(ask.price), "given"
    found = rental(device)
    if found is None:
        return None, ""
    if found.is_old(date.today()):
        notes.append(
            f"the price of {device.name} is of {found.as_of:%Y-%m}, older than a year: give --price, or --refresh-prices"
        )
    return found.value, f"as of {found.as_of:%Y-%m-%d}: {'; '.join(found.sources)}"


# ---------------------------------------------------------------------------------------------- serving


def serving_options(a: Architecture, machine: Machine, ask: Ask, notes: list[str]) -> dict[str, Any]:
    """What `serve_estimate` is asked, but for the users' speed. notes: what is to be said of the price goes there."""
    device = machine.device
    guesses = ask.acceptance if ask.acceptance is not None else ACCEPTANCE if a.mtp else None
    return {
        "utilization": ask.utilization,
        "prompt_tokens": ask.prompt,
        "output_tokens": ask.output,
        "weights": ask.weights or ("fp8" if "fp8" in device.flops else "bf16" if "bf16" in device.flops else "int8"),
        "cache": ask.cache,
        "acceptance": guesses or None,
        "price": device_price(device, ask, notes)[0],
    }


def serve(a: Architecture, machine: Machine, ask: Ask, notes: list[str]) -> Serving:
    """What the machine serves: to users who each get `ask.speed`, without a wish `USER_SPEED` where the machine can.

    Raises `UserError` for what does not fit.
    """
    options = serving_options(a, machine, ask, notes)
    try:
        return serve_estimate(a, machine, target=ask.speed or USER_SPEED, **options)
    except UserError:
        if ask.speed is not None:
            raise
        return serve_estimate(a, machine, **options)


# ---------------------------------------------------------------------------------------------- a pool


def _pool_section(a: Architecture, machine: Machine, ask: Ask) -> Section:
    """The machine is a peer; each computes a step of half a million tokens of its own."""
    assert ask.peers is not None
    setup = lay_out(a, machine, replace(ask, batch_tokens=ask.batch_tokens or POOL_BATCH))
    step = step_time(a, setup, machine, coefficients=ask.coefficients)
    facts = [
        Fact("pool.peers", ask.peers, "", f"peers, each {machine_words(machine)}", "given"),
        Fact(
            "pool.step_seconds",
            step.total,
            "s",
            f"a step of {count(step.tokens)} tokens",
            "as in training",
            asdict(setup),
        ),
    ]
    for name, method in METHODS.items():
        found = pool_estimate(
            a, peers=ask.peers, step_seconds=step.total.typical, up=ask.up, down=ask.down, method=method, mtp=setup.mtp
        )
        words = f"{name}, every {method.every} steps" if method.every > 1 else f"{name}, every step"
        inputs = {"H": method.every, "bytes_a_number": method.number, "up": ask.up, "down": ask.down}
        waits = "waiting / (waiting + computing)"
        facts += [
            Fact(f"pool.{name}.bytes_up", found.bytes_up, "bytes", "", "parameters x bytes a number", inputs, method.source),
            Fact(f"pool.{name}.step_up", found.step_up, "bytes", f"{words}: bytes a step", "bytes / H", inputs, method.source),
            Fact(f"pool.{name}.needed_up", found.needed_up, "bytes/s", "  uplink that loses 5 %", "", inputs, method.source),
            Fact(f"pool.{name}.lost", found.lost, "share", "  lost on these links", waits, inputs, method.source),
        ]  # fmt: skip
    lines = []
    rate = step.tokens_per_second.typical * training_flops(a, setup.seq_len, mtp=setup.mtp) / machine.count
    for way in ("expert", "tensor", "pipeline") if count_parameters(a).routed_experts else ("tensor", "pipeline"):
        lines.append(split_over_link(a, way, link=ask.up, latency=LATENCY, rate=rate).sentence)
    return Section(
        f"a pool of {ask.peers:,} peers, links of {link(ask.up)} up, {link(ask.down)} down",
        tuple(facts),
        tuple(lines),
    )


# ---------------------------------------------------------------------------------------------- words


def _seq_len(ask: Ask, machine: Machine) -> int:
    return ask.seq_len or (OWN_SEQ_LEN if machine.device.kind == "cpu" else SEQ_LEN)


def _precision(device: Device) -> str:
    return "bf16" if {"bf16", "fp16"} & device.flops.keys() else "float32"


def _device_notes(machine: Machine) -> Iterator[str]:
    if machine.count > 1 and machine.device.link is None:
        yield (
            f"how fast {machine.device.name} are linked is not known: {size(HOST_LINK)}/s is assumed, through the host's memory"
        )
    if machine.device.note:
        yield f"{machine.device.name}: {machine.device.note}"


def _setup_words(s: Setup) -> str:
    ways = [f"{getattr(s, name)} {what}" for name, what in PARALLEL.items() if getattr(s, name) > 1]
    sharded = ("", ", optimizer states sharded", ", optimizer and gradients sharded", ", all sharded (FSDP)")[
        s.shard if s.dp > 1 else 0
    ]
    lora = "" if s.lora_rank is None else f", LoRA of rank {s.lora_rank} on {s.stored}"
    again = "" if s.recompute == "none" else f", {s.recompute} recomputation"
    steps = batches(s.accumulate, s.micro_batch, s.seq_len)
    interleaved = "" if s.chunks == 1 else f", {s.chunks} virtual stages a device"
    return (
        f"{s.precision}, {s.optimizer}{lora}, {' x '.join(ways) or 'one device'}{interleaved}{sharded}{again}, {steps}"
    )
