"""pytest tests/planner/test_grids.py"""

from __future__ import annotations

import pytest

from minga.errors import UserError
from minga.planner import grids
from minga.planner.grids import find_grid


@pytest.mark.parametrize(
    "code, grams",  # codecarbon's file of 2023
    [
        *(("SWE", 41), ("FRA", 56), ("BRA", 98), ("ESP", 174), ("GBR", 238), ("COL", 260), ("CHL", 291), ("ITA", 331)),
        *(("ARG", 354), ("USA", 369), ("DEU", 381), ("MEX", 507), ("CHN", 582), ("POL", 662), ("IND", 713)),
    ],
)
def test_published_figures(code: str, grams: float) -> None:
    grid = find_grid(code)
    assert round(grid.grams) == grams and grid.year == 2023 and "codecarbon" in grid.source


def test_the_world_is_the_default() -> None:
    assert find_grid() == find_grid("World")
    assert (find_grid().grams, find_grid().year, find_grid().code) == (475, 2018, "")


@pytest.mark.parametrize(
    "place, code",
    [
        *(("chl", "CHL"), ("de", "DEU"), (" South Korea ", "KOR"), ("UK", "GBR"), ("Cote d'Ivoire", "CIV")),
        *(
            ("Côte d’Ivoire", "CIV"),
            ("Türkiye", "TUR"),
            ("united states", "USA"),
            ("US", "USA"),
            ("GUINEA-BISSAU", "GNB"),
        ),
    ],
)
def test_ways_to_name_a_country(place: str, code: str) -> None:
    assert find_grid(place).code == code


def test_all_countries_are_found_by_each_of_their_names() -> None:
    rows = grids._table()["grids"]
    assert len(rows) > 200
    for code, row in rows.items():
        assert 0 < row["grams"] < 1500
        assert all(find_grid(name).code == code for name in (code, code.lower(), row["iso2"], row["name"]))


@pytest.mark.parametrize(
    "place, message", [("Frnace", "France"), ("", "ISO code"), ("x" * 10**6, "ISO code"), ("Chili", "CHL")]
)
def test_unknown_places(place: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_grid(place)
