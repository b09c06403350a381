"""The plan of that very server, before a weight is read: what `minga serve` takes of this machine, and what makes it fit.

    made = serving_plan([Served("mine", config, file_bytes)], Serving(quant="int8"), machine, free=..., ...)
    for changed, flags in ways_to_serve(models, how, free): ...      # flags: "--quant int8"

The engine opens what memory does not hold, weights on the disk, and makes requests wait for the cache: only what it cannot do
without counts against a server (`needed_to_serve`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from minga.config import ModelConfig
from minga.config.hardware import Machine
from minga.errors import UserError
from minga.planner.architecture import architecture_of
from minga.planner.counts import cache_bytes_per_token, count_parameters
from minga.planner.estimate import Estimate, Fact
from minga.planner.memory import Change, Memory, cheapest, verdict
from minga.planner.own_memory import (
    CACHE_SHARE,
    SERVE_PROCESS,
    WEIGHTS_SHARE,
    own_serving_memory,
    own_serving_weights,
)
from minga.planner.own_plan import OWN_MEMORY, amber, memory_section, offered
from minga.planner.plan import Ask, Plan, Section
from minga.planner.serving import SOURCE, serve_estimate
from minga.planner.table import table
from minga.planner.words import machine_words, size

PROMPT, OUTPUT = Ask.prompt, Ask.output  # tokens of a request, as `minga plan` counts
FLOAT_BYTES = 3.9  # of a number, from which a file of weights holds float32


@dataclass(frozen=True)
class Served:
    """A model of a server, and the bytes of its file of weights."""

    name: str
    model: ModelConfig
    file_bytes: float

    @property
    def number_bytes(self) -> float:
        return self.file_bytes / count_parameters(self.model).total_with_mtp

    @property
    def stored(self) -> float | None:
        """Bytes of the file where it is not float32."""
        return None if self.number_bytes >= FLOAT_BYTES else self.file_bytes


@dataclass(frozen=True)
class Serving:
    """How: the flags of `minga serve` that memory depends on. prefix_memory: bytes, None: the engine's default."""

    quant: str | None = None
    cache: str | None = None
    max_running: int = 64
    prefix_memory: float | None = None
    replicas: int = 1

    def __post_init__(self) -> None:
        for flag, value in (("--max-running", self.max_running), ("--replicas", self.replicas)):
            if value < 1:
                raise UserError(f"{flag} is {value} (serve). it must be 1 or more")

    def number(self, served: Served) -> str:
        """Of the cache's rows, as the engine chooses them."""
        return self.cache or ("float32" if self.quant is None and served.stored is None else "float16")


@dataclass(frozen=True)
class Load:
    """What a model takes of memory under the most requests that it answers at once, each as long as its context allows.

    memory: without pages of a file that are read once, which the system takes back where it needs them; resident: with them, as
    the system counts. held: what it cannot take back, with a cache for one usual request. on_disk: the weights are left there.
    """

    memory: Memory
    resident: float
    held: float
    on_disk: bool
    running: int  # requests of a whole context side by side


