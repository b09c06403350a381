"""What a kilowatt-hour emits, by country: grams of CO2 equivalent, over the life of the power plants, mean of a year.

    find_grid("CHL"), find_grid("de"), find_grid("South Korea"), find_grid()      # the last: the world's mean

A mean of a year hides night and day, and what one buys or builds oneself; where a meter or a contract says more, use that.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from minga.errors import UserError


@dataclass(frozen=True)
class Grid:
    """The electricity of a country."""

    code: str  # ISO 3166 alpha-3; empty for the world
    name: str
    grams: float  # CO2 equivalent of a kilowatt-hour
    year: int
    source: str


def find_grid(place: str | None = None) -> Grid:
    """By ISO code of two or three letters, or English name; the world without one. Raises `UserError` with the nearest names."""
    table = _table()
    if place is None or _key(place) in ("world", "wld"):
        return Grid("", **table["world"])
    if code := _codes().get(_key(place)):
        row, source = table["grids"][code], table["source"]
        cited = f"{source['title']}, {source['url']}, {source['date']}"
        return Grid(code, row["name"], row["grams"], row["year"], cited)
    near = difflib.get_close_matches(_key(place), _codes(), n=3, cutoff=0.6)
    names = [f"{table['grids'][code]['name']} ({code})" for code in dict.fromkeys(_codes()[key] for key in near)]
    hint = (
        f"the nearest: {', '.join(names)}"
        if names
        else "a country by its ISO code or English name, such as CHL or France"
    )
    raise UserError(f"{place!r} is no country of the table (grid). {hint}, or world")


@cache
def _table() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "grids.json").read_text(encoding="utf-8"))


@cache
def _codes() -> Mapping[str, str]:
    """Code of a country by each way to name it."""
    table = _table()
    codes = {}
    for code, row in table["grids"].items():
        for name in (code, row["iso2"], row["name"], *table["aliases"].get(code, ())):
            codes[_key(name)] = code
    return codes


def _key(name: str) -> str:
    """Without accents, case and whatever is no letter."""
    return "".join(c for c in unicodedata.normalize("NFKD", name[:100]).casefold() if c.isalpha())
