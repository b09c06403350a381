"""A run's report: `run.jsonl` in, one self-contained `report.html` out.

The page answers, in this order, what one asks of a finished run: how good is it, did it learn steadily, did the experts
share the work, what does it write, and with which settings on which machine was it made.

`run.jsonl` is written by a process that may have died in the middle of a line, or been resumed after that. So a line
that is not a JSON object is skipped, each section is left out when its lines are missing, and when a resumed run says
a step for the second time the later word counts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from minga.errors import UserError
from minga.planner.words import count, size
from minga.recipes.drawing import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    axes,
    figure,
    page,
    section,
    tabulate,
    ticks,
    tiles,
    write_page,
)

Points = list[tuple[float, float]]  # (step, value), steps rising
Table = list[list[float]]
MAX_POINTS = 600  # a curve is drawn 640 wide: more points cannot be seen
MAX_SAMPLES = 8
MAX_CELLS = 6000  # of the heat map over time; with more experts it has fewer columns
STEP_KEYS = ("loss", "train_bits_per_byte", "tokens_per_second", "mfu", "lr", "grad_norm", "expert_max_over_mean")


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `run_dir/report.html` from `run_dir/run.jsonl` and return its path; a reader never sees half of it.

    Raises `UserError` when run.jsonl is missing or holds no line of a run, or when the report cannot be written.
    """
    folder = Path(run_dir)
    run = _gather(_read_lines(folder / "run.jsonl"))
    page = _page(folder.resolve().name, run)
    return write_page(folder / "report.html", page)


# ---- reading


@dataclass
class _Run:
    """What the lines of run.jsonl say, arranged by question."""

    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    last_step: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    loads: list[tuple[float, Table]] = field(default_factory=list)  # (step, MoE layers x experts, mean 1), steps rising
    skips: list[float] = field(default_factory=list)  # steps that were left out because the loss or gradient leapt
    curves: dict[str, Points] = field(default_factory=dict)  # by key of the line: "loss", "bits_per_byte", ...

    def curve(self, key: str) -> Points:
        return self.curves.get(key, [])

    def latest(self, key: str) -> float | None:
        points = self.curve(key)
        return points[-1][1] if points else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError(f"{path} is not there (report). name a folder that `minga train --out` wrote") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror} (report). check the file and its rights") from None
    lines = list(_objects(text.split("\n")))  # not splitlines: JSON may hold the other line ends of Unicode
    if not lines:
        raise UserError(f"{path} holds no line of a run (report). train for at least one step first")
    return lines


def _objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue  # torn when its writer died
        if isinstance(value, dict):
            yield value


def _gather(lines: Iterable[dict[str, Any]]) -> _Run:
    run = _Run()
    for line in lines:
        kind = line.get("kind")
        if kind == "start":
            run.start, run.end = line, {}
        elif kind == "step":
            run.last_step = line
            _add_points(run, line, STEP_KEYS)
            _add_load(run, line)
        elif kind == "eval":
            _add_points(run, line, ("val_loss", "bits_per_byte", "mtp_acceptance"))
        elif kind == "skip" and (step := _number(line.get("step"))) is not None:
            run.skips = [*(earlier for earlier in run.skips if earlier < step), step]
        elif kind == "sample":
            run.samples.append(line)
        elif kind == "end":
            run.end = line
    return run


def _add_points(run: _Run, line: Mapping[str, Any], keys: Iterable[str]) -> None:
    step = _number(line.get("step"))
    for key in keys:
        value = _number(line.get(key))
        if step is None or value is None:
            continue
        points = run.curves.setdefault(key, [])
        while points and points[-1][0] >= step:  # the run was resumed from an earlier checkpoint
            points.pop()
        points.append((step, value))


def _add_load(run: _Run, line: Mapping[str, Any]) -> None:
    step, table = _number(line.get("step")), _load_table(line.get("expert_load"))
    if step is None or not table:
        return
    run.loads = [*(earlier for earlier in run.loads if earlier[0] < step), (step, table)]


def _load_table(value: Any) -> Table:
    if not isinstance(value, list):
        return []
    table = [[_number(load) or 0.0 for load in row] for row in value if isinstance(row, list)]
    return [row for row in table if row]


