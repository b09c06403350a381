"""A plan as one self-contained HTML page: what it costs in big numbers, pictures of it, and where each number comes from.

Pictures hold what a table cannot: how memory and a step's time are shared out, what more or fewer devices would change, which
other models were near, how many users may share the machine. What a plan lacks is left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from minga.config.hardware import Machine, of_devices
from minga.errors import UserError
from minga.planner.cost import rent
from minga.planner.estimate import Estimate, Fact
from minga.planner.memory import GREEN, Memory, verdict
from minga.planner.plan import Plan, device_price, lay_out, serve, serving_options
from minga.planner.scaling import Option
from minga.planner.serving import serve_estimate
from minga.planner.table import cells, input_words
from minga.planner.time import run_time
from minga.planner.words import between, count, duration, in_unit, number, size
from minga.recipes.drawing import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    LogScale,
    Scale,
    axes,
    figure,
    log_ticks,
    page,
    section,
    tabulate,
    ticks,
    tiles,
    write_page,
)

SIZES = (0.25, 0.5, 1, 2, 4)  # of the machine, to see what fewer and more devices would change
KINDS = {  # of a step's parts, by what the device is busy with
    "linear": "matrix products",
    "experts": "matrix products",
    "attention": "attention",
    "memory": "reading, writing",
    "weights": "reading, writing",
    "logits": "reading, writing",
    "optimizer": "reading, writing",
    "dispatch": "dispatch",
    "launches": "launching",
    "calls": "launching",
    "tensor": "network",
    "routing": "network",
    "data": "network",
    "bubble": "pipeline idle",
}
TILES = (  # a fact, and what it is called where its label says too much or too little for a tile (None: its label)
    ("params.total", None),
    ("params.active", None),
    ("scaling.loss", "loss, predicted (nats a token)"),
    ("train.tokens", "tokens to train on"),
    ("train.days", "time to train"),
    ("train.gpu_hours", None),
    ("money.final_run", "rent of the run"),
    ("energy_kwh", "energy"),
    ("carbon_kg", None),
    ("train.tokens_per_second", "read in training"),
    ("serve.prefill.tokens_per_second", "of prompts, in serving"),
    ("serve.decode.tokens_per_second", "written in serving"),
    ("serve.per_user", "written for one user"),
    ("serve.cost_per_million.blended", "a million tokens served"),
)
PICTURED = {"best.model"}  # what its section says in lines is a figure here
TIMES = (("days", 1.0), ("hours", 24.0), ("minutes", 1440.0))
BAR, MARKS = 46, 34  # height of a stacked bar, and of the marks above it
COLOURS = 8
RADIUS = (4, 6)  # of a point, and of the plan's own
CHART = 300  # height of a drawing of points
LABEL, LETTER = (72, 24), 11  # room that labels and letters take on a phone, where they are largest


def write_plan_page(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write the page of `plan` and return its path; a reader never sees half of it. Raises `UserError` if that fails."""
    outcome = "Big: the most likely value. Small: the range that holds the truth nine times of ten."
    sections = (
        section("Before you rely on it", _list(plan.notes)),
        section("Training", _setup(plan), *_training(plan), kind="pair"),
        section("Serving", *_serving(plan), kind="pair"),
        *(
            section(f"Numbers: {escape(part.title)}", _drawing(part.facts, part.lines), _facts(part.facts))
            for part in plan.sections
        ),
    )
    return write_page(Path(path), page(plan.title, outcome, tiles(_tiles(plan)), sections, style=STYLE))


# ---------------------------------------------------------------------------------------------- numbers


def _tiles(plan: Plan) -> Iterator[tuple[str, ...]]:
    facts = {fact.name: fact for fact in plan.facts}
    for name, label in TILES:
        if (fact := facts.get(name)) is not None:
            label = fact.label if label is None else label
            if fact.unit == "tokens/s":  # a tile is narrow
                fact, label = replace(fact, unit=""), f"tokens/s {label}"
            yield (label, *cells(fact))
        if name == "train.gpu_hours" and plan.memory is not None:
            available = plan.machine.device.memory
            total, fits = plan.memory.total, plan.value("memory.verdict")
            yield (
                f"memory of a device in {_phase(plan)}",
                size(total),
                f"{100 * total / available:.0f} % of {size(available)}: {fits}",
            )