def serving_loads(models: Sequence[Served], how: Serving, free: float) -> list[Load]:
    """One after the other, as a server opens them in `free` bytes (`minga.engine.llm`)."""
    loads, left = [], free - SERVE_PROCESS
    for served in models:
        c, context = served.model, served.model.max_position_embeddings
        opening, weights = own_serving_weights(c, quant=how.quant, file_bytes=served.stored)
        copied = weights if how.quant is None and served.stored is None else 0.0  # experts, out of the file
        on_disk = how.quant is None and served.file_bytes >= WEIGHTS_SHARE * left
        if on_disk:
            opening = weights = 0.0
        row = cache_bytes_per_token(c, number=how.number(served), mtp=True)
        one = context * row
        pool = max(one, CACHE_SHARE * max(0.0, left - weights))
        running = max(1, min(how.max_running, int(pool // one)))
        options: dict[str, Any] = {"quant": how.quant, "cache": how.number(served), "file_bytes": served.stored}
        options |= {"max_running": how.max_running, "prefix_memory": how.prefix_memory}
        full = own_serving_memory(c, context=context, running=running, **options)
        usual = own_serving_memory(c, context=min(context, PROMPT + OUTPUT), running=1, **options)
        full = replace(full, cache=min(full.cache, pool), runtime=0.0)
        hot = replace(full, weights=full.weights - copied, buffers=0.0)
        memory = replace(hot, buffers=max(0.0, opening - hot.total))
        held = max(opening, weights + usual.cache + usual.activations)
        loads.append(Load(memory, full.total, held, on_disk, running))
        left -= weights + memory.activations
    return loads


def needed_to_serve(loads: Sequence[Load], how: Serving) -> float:
    """Bytes without which a server cannot work, however slowly."""
    return how.replicas * (SERVE_PROCESS + sum(load.held for load in loads))


def serving_total(loads: Sequence[Load], how: Serving) -> float:
    """Bytes with which nothing is left on the disk and nobody has to wait."""
    return how.replicas * (SERVE_PROCESS + sum(load.memory.total for load in loads))


def ways_to_serve(models: Sequence[Served], how: Serving, free: float) -> list[tuple[Serving, str]]:
    """The two or three cheapest changes with which all is in memory, or, where nothing does that, with which the server works."""
    changes = list(_serving_changes(models, how))

    def fitting(needed: Callable[[Sequence[Load], Serving], float]) -> list[tuple[Serving, str]]:
        return cheapest(how, changes, lambda each: needed(serving_loads(models, each, free), each), free)

    found = fitting(serving_total)
    if not found and verdict(needed_to_serve(serving_loads(models, how, free), how), free) == "red":
        found = fitting(needed_to_serve)
    return [(changed, _serving_flags(how, changed)) for changed, _ in found]


def _serving_changes(models: Sequence[Served], how: Serving) -> Iterator[Change[Serving]]:
    replicas, worse = how.replicas, 1.0
    while replicas > 1:
        replicas, worse = replicas // 2, worse + 0.5
        yield worse, f"replicas {replicas}", _set(replicas=replicas)
    if how.prefix_memory is None or how.prefix_memory > 64e6:
        yield 1.5, "prefix_memory", _set(prefix_memory=64e6)
    running, worse = how.max_running, 2.0
    while running > 1:
        running, worse = max(1, running // 4), worse + 1
        yield worse, f"max_running {running}", _set(max_running=running)
    if how.cache != "int8":
        yield 3, "cache", _set(cache="int8")
    if how.quant is None and all(served.number_bytes > 1.5 for served in models):
        yield 3.5, "quant int8", _set(quant="int8")
    if how.quant in (None, "int8", "fp8") and all(served.number_bytes > 1.5 for served in models):
        yield 5, "quant int4", _set(quant="int4")


def _set(**changes: Any) -> Callable[[Serving], Serving]:
    return lambda how: replace(how, **changes)


def _serving_flags(before: Serving, after: Serving) -> str:
    changed = [f.name for f in fields(Serving) if getattr(before, f.name) != getattr(after, f.name)]
    values = {name: getattr(after, name) for name in changed}
    if "prefix_memory" in values:
        values["prefix_memory"] = f"{values['prefix_memory'] / 1e6:.0f}MB"
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


def check_serves(models: Sequence[Served], how: Serving, free: float) -> list[str]:
    """What to say of a server before it begins. Raises `UserError` where even its least does not fit."""
    loads = serving_loads(models, how, free)
    needed = needed_to_serve(loads, how)
    if verdict(needed, free) == "red":
        ways = [flags for _, flags in ways_to_serve(models, how, free)]
        raise UserError(
            f"the server needs about {size(needed)} and {size(free)} of memory are free (serve). {offered(ways)}; "
            "--force starts it anyway"
        )
    return list(_serving_notes(models, loads, how, free, ways=[]))


def _serving_notes(
    models: Sequence[Served], loads: Sequence[Load], how: Serving, free: float, ways: Sequence[str]
) -> Iterator[str]:
    total, needed = serving_total(loads, how), needed_to_serve(loads, how)
    fits = verdict(total, free)
    if verdict(needed, free) == "red":
        yield f"memory is red: without --force it is refused. {offered(ways)}"
    elif fits == "amber":
        yield f"memory is amber: {amber(total, free)}"
    elif fits == "red":
        for served, load in zip(models, loads, strict=True):
            if load.on_disk:
                yield (
                    f"the weights of {served.name} ({size(served.file_bytes)}) stay on the disk, and what is used most in "
                    f"memory: it answers, more slowly"
                )
        if not any(load.on_disk for load in loads):
            yield (
                f"memory is scarce: with its longest requests the server takes about {size(total)} of {size(free)}. "
                "shorter ones are answered"
            )
        if ways:
            yield f"{offered(ways).removesuffix(' would fit')} would hold all in memory"


@dataclass(frozen=True)
class ServerPlan:
    """`models`: a plan each. `memory`: of all together."""

    models: tuple[tuple[str, Plan], ...]
    memory: Section
    notes: tuple[str, ...]
    ways: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        whole = Plan("", self.models[0][1].model, self.models[0][1].machine, (self.memory,), self.notes)
        models = [{"name": name, **plan.document()} for name, plan in self.models]
        return whole.document() | {"models": models, "changes": list(self.ways)}

    def table(self) -> str:
        *first, last = (plan for _, plan in self.models)
        last = replace(last, sections=(*last.sections, self.memory), notes=(*last.notes, *self.notes))
        return "\n\n".join(map(table, (*first, last)))


def serving_plan(
    models: Sequence[Served],
    how: Serving,
    machine: Machine,
    *,
    free: float,
    utilization: float,
    price: Estimate,
    currency: str = "USD",
) -> ServerPlan:
    """price: of an hour of the machine at that utilization, electricity included, in `currency`."""
    loads = serving_loads(models, how, free)
    ways = tuple(flags for _, flags in ways_to_serve(models, how, free))
    total = Memory(
        **{f.name: how.replicas * sum(getattr(load.memory, f.name) for load in loads) for f in fields(Memory)}
    )
    memory = replace(total, runtime=how.replicas * SERVE_PROCESS)
    plans = []
    for served, load in zip(models, loads, strict=True):
        facts, said = list(_served_facts(served, how, load)), []
        sections = [Section("model", tuple(facts))]
        context = served.model.max_position_embeddings
        prompt, output = min(PROMPT, max(1, context * 4 // 5)), min(OUTPUT, max(1, context // 5))
        one = (prompt + output) * cache_bytes_per_token(served.model, number=how.number(served), mtp=True)
        pool = max(one, load.memory.cache)
        load_of: dict[str, Any] = {"utilization": utilization, "prompt_tokens": prompt, "output_tokens": output}
        load_of |= {"weights": how.quant or _format(served.number_bytes), "cache": how.number(served)}
        many = max(1, min(how.max_running, int(pool // one)))
        try:
            busy = serve_estimate(served.model, machine, batch=many, price=price, **load_of)
            alone = serve_estimate(served.model, machine, batch=1, **load_of).per_user
            told = (*busy.facts, Fact("serve.alone", alone, "tokens/s", "for one user who is alone", source=SOURCE))
            told = tuple(replace(fact, unit=currency) if fact.unit == "USD" else fact for fact in told)
            sections.append(Section(f"serving, busy {100 * utilization:g} % of the time", told))
        except UserError as error:
            said.append(f"serving: {error}")
        if len(models) > 1:
            sections.append(Section("memory", (), bar=(load.memory.parts, free)))
        title = f"{served.name} on {machine_words(machine)}"
        plans.append((served.name, Plan(title, architecture_of(served.model), machine, tuple(sections), tuple(said))))
    title = "memory" if len(models) == 1 else "memory of all models together"
    notes = tuple(_serving_notes(models, loads, how, free, ways))
    return ServerPlan(tuple(plans), memory_section(memory, free, title), notes, ways if notes else ())


def _served_facts(served: Served, how: Serving, load: Load) -> Iterator[Fact]:
    counts, exact = count_parameters(served.model), "exact: sum over the matrices of the config"
    row = cache_bytes_per_token(served.model, number=how.number(served), mtp=True)
    yield Fact("params.total", counts.total, "", "parameters", "embedding + blocks + head", source=exact)
    yield Fact("params.active", counts.active, "", "active for a token", "total - experts not chosen", source=exact)
    if counts.mtp:
        yield Fact("params.mtp", counts.mtp, "", "multi-token prediction, besides", source=exact)
    yield Fact("file_bytes", served.file_bytes, "bytes", "file of weights")
    yield Fact("kv_bytes_per_token", row, "bytes", f"cache of a token, {how.number(served)}", source=exact)
    yield Fact("context", served.model.max_position_embeddings, "tokens", "longest text")
    yield Fact("resident", load.resident, "bytes", "at most, with what the system may take back", source=OWN_MEMORY)
    yield Fact("running", load.running, "", "so long ones side by side", "what a quarter of free memory holds")
    for name, value in load.memory.parts.items():
        yield Fact(f"memory.{name}", value, "bytes", source=OWN_MEMORY)


def _format(number_bytes: float) -> str:
    """The nearest that `serve_estimate` knows."""
    least = {"float32": FLOAT_BYTES, "bf16": 1.9, "int8": 0.9}
    return next((name for name, size in least.items() if number_bytes >= size), "int4")