def _number(value: Any) -> float | None:
    """`value` as a float, or None for what cannot be drawn: no number, NaN, infinity and its neighbours."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


# ---- numbers for people


def _count(value: float | None) -> str:
    return "–" if value is None else count(value)


def _decimal(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _size(value: float | None) -> str:
    return "–" if value is None else size(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


# ---- curves


def _thin(points: Points) -> Points:
    """At most MAX_POINTS points, each the mean of an equal share, so that a long run's report stays small."""
    if len(points) <= MAX_POINTS:
        return points
    bounds = [i * len(points) // MAX_POINTS for i in range(MAX_POINTS + 1)]
    parts = [points[a:b] for a, b in pairwise(bounds)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _smooth(points: Points, reach: int = 12) -> Points:
    """Means over 2 * reach + 1 neighbours; centred, and so without the lag of a running mean on a falling curve."""
    out = []
    for i, (step, _) in enumerate(points):
        half = min(reach, i, len(points) - 1 - i)
        near = points[i - half : i + half + 1]
        out.append((step, sum(value for _, value in near) / len(near)))
    return out


def _chart(title: str, series: Sequence[tuple[str, str, Points]]) -> str:
    """A card with curves; `series` holds (name, CSS class, points), and a name of "" stays out of the legend."""
    series = [(name, kind, _thin(points)) for name, kind, points in series if points]
    if not series:
        return ""
    steps = [step for _, _, points in series for step, _ in points]
    values = [value for _, _, points in series for _, value in points]
    spread = max(values) - min(values)
    level = spread <= 1e-9 * max(map(abs, values))  # rounding is no curve, and has no ticks
    margin = (0.1 * abs(values[0]) or 1.0) if level else 0.06 * spread
    x = Scale(min(steps), max(max(steps), min(steps) + 1), LEFT, WIDTH - RIGHT)
    y = Scale(min(values) - margin, max(values) + margin, HEIGHT - BOTTOM, TOP)
    said = "; ".join(f"{name} {points[0][1]:.3f} to {points[-1][1]:.3f}" for name, _, points in series if name)
    drawn = _axes(x, y) + "".join(_curve(name, kind, points, x, y) for name, kind, points in series)
    legend = [(name, kind) for name, kind, _ in series if name]
    return figure(title, drawn, said=f"{title}: {said}", legend=legend)


def _axes(x: Scale, y: Scale) -> str:
    rows = ticks(y.low, y.high, 5)
    digits = max(0, -math.floor(math.log10(rows[1] - rows[0]) + 1e-9)) if len(rows) > 1 else 2
    columns = [v for v in ticks(x.low, x.high, 7) if v == round(v)]  # there is no half step
    return axes(((x(v), f"{v:,.0f}") for v in columns), ((y(v), f"{v:,.{digits}f}") for v in rows))


def _curve(name: str, kind: str, points: Points, x: Scale, y: Scale) -> str:
    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
    out = "" if kind == "dots" else f'<polyline class="curve {kind}" points="{line}"/>'
    if name and len(points) <= 40:  # few enough to be pointed at: each says its value
        out += "".join(
            f'<circle class="{kind}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3">'
            f"<title>{escape(name)}, step {step:,.0f}: {value:.4f}</title></circle>"
            for step, value in points
        )
    return out


def _heat_map(table: Sequence[Sequence[float]]) -> str:
    """Rows are MoE layers, columns experts; colour is the distance from an even share, full at twice or half of it.

    So a calm map is a balanced one.
    """
    if not table:
        return ""
    columns = max(len(row) for row in table)
    wide, high = (WIDTH - LEFT - RIGHT) / columns, max(9, min(36, HEIGHT // len(table)))
    every = 1 if high >= 18 else 5  # room for the labels
    cells = "".join(
        f'<text x="{LEFT - 8}" y="{(layer - 0.5) * high + 4:.1f}" text-anchor="end">{layer}</text>'
        for layer in range(every, len(table) + 1, every)
    )
    for layer, row in enumerate(table):
        for expert, load in enumerate(row):
            distance = min(1.0, abs(math.log2(max(load, 0.05))))
            box = f'x="{LEFT + expert * wide:.2f}" y="{layer * high + 1}" width="{wide * 0.94:.2f}" height="{high - 2}"'
            kind, said = "hot" if load > 1 else "cold", f"layer {layer + 1}, expert {expert + 1}: {load:.2f}"
            cells += (
                f'<rect class="cell" {box}/>'
                f'<rect class="load {kind}" {box} fill-opacity="{distance:.2f}"><title>{said}</title></rect>'
            )
    return figure(
        "Load of each expert (rows: layers)",
        cells,
        said=f"Expert load, {len(table)} layers by {columns} experts",
        height=len(table) * high,
        legend=[("twice its share", "held"), ("half", "cold")],
    )


def _heat_over_time(loads: Sequence[tuple[float, Table]]) -> str:
    """One band a layer, one row an expert, time to the right; the colours are those of the map of the last step.

    Cells of one shade are one path, in five shades, so that the page stays small.
    """
    rows = sum(len(row) for row in loads[-1][1]) if loads else 0
    if len(loads) < 2 or not rows:
        return ""
    columns = min(len(loads), 100, max(8, MAX_CELLS // rows))
    shown = [loads[(i + 1) * len(loads) // columns - 1] for i in range(columns)]
    wide, high, gap = (WIDTH - LEFT - RIGHT) / columns, min(8.0, max(1.0, HEIGHT / rows)), 4
    paths: dict[tuple[str, int], str] = {}
    labels, y = "", 0.0
    for layer, last in enumerate(loads[-1][1]):
        labels += f'<text x="{LEFT - 8}" y="{y + len(last) * high / 2 + 4:.1f}" text-anchor="end">{layer + 1}</text>'
        for expert in range(len(last)):
            for column, (_, table) in enumerate(shown):
                load = table[layer][expert] if layer < len(table) and expert < len(table[layer]) else 1.0  # came later
                shade = round(5 * min(1.0, abs(math.log2(max(load, 0.05)))))
                if shade:
                    kind = ("hot" if load > 1 else "cold", shade)
                    at = f"M{LEFT + column * wide:.1f} {y:.1f}h{wide:.1f}v{high:.1f}h-{wide:.1f}z"
                    paths[kind] = paths.get(kind, "") + at
            y += high
        y += gap
    x = Scale(shown[0][0], shown[-1][0], LEFT + wide / 2, WIDTH - RIGHT - wide / 2)
    steps = [v for v in ticks(x.low, x.high, 7) if v == round(v)]
    labels += "".join(f'<text x="{x(v):.1f}" y="{y + 14:.1f}" text-anchor="middle">{v:,.0f}</text>' for v in steps)
    drawn = "".join(f'<path class="{kind}" fill-opacity="{n / 5}" d="{d}"/>' for (kind, n), d in paths.items())
    ground = f'<rect class="cell" x="{LEFT}" y="0" width="{WIDTH - LEFT - RIGHT}" height="{y - gap:.1f}"/>'
    return figure(
        "Load of each expert over time (bands: layers)",
        ground + drawn + labels,
        said=f"Expert load over {columns} moments",
        height=round(y + 20),
    )


# ---- the page


def _tiles(run: _Run) -> str:
    parameters = _mapping(run.start.get("parameters"))
    seconds = _number(run.end.get("seconds")) or _number(run.last_step.get("seconds"))
    tokens = _number(run.last_step.get("tokens"))
    facts = (
        ("parameters", _count(_number(parameters.get("total")))),
        ("active for a token", _count(_number(parameters.get("active")))),
        ("bits per byte, held-out", _decimal(run.latest("bits_per_byte"), 3)),
        ("loss, held-out", _decimal(run.latest("val_loss"), 3)),
        ("steps", _count(_number(run.last_step.get("step")))),
        ("tokens", _count(tokens)),
        ("tokens a second", _count(_speed(run, tokens))),
        ("MFU", _percent(_median(run.curve("mfu")))),
        ("memory", _size(_number(run.last_step.get("gpu_memory")) or _number(run.last_step.get("memory")))),
        ("time", _duration(seconds)),
        ("MTP acceptance", _percent(run.latest("mtp_acceptance"))),
    )
    return tiles((name, value) for name, value in facts if value != "–")


def _speed(run: _Run, tokens: float | None) -> float | None:
    """The median over the steps: one slow step (a checkpoint, a suspended laptop) does not move it."""
    return _median(run.curve("tokens_per_second")) if tokens else None


def _median(points: Points) -> float | None:
    values = sorted(value for _, value in points)
    return values[len(values) // 2] if values else None


def _outcome(run: _Run) -> str:
    if not run.end:
        return "still training, or interrupted"
    return {"done": "finished", "stopped": "stopped before its end"}.get(str(run.end.get("reason")), "ended")


def _samples(run: _Run) -> str:
    blocks = []
    for sample in reversed(run.samples[-MAX_SAMPLES:]):
        prompt, text = str(sample.get("prompt") or ""), str(sample.get("text") or "")
        step = _count(_number(sample.get("step")))
        said = f"<b>{escape(prompt)}</b>" if prompt.strip() else ""  # a bare line end asks for any text
        rest = text.removeprefix(prompt) if said else text.strip()
        blocks.append(f"<blockquote><small>step {step}</small><p>{said}{escape(rest)}</p></blockquote>")
    return "".join(blocks)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as rows: {"model": {"vocab_size": 4096}} gives ("model.vocab_size", "4096")."""
    if not isinstance(value, dict):
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))


def _table(value: Any) -> str:
    if not value:
        return ""
    rows = _flat(value) if isinstance(value, dict) else [("", str(value))]
    return tabulate((escape(name), escape(text)) for name, text in rows)


def _skipped(run: _Run) -> Points:
    norms = dict(run.curve("grad_norm"))
    return [(step, norms[step]) for step in run.skips if step in norms]


def _plan(value: Any) -> str:
    """The one dial's choices: name, value, formula, source."""
    found = _mapping(value).get("choices")
    choices = [choice for choice in found if isinstance(choice, dict)] if isinstance(found, list) else []
    rows = (
        (
            escape(str(choice.get("name"))),
            escape(str(choice.get("value"))),
            f"{escape(str(choice.get('formula')))}<br><small>{escape(str(choice.get('source')))}</small>",
        )
        for choice in choices
    )
    return tabulate(rows, kind="plan")


def _page(name: str, run: _Run) -> str:
    loss, speed = run.curve("loss"), run.curve("tokens_per_second")
    charts = (
        _chart(
            "Loss (nats a token)",
            [
                ("", "raw", loss),
                ("training, smoothed", "train", _smooth(_thin(loss))),
                ("held-out", "held", run.curve("val_loss")),
            ],
        ),
        _chart(
            "Bits per byte",
            [
                ("training, smoothed", "train", _smooth(_thin(run.curve("train_bits_per_byte")))),
                ("held-out", "held", run.curve("bits_per_byte")),
            ],
        ),
        _chart("Learning rate of the matrices", [("", "train", run.curve("lr"))]),
        _chart("Gradient norm", [("", "train", run.curve("grad_norm")), ("skipped steps", "dots", _skipped(run))]),
    )
    balance = [("busiest expert / mean", "train", run.curve("expert_max_over_mean"))]
    sections = (
        section("Learning", *charts, kind="pair"),
        section(
            "Experts",
            _heat_over_time(run.loads),
            _heat_map(run.loads[-1][1] if run.loads else []),
            _chart("Imbalance", balance),
            kind="pair",
        ),
        section(
            "Speed",
            _chart("Training (tokens a second)", [("", "raw", speed), ("smoothed", "train", _smooth(_thin(speed)))]),
            _chart(
                "MFU (share of the products' peak in the run's precision)",
                [("", "train", _smooth(_thin(run.curve("mfu"))))],
            ),
            _chart("MTP acceptance (share of drafts)", [("held-out", "held", run.curve("mtp_acceptance"))]),
            kind="pair",
        ),
        section("Samples", _samples(run)),
        section("Why these numbers", _plan(run.start.get("plan"))),
        section("Machine", _table(run.start.get("machine"))),
        section("Settings", _table(run.start.get("config"))),
    )
    return page(name, _outcome(run), _tiles(run), sections)