def _phase(plan: Plan) -> str:
    return "training" if plan.setup is not None else "serving"


def _setup(plan: Plan) -> str:
    words = plan.value("train.setup")
    return f'<p class="setup">{escape(words)}</p>' if words else ""


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="notes">{items}</ul>' if items else ""


def _drawing(facts: Iterable[Fact], lines: Sequence[str]) -> str:
    return "" if PICTURED & {fact.name for fact in facts} else _list(lines)


def _facts(facts: Iterable[Fact]) -> str:
    return tabulate((_fact(fact) for fact in facts), kind="facts")


def _fact(fact: Fact) -> tuple[str, str, str]:
    value, spread = cells(fact)
    name = f"<code>{escape(fact.name).replace('.', '.<wbr>').replace('_', '_<wbr>')}</code>"
    number_or_words = escape(value) if isinstance(fact.value, str) else f"<b>{escape(value)}</b>"
    inputs = "".join(f"<li>{escape(key)} = {escape(input_words(given))}</li>" for key, given in fact.inputs.items())
    told = (escape(fact.formula), f"<small>{escape(fact.source)}</small>" if fact.source else "")
    more = f"<details><summary>from {len(fact.inputs)} inputs</summary><ul>{inputs}</ul></details>" if inputs else ""
    return (
        f"{escape(fact.label)}<br>{name}" if fact.label else name,
        number_or_words + (f"<br><small>{escape(spread)}</small>" if spread else ""),
        "<br>".join(part for part in told if part) + more,
    )


# ---------------------------------------------------------------------------------------------- shares of a whole


def _memory(phase: str, memory: Memory, needed: float, available: float) -> str:
    """needed: what the verdict is on."""
    parts = [(name, name, value) for name, value in memory.parts.items()]
    marks = ((GREEN * available, f"{100 * GREEN:.0f} %"), (available, size(available)))
    said = f"{size(memory.total)} of {size(available)}, {verdict(needed, available)}"
    return _stack(f"Memory of a device in {phase}", parts, "bytes", said, marks)


def _step(plan: Plan) -> str:
    fact = next((fact for fact in plan.facts if fact.name == "train.step_seconds"), None)
    if fact is None:
        return ""
    parts = [(name, KINDS.get(name, name), value) for name, value in fact.inputs.items() if name != "tokens"]
    value, spread = cells(fact)
    return _stack(f"Time of {fact.label}", parts, "s", f"{value} ({spread})" if spread else value)


