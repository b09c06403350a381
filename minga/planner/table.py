"""A plan for a terminal: what people read, bars of memory, two plans side by side, and where a number comes from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from minga.errors import UserError
from minga.planner.estimate import Estimate, Fact
from minga.planner.words import between, in_unit, number, rounded, size

if TYPE_CHECKING:
    from minga.planner.plan import Plan

BAR, TEXT, NOTE = 56, 64, 110  # characters of a bar of memory, of a line of words, and of a note
_SHADES, _ASCII_SHADES = "█▓▒░▚╱·", "#=+-%/."


def table(plan: Plan) -> str:
    """Sections of lines: what, most likely value, the range that holds it nine times of ten."""
    lines = [plan.title]
    shown = [fact for section in plan.sections for fact in section.facts if fact.label]
    wide = max((len(fact.label) for fact in shown), default=0)
    for section in plan.sections:
        facts = [fact for fact in section.facts if fact.label]
        if not (facts or section.bar):
            continue
        lines += ["", section.title]
        written = [cells(fact) for fact in facts]
        middle = max(
            (len(value) for fact, (value, _) in zip(facts, written, strict=True) if _is_number(fact)), default=0
        )
        for fact, (value, spread) in zip(facts, written, strict=True):
            first, *more = [f"{value:>{middle}}  {spread}"] if _is_number(fact) else _lines(value, TEXT)
            lines.append(f"  {fact.label:{wide}}  {first}".rstrip())
            lines += [f"  {'':{wide}}  {line}" for line in more]
        lines += [f"  {line}" for line in (*(memory_bar(*section.bar) if section.bar else ()), *section.lines)]
    if plan.notes:
        lines.append("")
    for note in plan.notes:
        lines += _indented(note, "! ")
    return "\n".join(lines)


def letters_of(text: str, encoding: str | None) -> str:
    """The text as an output in this encoding can show it: bars in ASCII where it has no blocks."""
    try:
        _SHADES.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return text.translate(str.maketrans(_SHADES, _ASCII_SHADES))
    return text


def memory_bar(parts: Mapping[str, float], available: float) -> list[str]:
    """Memory of a device, a shade a part, to the scale of what it has; what does not fit runs over the end."""
    total, scale = sum(parts.values()), BAR / max(available, sum(parts.values()))
    bar, legend = "", []
    shown = [(name, value) for name, value in parts.items() if value >= 0.002 * total]
    for (name, value), shade in zip(shown, _SHADES, strict=False):
        bar += shade * max(1, round(value * scale))
        legend.append(f"{shade} {name} {size(value)}")
    edge = round(available * scale)
    bar = f"{bar:<{edge}}"
    return [f"[{bar[:edge]}]{bar[edge:]}", *_wrapped(legend)]


def compare(plans: Sequence[Plan]) -> str:
    """The numbers of two plans side by side, and how many times as much the second is."""
    by_name = [{fact.name: fact for fact in plan.facts if fact.label} for plan in plans]
    words = {fact.name for facts in by_name for fact in facts.values() if not _is_number(fact)}
    names = [name for name in dict.fromkeys(name for facts in by_name for name in facts) if name not in words]
    rows = [("", *(plan.title.partition(" (")[0] for plan in plans), "")]
    for name in names:
        found = [facts.get(name) for facts in by_name]
        label = next(fact.label for fact in found if fact is not None)
        a, b = ("-" if fact is None else cells(fact)[0] for fact in found)
        rows.append((label, a, b, _ratio(*found)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}".rstrip()
        for row in rows
    ]
    for plan, facts in zip(plans, by_name, strict=True):  # words are too wide for a column
        told = [f"{fact.label}: {fact.value}" for name, fact in facts.items() if name in words]
        if told or plan.notes:
            lines += ["", plan.title, *(line for text in told for line in _indented(text, "  "))]
            lines += [line for note in plan.notes for line in _indented(note, "! ")]
    return "\n".join(lines)


def _indented(text: str, mark: str) -> list[str]:
    return textwrap.wrap(
        text, NOTE, initial_indent=mark, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def explain(plan: Plan, name: str) -> str:
    """Formula, inputs and source of one number, or of all of a section. Raises `UserError` with the names there are."""
    return "\n\n".join(_derivation(fact) for fact in explained(plan, name))


def explained(plan: Plan, name: str) -> list[Fact]:
    """The facts that `explain` tells of."""
    facts = [fact for fact in plan.facts if fact.name == name or fact.name.startswith(f"{name}.")]
    if not facts:
        import difflib

        names = [fact.name for fact in plan.facts]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        known = near or dict.fromkeys(each.partition(".")[0] for each in names)
        raise UserError(f"this plan has no {name!r:.60} (--explain). it has {', '.join(known)}")
    return facts


def _derivation(fact: Fact) -> str:
    value, spread = cells(fact)
    lines = [f"{fact.name} = {value} {spread}".rstrip()]
    for title, text in (("formula", fact.formula), ("source", fact.source)):
        if text:
            lines.append(f"  {title:8} {text}")
    lines += [f"  {key:8} {input_words(value)}" for key, value in fact.inputs.items()]
    return "\n".join(lines)


def input_words(value: object) -> str:
    """What a number was worked out from, to more digits than it is good for."""
    if isinstance(value, Estimate):
        return f"{value.typical:.6g} ({value.low:.6g} - {value.high:.6g})"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def cells(fact: Fact) -> tuple[str, str]:
    """The most likely value in words, and its range, if it has one."""
    value = fact.value
    if isinstance(value, str):
        return value, ""
    if not isinstance(value, Estimate):
        return in_unit(value, fact.unit), ""
    if value.low == value.high:
        return in_unit(value.typical, fact.unit), ""
    return in_unit(rounded(value.typical, fact.unit), fact.unit), between(value.low, value.high, fact.unit)


def _is_number(fact: Fact) -> bool:
    return not isinstance(fact.value, str)


def _ratio(first: Fact | None, second: Fact | None) -> str:
    a, b = (None if fact is None else _typical(fact) for fact in (first, second))
    return f"x {number(b / a)}" if a and b is not None else ""


def _typical(fact: Fact) -> float | None:
    value = fact.value.typical if isinstance(fact.value, Estimate) else fact.value
    return None if isinstance(value, str) else float(value)


def _wrapped(parts: Iterable[str], width: int = 100) -> list[str]:
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) + 3 > width:
            lines.append("")
        lines[-1] += ("   " if lines[-1] else "") + part
    return lines


def _lines(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
