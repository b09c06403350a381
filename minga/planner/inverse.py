"""The questions the other way round: not what a model costs, but which model, or which machine, for what one has.

best_plan(machine, Ask(), hours=1.0)              # the plan of the best model for an hour
smallest(read_model("v3")[1], Ask(tokens=1e12), days=30)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from minga.config import ModelConfig
from minga.config.hardware import Device, Machine, devices, of_devices
from minga.errors import UserError
from minga.planner.architecture import Architecture, architecture_of
from minga.planner.counts import count_parameters, matmul_parameters, training_flops
from minga.planner.dial import TOKENS_PER_PARAMETER
from minga.planner.estimate import Estimate, Fact
from minga.planner.memory import serving_memory
from minga.planner.plan import SEQ_LEN, Ask, Plan, Section, device_price, lay_out, plan, serve
from minga.planner.scaling import (
    DEEPSEEK,
    Option,
    best_for_compute,
    best_within,
    expansion,
    facts_of,
    for_loss,
    law_for,
    model_for,
    models,
)
from minga.planner.time import run_time
from minga.planner.words import count, duration, machine_words, size

VOCABULARIES = ((1e17, 4096), (1e20, 32768), (math.inf, 129280))  # FLOPs of a run below which so many tokens are enough
LINES = 8  # of the models that were near
SMALLEST_COMPUTE = 2.4e17  # 6 x 79 M parameters x 0.5 B tokens: where the runs of the law with experts begin
NEAR = 12.0  # how far from the law's best size a model may be and still be tried, as a factor
REACH = 0.5  # of its peak that no machine goes beyond in training: where a search may begin
MOST_DEVICES = 2**17


def best_plan(
    machine: Machine,
    ask: Ask,
    *,
    hours: float | None = None,
    budget: float | None = None,
    memory: float | None = None,
    loss: float | None = None,
) -> Plan:
    """The plan of the model that ends lowest within so many hours, so much money (USD of rent), so many bytes when it serves;
    or of the cheapest that reaches a loss. A section says why, and names the others that were near.

    Raises `UserError` for what contradicts itself, and where nothing fits.
    """
    for name, value in (("hours", hours), ("budget", budget), ("memory", memory), ("loss", loss)):
        if value is not None and not 0 < value < 1e18:
            raise UserError(f"{name} is {value} (--{name}). it must be a number above 0 and below 1e18")
    if loss is not None:
        if hours is not None or budget is not None or memory is not None:
            raise UserError("a loss decides size and tokens (--loss). ask for it alone, and see what it costs")
        return _for_loss(machine, ask, loss)
    seconds = math.inf if hours is None else 3600 * hours
    if budget is not None:
        price, _ = device_price(machine.device, ask, [])
        if price is None:
            raise UserError(
                f"what {machine.device.name} costs an hour is not known (--budget). give --price, or --hours instead"
            )
        if not price.typical:
            raise UserError("a machine that costs nothing is no matter of money (--budget). give --hours instead")
        seconds = min(seconds, 3600 * budget / (price.typical * machine.count))
    if math.isinf(seconds):
        return _largest(machine, ask, memory or 0.0)
    compute = machine.count * machine.device.rate("bf16") * REACH * seconds
    failures: list[UserError] = []
    found = None
    for candidates in (_near(compute), models(vocab_size=_vocabulary(compute))):  # the near ones may all be too large
        try:
            found = best_within(
                seconds_of=_seconds_of(machine, ask, failures),
                limit_seconds=seconds,
                memory_of=None if memory is None else lambda model: _served(model, ask),
                limit_bytes=memory,
                candidates=candidates,
            )
            break
        except UserError as error:
            failures.append(error)
    if found is None:
        raise failures[0]
    small = compute < SMALLEST_COMPUTE
    best = _by_ratio(found.options) if small else found.best
    made = plan(best.model, machine, ask=replace(ask, tokens=best.tokens))
    for _ in range(3):  # the search laid each model out for one guess at its tokens
        assert made.seconds is not None
        if abs(made.seconds.typical / seconds - 1) < 0.005:
            break
        best = replace(best, tokens=best.tokens * seconds / made.seconds.typical)
        made = plan(best.model, machine, ask=replace(ask, tokens=best.tokens))
    if small:
        facts = tuple(_ratio_facts(best))
    else:
        experts = expansion(best.model)
        facts = facts_of(replace(best, loss=law_for(experts).loss(best.parameters, best.tokens, experts=experts)))
    return _with(
        made, f"best model for {duration(seconds)} of the machine", best.model, facts, () if small else found.front
    )


def _for_loss(machine: Machine, ask: Ask, loss: float) -> Plan:
    needed = for_loss(loss, experts=expansion(model_for(1e9)))
    grid = [count_parameters(each).active for each in models()]
    if not grid[0] <= needed.parameters <= 1.1 * grid[-1]:
        raise UserError(
            f"loss {loss:g} takes {count(needed.parameters)} active parameters (--loss). the planner draws models of "
            f"{count(grid[0])} to {count(grid[-1])}: ask for one that these reach"
        )
    model = model_for(needed.parameters, vocab_size=_vocabulary(6 * needed.parameters * needed.tokens))
    made = plan(model, machine, ask=replace(ask, tokens=needed.tokens))
    return _with(made, f"cheapest model that reaches {loss:g} nats a token", model, needed.facts)


def _largest(machine: Machine, ask: Ask, limit: float) -> Plan:
    """Nothing but memory is limited: the largest model that serves in it, with the tokens that are best for its size."""
    grid = models(vocab_size=VOCABULARIES[1][1])
    fitting = [model for model in grid if _served(model, ask) <= limit]
    if not fitting:
        smallest = min(_served(model, ask) for model in grid)
        raise UserError(f"no model of ours serves in {size(limit)} (--memory). the smallest takes {size(smallest)}")
    model = max(fitting, key=lambda model: count_parameters(model).total)
    experts, active = expansion(model), count_parameters(model).active
    law = law_for(experts)
    best = law.best_tokens(active, experts=experts)
    fact = Fact(
        "scaling.tokens", best, "", "tokens that are best for its size", law.form, {"active": active}, law.cite()
    )
    return _with(plan(model, machine, ask=ask), f"largest model that serves in {size(limit)}", model, (fact,))


def _seconds_of(machine: Machine, ask: Ask, failures: list[UserError]) -> Callable[[ModelConfig, float], Estimate]:
    """Of a training: each model is laid out once, for after that time goes with tokens. What cannot be is told in `failures`."""
    never = Estimate(math.inf, math.inf, math.inf)
    rates: dict[int, Estimate] = {}

    def seconds(model: ModelConfig, tokens: float) -> Estimate:
        if id(model) not in rates:
            try:
                setup = lay_out(architecture_of(model), machine, replace(ask, tokens=tokens))
                rates[id(model)] = run_time(model, setup, machine, tokens, coefficients=ask.coefficients).days * (
                    86400 / tokens
                )
            except UserError as error:
                failures.append(error)
                rates[id(model)] = never  # it does not fit
        return rates[id(model)] * tokens

    return seconds


def _by_ratio(options: tuple[Option, ...]) -> Option:
    return min(
        options,
        key=lambda option: abs(math.log(option.tokens / matmul_parameters(option.model) / TOKENS_PER_PARAMETER)),
    )


def _ratio_facts(best: Option) -> Iterator[Fact]:
    inputs = {"tokens": best.tokens, "multiplied_parameters": matmul_parameters(best.model)}
    source = "measured at this scale (docs/log.md): the laws were fitted to runs a thousand times as long"
    rule = f"nearest to {TOKENS_PER_PARAMETER:g} tokens a multiplied parameter"
    yield Fact("scaling.parameters", best.parameters, "", "active parameters", rule, inputs, source)
    yield Fact("scaling.tokens", best.tokens, "", "tokens", "what there is time for", inputs, source)


def _served(model: ModelConfig, ask: Ask) -> float:
    """Bytes of a copy that answers one request."""
    return serving_memory(model, weights=ask.weights or "bf16", cache=ask.cache, context=ask.prompt + ask.output).total


def _near(compute: float) -> list[ModelConfig]:
    """The models that a law may find best for so many FLOPs or for less."""
    grid = models(vocab_size=_vocabulary(compute))
    if compute < SMALLEST_COMPUTE:
        wanted = math.sqrt(compute / 6 / TOKENS_PER_PARAMETER)
    else:
        wanted = best_for_compute(compute, experts=expansion(grid[-1])).parameters
    near = [model for model in grid if wanted / NEAR <= count_parameters(model).active <= wanted * NEAR / 4]
    return near or [min(grid, key=lambda model: abs(math.log(count_parameters(model).active / wanted)))]


def _vocabulary(compute: float) -> int:
    return next(entries for most, entries in VOCABULARIES if compute < most)


def _with(made: Plan, title: str, model: ModelConfig, facts: tuple[Fact, ...], front: tuple[Option, ...] = ()) -> Plan:
    """The plan behind a section that says which model it is of, and why."""
    names = ("hidden_size", "num_hidden_layers", "n_routed_experts", "num_experts_per_tok", "vocab_size")
    words = (
        f"{model.num_hidden_layers} layers of {model.hidden_size}, {model.n_routed_experts} experts, "
        f"{model.num_experts_per_tok} for a token, {model.vocab_size:,} tokens of vocabulary"
    )
    shape = Fact(
        "best.model", words, "", "shape", "between DeepSeek's published models", {n: getattr(model, n) for n in names}
    )
    drawing = [
        f"{count(option.parameters):>7} active, {count(option.tokens):>7} tokens, {duration(option.seconds.typical):>9}: "
        f"loss {option.loss.typical:.3f}"
        for option in front[-LINES:]
        if option.seconds is not None
    ]
    lead = ["also worth it, quickest first:"] if drawing else []
    section = Section(title, (shape, *facts, *_settings(made)), (*lead, *drawing))
    name = f"{count(count_parameters(model).active)} active on {machine_words(made.machine)}"
    return replace(made, title=name, sections=(section, *made.sections), front=front)


def _settings(made: Plan) -> Iterator[Fact]:
    """Learning rate and batch that a study found for so much compute, within its reach."""
    if made.flops is not None and DEEPSEEK.beyond(flops=made.flops) < 1e3:
        found = best_for_compute(made.flops, law=DEEPSEEK).facts
        yield from (fact for fact in found if fact.name in ("scaling.learning_rate", "scaling.batch_tokens"))


# ---------------------------------------------------------------------------------------------- machines


@dataclass(frozen=True)
class Fitting:
    """A machine that can. `days` and `money` are of the training, None where nothing is trained."""

    machine: Machine
    price: Estimate  # USD of its hour
    days: Estimate | None
    money: Estimate | None


def smallest(model: Architecture, ask: Ask, *, days: float) -> list[Fitting]:
    """For each device whose rent is known, the fewest of them that train `ask.tokens` in so many days, typically; without
    tokens, that serve (with `ask.speed` for each user, if it is given). The cheapest first.
    """
    if not 0 < days < 1e6:
        raise UserError(f"days is {days} (--days). it must be a positive number")
    found = [fitting for device in devices().values() for fitting in _fewest(model, device, ask, days)]
    if not found:
        raise UserError(
            "no machine of the table can (--smallest). give it more --days, fewer tokens, or a smaller model"
        )
    return sorted(found, key=lambda each: (each.money or each.price).typical)


def _fewest(model: Architecture, device: Device, ask: Ask, days: float) -> Iterator[Fitting]:
    price, _ = device_price(device, ask, [])
    if price is None or not device.flops:
        return
    number = 1
    if ask.tokens is not None:  # what no set-up can beat says where to begin
        mtp, lora = ask.fixed.get("mtp", True), ask.fixed.get("lora_rank") or 0
        work = training_flops(model, ask.seq_len or SEQ_LEN, mtp=mtp, lora=lora) * ask.tokens
        number = 2 ** math.ceil(
            math.log2(max(1.0, work / (REACH * device.rate(ask.precision or "bf16") * days * 86400)))
        )
    while number <= MOST_DEVICES:
        machine = of_devices(device, number)
        try:
            if ask.tokens is None:
                serve(model, machine, ask, [])
                yield Fitting(machine, price * number, None, None)
                return
            setup = lay_out(model, machine, ask)
            run = run_time(model, setup, machine, ask.tokens, coefficients=ask.coefficients)
            if run.days.typical <= days:
                yield Fitting(machine, price * number, run.days, run.gpu_hours * price)
                return
        except UserError:  # too few of them to hold it, or no network between them
            if machine.nodes > 1 and machine.network is None:
                return
        number *= 2