def _stack(
    title: str,
    parts: Sequence[tuple[str, str, float]],
    unit: str,
    said: str,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """One bar of parts, each (name, kind, value); a kind has one colour and one line of the legend. marks: (where, label)."""
    parts = [part for part in parts if part[2] > 0]
    sums: dict[str, float] = {}
    for _, kind, value in parts:
        sums[kind] = sums.get(kind, 0.0) + value
    kinds, total = list(sums), sum(sums.values())
    x = Scale(0.0, max([total, *(where for where, _ in marks)]), 0.0, WIDTH)
    top = MARKS if marks else 0
    drawn, left = "", 0.0
    if marks:
        drawn = f'<rect class="cell" x="0" y="{top}" width="{x(marks[-1][0]):.1f}" height="{BAR}"/>'
    for name, kind, value in sorted(parts, key=lambda part: kinds.index(part[1])):
        drawn += (
            f'<rect class="{_colour(kinds, kind)}" x="{x(left):.1f}" y="{top}" width="{max(0.5, x(value) - 1):.1f}" '
            f'height="{BAR}"><title>{escape(name)}: {in_unit(value, unit)}, {in_unit(value / total, "share")}</title></rect>'
        )
        left += value
    for where, label in marks:
        across = f"{x(where):.1f}"
        drawn += (
            f'<line class="mark" x1="{across}" x2="{across}" y1="{top - 8}" y2="{top + BAR + 6}"/>'
            f'<text x="{across}" y="{top - 14}" text-anchor="{"end" if x(where) > WIDTH - 40 else "middle"}">'
            f"{escape(label)}</text>"
        )
    keys = "".join(
        f'<li class="{_colour(kinds, kind)}">{escape(kind)} '
        f"<span><b>{in_unit(value, unit)}</b> {_percent(value / total)}</span></li>"
        for kind, value in sums.items()
    )
    spoken = ", ".join(f"{kind} {in_unit(value, unit)}" for kind, value in sums.items())
    return figure(
        title,
        drawn,
        said=f"{title}: {said}. {spoken}",
        height=top + BAR + 8,
        below=f'<ul class="parts">{keys}</ul><p class="note">{escape(said)}</p>',
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "&lt; 1 %"


def _colour(kinds: Sequence[str], kind: str) -> str:
    return f"c{kinds.index(kind) % COLOURS + 1}"


# ---------------------------------------------------------------------------------------------- points


@dataclass(frozen=True)
class _Point:
    x: Estimate
    y: Estimate
    label: str
    said: str
    chosen: bool
    radius: float


def _points(title: str, points: Sequence[_Point], key: str, note: str, *, log_y: bool = True) -> str:
    """A line through points and each one's range both ways; the plan's own is told apart. key: what the points are."""
    x = _scale([point.x for point in points], LEFT + 14, WIDTH - RIGHT - 30, log=True)
    y = _scale([point.y for point in points], CHART - BOTTOM - 28, TOP + 16, log=log_y)
    rows = log_ticks(y.low, y.high) if log_y else ticks(y.low, y.high, 4)
    drawn = axes(((x(v), _tick(v)) for v in log_ticks(x.low, x.high)), ((y(v), _tick(v)) for v in rows), height=CHART)
    line = " ".join(f"{x(point.x.typical):.1f},{y(point.y.typical):.1f}" for point in points)
    drawn += f'<polyline class="curve" points="{line}"/>'
    named: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: point.chosen):
        across, up = x(point.x.typical), y(point.y.typical)
        kind = "held" if point.chosen else "other"
        if point.x.low < point.x.high:
            drawn += f'<path class="reach {kind}" d="M{x(point.x.low):.1f} {up:.1f}H{x(point.x.high):.1f}"/>'
        if point.y.low < point.y.high:
            drawn += f'<path class="reach {kind}" d="M{across:.1f} {y(point.y.low):.1f}V{y(point.y.high):.1f}"/>'
        drawn += (
            f'<circle class="{kind}" cx="{across:.1f}" cy="{up:.1f}" r="{point.radius:.1f}">'
            f"<title>{escape(point.said)}</title></circle>"
        )
    for point in sorted(points, key=lambda point: not point.chosen):
        across, up = x(point.x.typical), y(point.y.typical)
        if any(abs(across - a) < LABEL[0] and abs(up - b) < LABEL[1] for a, b in named):
            continue
        named.append((across, up))
        away = 4 + point.radius
        if across + away + LETTER * len(point.label) < WIDTH:
            where = f'x="{across + away:.1f}" y="{up - away:.1f}"'
        else:
            where = f'x="{across - away:.1f}" y="{up + away + 10:.1f}" text-anchor="end"'
        drawn += f'<text class="label" {where}>{escape(point.label)}</text>'
    return figure(
        title,
        drawn,
        said=f"{title}: {'; '.join(point.said for point in points)}",
        height=CHART,
        legend=((key, ""), ("this plan", "held")),
        below=f'<p class="note">{escape(note)}</p>',
    )


def _scale(values: Iterable[Estimate], first: float, last: float, *, log: bool) -> Scale:
    ends = [end for value in values for end in (value.low, value.high)]
    low, high = min(ends), max(ends)
    if high - low < 1e-3 * high:  # one level is no span
        low, high = 0.8 * low, 1.25 * high
    return (LogScale if log else Scale)(low, high, first, last)


def _tick(value: float) -> str:
    if value >= 1e6:
        return count(value)
    return f"{value / 1e3:g} k" if value >= 1e4 else f"{value:,.6g}"


# ---------------------------------------------------------------------------------------------- training


def _training(plan: Plan) -> Iterator[str]:
    if plan.setup is not None and plan.memory is not None:
        yield _memory("training", plan.memory, plan.memory.total, plan.machine.device.memory)
    yield _step(plan)
    yield _sizes(plan)
    yield _front(plan)


def _sizes(plan: Plan) -> str:
    """Money against time of the same run on fewer and on more devices, each number laid out anew."""
    ask, machine = plan.ask, plan.machine
    if plan.setup is None or ask.tokens is None or machine.device.kind == "cpu":  # processors are what they are
        return ""
    price, _ = device_price(machine.device, ask, [])
    paid = price is not None and price.low > 0
    found, left_out = [], []
    for other in _others(machine):
        try:
            setup = lay_out(plan.model, other, ask)
            found.append((other, run_time(plan.model, setup, other, ask.tokens, coefficients=ask.coefficients)))
        except UserError as error:
            left_out.append(f"{other.count:,} ({str(error).partition(' (')[0]})")
    if len(found) < 2:
        return ""
    name, factor = _time_unit(plan.value("train.days").typical)
    points = []
    for other, run in found:
        cost = rent(run.gpu_hours, price) if paid and price is not None else run.gpu_hours
        unit = "USD" if paid else "device-hours"
        said = f"{other.count:,} devices: {_in_words(run.days, 'days')}, {_in_words(cost, unit)}"
        radius = RADIUS[other.count == machine.count]
        points.append(_Point(run.days * factor, cost, f"{other.count:,}", said, other.count == machine.count, radius))
    note = "Each point is a number of devices, laid out anew; its lines hold the truth nine times of ten."
    if left_out:
        note += f" Left out: {'; '.join(left_out)}."
    return _points(f"{'Rent (USD)' if paid else 'Device-hours'} against time ({name})", points, "devices", note)


def _others(machine: Machine) -> Iterator[Machine]:
    """Machines of the same devices, from a quarter to four times as many."""
    for factor in SIZES:
        devices = machine.count * factor
        if devices == machine.count:
            yield machine
        elif devices >= 1 and devices == int(devices):
            per_node = min(int(devices), machine.per_node) if machine.nodes > 1 else None
            other = of_devices(machine.device, int(devices), per_node)
            network = machine.network if other.nodes > 1 and machine.network is not None else other.network
            yield replace(other, network=network)


def _front(plan: Plan) -> str:
    options = [option for option in plan.front if option.seconds is not None]
    if len(options) < 2:
        return ""
    own = _own(plan, options)
    options.sort(key=_days)
    name, factor = _time_unit(_days(options[-1]))
    largest = max(option.parameters for option in options)
    points = [
        _Point(
            Estimate.exactly(factor * _days(option)),
            Estimate.exactly(option.loss.typical),
            count(option.parameters),
            f"{count(option.parameters)} active, {count(option.tokens)} tokens: "
            f"{duration(86400 * _days(option))}, loss {option.loss.typical:.3f}",
            option is own,
            3 + 5 * math.sqrt(option.parameters / largest),
        )
        for option in options
    ]
    note = (
        "Models than which none ends lower sooner. Points are as large as their active parameters; ranges are left out."
    )
    return _points(f"Loss (nats a token) against time ({name})", points, "active parameters", note, log_y=False)


def _own(plan: Plan, options: list[Option]) -> Option | None:
    """The option that the plan has taken; in its place in `options`, with the plan's tokens, which are worked out anew."""
    tokens, loss = plan.ask.tokens, plan.value("scaling.loss")
    same = [option for option in options if option.parameters == plan.value("params.active")]
    if not same or tokens is None or loss is None:
        return None
    found = min(same, key=lambda option: abs(option.tokens - tokens))
    own = replace(found, tokens=tokens, seconds=plan.seconds, loss=loss)
    options[options.index(found)] = own
    return own


def _days(option: Option) -> float:
    return 0.0 if option.seconds is None else option.seconds.typical / 86400


def _time_unit(days: float) -> tuple[str, float]:
    """The largest unit of which so many days are two or more; how many of it are a day."""
    return next((unit for unit in TIMES if days * unit[1] >= 2), TIMES[-1])


def _in_words(value: Estimate, unit: str) -> str:
    spread = "" if value.low == value.high else f" ({between(value.low, value.high, unit)})"
    return in_unit(value.typical, unit) + spread


# ---------------------------------------------------------------------------------------------- serving


def _serving(plan: Plan) -> Iterator[str]:
    batch = next((fact for fact in plan.facts if fact.name == "serve.batch"), None)
    if batch is None:
        return
    served = serve(plan.model, plan.machine, plan.ask, [])
    yield _memory("serving", served.memory, served.needed, plan.machine.device.memory)
    fits = int(batch.inputs.get("fit", served.decode.batch))
    sizes = sorted({4**n for n in range(fits.bit_length() // 2 + 1) if 4**n <= fits} | {fits, served.decode.batch})
    if len(sizes) < 2:
        return
    held = serving_options(plan.model, plan.machine, plan.ask, []) | {
        "devices": served.decode.devices,
        "parallel": None if served.decode.parallel == "one" else served.decode.parallel,
    }
    points = []
    for number_of in sizes:
        chosen = number_of == served.decode.batch
        found = served if chosen else serve_estimate(plan.model, plan.machine, **held, batch=number_of)
        user, all_of_it = found.per_user, found.decode.tokens_per_second
        said = (
            f"{number_of:,} at once: {number(user.typical)} tokens/s each, {count(all_of_it.typical)} tokens/s in all"
        )
        if not chosen:
            user, all_of_it = Estimate.exactly(user.typical), Estimate.exactly(all_of_it.typical)
        points.append(_Point(user, all_of_it, f"{number_of:,}", said, chosen, RADIUS[chosen]))
    devices = served.decode.devices
    copy = f"a copy of {devices} devices" if devices > 1 else "a device"
    note = (
        f"Points are the sequences that {copy} decodes at once. All have the doubt whose range is drawn for this plan."
    )
    yield _points("Tokens/s of the machine against those of one user", points, "at once", note)


STYLE = """
:root { --plum: #86518f; --moss: #5c7420; --rose: #b03f58; --slate: #5a6a74; --sand: #866a35; }
@media (prefers-color-scheme: dark) { :root { --plum: #cfa2d6; --moss: #a9c46c; --rose: #ee8fa3; --slate: #9fb0b8;
  --sand: #d3b98a; } }
.c1 { --c: var(--teal); } .c2 { --c: var(--blue); } .c3 { --c: var(--amber); } .c4 { --c: var(--plum); }
.c5 { --c: var(--moss); } .c6 { --c: var(--rose); } .c7 { --c: var(--slate); } .c8 { --c: var(--sand); }
rect { fill: var(--c); }
.mark { stroke: var(--ink); stroke-dasharray: 4 3; }
.reach { fill: none; stroke: var(--teal); stroke-width: 1.5; opacity: .4; }
.reach.held { stroke: var(--amber); opacity: .9; }
.label { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
.setup { grid-column: 1 / -1; margin: -6px 0 14px; color: var(--soft); }
.pair figure:nth-of-type(odd):last-child { grid-column: 1 / -1; }
ul { margin: 0; padding: 0; list-style: none; }
.parts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 208px), 1fr)); gap: 2px 16px;
  margin-top: 12px; font-size: .84rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.parts span { white-space: nowrap; }
.parts b { color: var(--ink); font-weight: 600; }
.parts li::before { content: ""; display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px;
  background: var(--c); }
.notes { background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--amber); border-radius: 14px;
  padding: 10px 16px; margin-bottom: 14px; font-size: .9rem; }
.notes li + li { margin-top: 6px; }
.facts th { width: 28%; color: var(--ink); }
.facts td:nth-child(2) { width: 24%; padding-right: 18px; }
.facts b { font-weight: 600; }
code { font: .78rem/1.4 ui-monospace, "DejaVu Sans Mono", monospace; color: var(--soft); }
details { font-size: .82rem; color: var(--soft); }
summary { cursor: pointer; color: var(--teal); width: fit-content; padding: 2px 0; }
details ul { columns: 2 200px; font-variant-numeric: tabular-nums; padding-bottom: 4px; }
@media (max-width: 640px) { .facts tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--line); }
  .facts tr:last-child { border-bottom: 0; } .facts tr > *, .facts td:nth-child(2) { display: block; width: auto;
  border: 0; padding: 1px 0; } }
"""
