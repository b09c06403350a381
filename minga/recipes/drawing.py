"""What the HTML pages of runs and plans share: one style, numbers on axes, cards, the frame around them, and the file.

A page holds no script and loads nothing, so it can be mailed, archived and opened in ten years; drawings are inline SVG
whose colours follow the reader's light or dark theme.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from minga.errors import UserError

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 28


@dataclass(frozen=True)
class Scale:
    """Data to pixels on one axis. `first` and `last` may be given in falling order: y grows upwards."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)


class LogScale(Scale):
    """Equal factors are equally far apart; `low` is above 0."""

    def __call__(self, value: float) -> float:
        return self.first + math.log(value / self.low) / math.log(self.high / self.low) * (self.last - self.first)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) from low to high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two that are above 0: 1, 2 and 5 times powers of ten, or of many powers themselves alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < 300 else (1,)
    found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
    return found if len(found) > 1 else ticks(low, high, 4)


def axes(columns: Iterable[tuple[float, str]], rows: Iterable[tuple[float, str]], *, height: float = HEIGHT) -> str:
    """Lines across, and numbers at the left and below. Each is (where it stands on its axis, label)."""
    lines = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
        for y, label in rows
    )
    return lines + "".join(
        f'<text x="{x:.1f}" y="{height - 8}" text-anchor="{"end" if x > WIDTH - 30 else "middle"}">{escape(label)}</text>'
        for x, label in columns
    )


def figure(
    title: str,
    drawn: str,
    *,
    said: str,
    height: float = HEIGHT,
    legend: Iterable[tuple[str, str]] = (),
    below: str = "",
) -> str:
    """A card with a drawing of WIDTH by `height`. said: what it shows, for those who cannot see it. legend: (name, CSS class).
    below: HTML, such as what is to be known about it.
    """
    keys = "".join(f'<span class="key {kind}">{escape(name)}</span>' for name, kind in legend)
    return (
        f'<figure><figcaption>{escape(title)}<span class="legend">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(said)}">{drawn}</svg>'
        f"{below}</figure>"
    )


def tiles(facts: Iterable[tuple[str, ...]]) -> str:
    """Big numbers, each (what it is, the number in words, and what belongs below it in small letters, if anything)."""
    return "".join(
        f"<div><dd>{escape(value)}{''.join(f'<small>{escape(text)}</small>' for text in small if text)}</dd>"
        f"<dt>{escape(name)}</dt></div>"
        for name, value, *small in facts
    )


def tabulate(rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """Cells are HTML, the first of each row its name. Nothing without rows."""
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for name, *cells in rows
    )
    return f'<table class="{kind}">{body}</table>' if body else ""


def section(title: str, *parts: str, kind: str = "") -> str:
    body = "".join(parts)
    return f'<section class="{kind}"><h2>{title}</h2>{body}</section>' if body else ""


def page(name: str, outcome: str, tiles: str, sections: Iterable[str], *, style: str = "") -> str:
    """style: CSS of this kind of page alone."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)} · Minga</title><style>{STYLE}{style}</style></head>\n<body><main>"
        f"<header><p>Minga · a model of your own, on the machines you have</p><h1>{escape(name)}</h1>"
        f'<p class="outcome">{outcome}</p></header>'
        f'<dl class="tiles">{tiles}</dl>\n' + "\n".join(part for part in sections if part) + "</main></body></html>\n"
    )


def write_page(path: Path, text: str) -> Path:
    """A reader never sees half of it. Raises `UserError` when it cannot be written."""
    temporary: str | None = None
    if path.exists() and not path.is_file():  # renaming would put a file in the place of a pipe or a device
        raise UserError(f"cannot write {path}: it is no regular file (page). give the name of a file")
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 would hide the page from a web server
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        why = error.strerror if isinstance(error, OSError) else error
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        mend = "free some space" if full else "check the name and the rights"
        raise UserError(f"cannot write {str(path)!r:.100}: {why} (page). {mend}") from None
    return path


STYLE = """
:root { color-scheme: light dark; --paper: #faf8f4; --card: #fffefb; --sunk: #f2eee6; --line: #e2dccf; --ink: #23282b;
  --soft: #667069; --teal: #0d7468; --amber: #b45f06; --blue: #2f6fa8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181a; --card: #1b2023; --sunk: #22282b; --line: #31393c;
  --ink: #e9e5dc; --soft: #9aa5a0; --teal: #62c9b6; --amber: #e8a75a; --blue: #78b2e4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: clamp(20px, 5vw, 56px) clamp(14px, 4vw, 32px) 64px; }
header p, .outcome { margin: 0; color: var(--soft); }
h1 { margin: 2px 0; font-size: clamp(1.6rem, 5vw, 2.4rem); line-height: 1.2; letter-spacing: -.02em; }
h2 { margin: 30px 0 14px; font-size: 1.2rem; letter-spacing: -.01em; grid-column: 1 / -1; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 180px), 1fr)); gap: 10px;
  margin: 26px 0 0; }
.tiles div, figure, table, blockquote { background: var(--card); border: 1px solid var(--line); border-radius: 14px; }
.tiles div { padding: 12px 16px; }
dd { margin: 0; font-size: 1.25rem; white-space: nowrap;
  font-weight: 620; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
dd small { display: block; white-space: normal; font-size: .8rem; font-weight: 400; letter-spacing: 0; line-height: 1.3;
  color: var(--teal); }
dt { font-size: .84rem; color: var(--soft); line-height: 1.35; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 18px; }
.pair figure { margin: 0 0 18px; align-self: start; }
figure { padding: 14px 16px; min-width: 0; container-type: inline-size; }
.note { margin: 10px 0 0; font-size: .82rem; line-height: 1.45; color: var(--soft); }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 16px; justify-content: space-between; font-weight: 600;
  font-size: .95rem; margin-bottom: 10px; }
.legend { display: flex; flex-wrap: wrap; gap: 0 14px; font-weight: 400; font-size: .82rem; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 12px; height: 3px; border-radius: 2px; margin: 0 6px 3px 0;
  background: var(--teal); }
.key.held::before, .key.dots::before { background: var(--amber); }
.key.cold::before { background: var(--blue); }
svg { display: block; width: 100%; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); }
.curve { fill: none; stroke: var(--teal); stroke-width: 2; stroke-linejoin: round; }
.curve.raw { stroke-width: 1; opacity: .3; }
.curve.held { stroke: var(--amber); }
circle { fill: var(--teal); }
circle.held, circle.dots, .hot { fill: var(--amber); }
.cold { fill: var(--blue); }
.cell { fill: var(--sunk); }
blockquote { margin: 0 0 12px; padding: 12px 18px; }
blockquote small { color: var(--soft); }
blockquote p { margin: 2px 0 0; white-space: pre-wrap; font-family: Georgia, "Noto Serif", "DejaVu Serif", serif; }
blockquote b { color: var(--teal); }
table { width: 100%; border-collapse: separate; border-spacing: 0; padding: 6px 16px; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: 5px 8px 5px 0; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
th { font-weight: 400; color: var(--soft); width: 45%; }
.plan th { width: 24%; }
.plan td:nth-child(2) { width: 14%; }
small { color: var(--soft); }
td { font-variant-numeric: tabular-nums; }
/* The drawing shrinks, its words must not. */
@container (min-width: 800px) { svg text { font-size: 9px; } }
@container (max-width: 560px) { svg text { font-size: 15px; } }
@container (max-width: 420px) { svg text { font-size: 20px; } }
@media print { figure, blockquote, .tiles div { break-inside: avoid; } }
"""
