"""pytest tests/planner/test_prices.py"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.config.hardware import DEVICES, find_device
from minga.errors import UserError
from minga.planner import prices
from minga.planner.estimate import Estimate
from minga.planner.grids import find_grid
from minga.planner.prices import Price, electricity, purchase, refresh, rental

TODAY = date(2026, 11, 25)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prices._fetched.cache_clear()
    yield tmp_path / "minga" / "prices.json"
    prices._fetched.cache_clear()


def offer(provider: str, name: str, memory: float | None, count: int, price: float, vendor: str = "nvidia") -> Any:
    return SimpleNamespace(
        provider=provider, gpu_name=name, gpu_memory=memory, gpu_count=count, price=price, gpu_vendor=vendor
    )


def install(monkeypatch: pytest.MonkeyPatch, offers: list[Any], error: Exception | None = None) -> None:
    class GPUHuntError(Exception):
        pass

    class Catalog:
        def __init__(self, *, auto_reload: bool) -> None:
            assert not auto_reload

        def load(self) -> None:
            if error:
                raise error

        def query(self, *, min_gpu_count: int, spot: bool) -> list[Any]:
            assert min_gpu_count == 1 and not spot
            return offers

    monkeypatch.setitem(sys.modules, "gpuhunt", SimpleNamespace(Catalog=Catalog, GPUHuntError=GPUHuntError))


def test_published_prices() -> None:
    h100, h800 = rental(find_device("H100")), rental(find_device("H800"))
    assert h100 and h100.value == Estimate(1.47, 2.95, 6.88) and h100.as_of == date(2026, 5, 20)
    assert h800 and h800.value.typical == 2.0 and "DeepSeek" in h800.sources[0]  # 2.788 M hours = USD 5.576 M
    assert h100.unit == "device-hour" and h100.currency == "USD"
    assert rental(find_device("M2 Max")) is None


def test_old_prices_are_known_as_old() -> None:
    h100, tpu = rental(find_device("H100")), rental(find_device("TPU v4"))
    assert h100 and not h100.is_old(TODAY) and h100.is_old(TODAY + timedelta(days=366))
    assert tpu and tpu.is_old(TODAY) and tpu.as_of == date(2024, 12, 23)


def test_every_row_of_the_table_is_sound() -> None:
    table = prices._shipped()
    used = set()
    for kind in ("rental", "purchase"):
        assert set(table[kind]) <= set(DEVICES)
    for code in table["electricity"]:
        assert code in prices._REGIONS or find_grid(code).code == code
    for kind in ("rental", "purchase", "electricity"):
        for key, row in table[kind].items():
            price = prices._price(kind, key, table)
            assert price and price.value.low > 0 and price.as_of <= TODAY and price.sources
            used |= set(row["sources"])
    assert used == set(table["sources"])


def test_a_bought_card_costs_its_price_over_its_life() -> None:
    card = purchase(find_device("3090"))
    assert card and card.value == Estimate(500, 800, 1000)
    assert card.per_hour(years=4, busy=0.5).typical == pytest.approx(800 / (2 * 8766))
    assert purchase(find_device("H100")) is None


@given(st.floats(0.1, 20), st.floats(0.01, 1))
def test_an_hour_costs_more_the_fewer_there_are(years: float, busy: float) -> None:
    price = Price(Estimate(500, 800, 1000), "device", TODAY, ())
    assert price.per_hour(years=years, busy=busy).low >= price.per_hour(years=2 * years, busy=busy).low
    assert price.per_hour(years=years, busy=busy / 2).high >= price.per_hour(years=years, busy=busy).high


@pytest.mark.parametrize("years, busy", [(0, 1), (-1, 1), (4, 0), (4, 1.1), (float("nan"), 1), (4, float("nan"))])
def test_impossible_lives(years: float, busy: float) -> None:
    with pytest.raises(UserError, match="price"):
        Price(Estimate.exactly(1), "device", TODAY, ()).per_hour(years=years, busy=busy)


def test_electricity() -> None:
    world, mexico = electricity(), electricity("Mexico")
    assert world and (world.value.low, world.value.high) == (0.161, 0.165)
    assert mexico and mexico.value == Estimate.exactly(0.05) and mexico.is_old(TODAY)
    assert electricity("europe") and electricity("MEX") == mexico
    assert electricity("Chile") is None
    with pytest.raises(UserError, match="Mexico"):
        electricity("Mexcio")


def test_a_fetched_catalogue_replaces_older_prices(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    install(
        monkeypatch,
        [
            offer("a", "H100", 80, 8, 16.0),
            offer("b", "H100", 80, 1, 3.0),
            offer("b", "H100", 80, 1, 5.0),
            offer("c", "H100", 80, 2, 14.0),
            offer("a", "A100", 40, 1, 1.0),
            offer("b", "A100", 40, 1, 3.0),
            offer("a", "MI325X", 288, 1, 2.0, "amd"),  # a size that only the catalogue knows
            offer("b", "MI325X", 288, 1, 2.5, "amd"),
            offer("a", "L4", 24, 1, 0.1),  # one provider is no market
            offer("a", "v5litepod-8", 0, 1, 9.0, "google"),
            offer("a", "NoSuchGPU", None, 1, 1.0),
            offer("a", "T4", 16, 1, 0.0),
        ],
    )
    before = rental(find_device("L4"))
    assert refresh(TODAY) == cache and list(cache.parent.iterdir()) == [cache]
    h100, a100, mi325x = (rental(find_device(name)) for name in ("H100", "A100 40GB", "MI325X"))
    assert h100 and h100.value == Estimate(2.0, 4.0, 7.0) and h100.as_of == TODAY and "gpuhunt" in h100.sources[0]
    assert a100 and a100.value == Estimate(1.0, 2.0, 3.0)
    assert mi325x and mi325x.value.typical == 2.25
    assert rental(find_device("L4")) == before
    assert set(json.loads(cache.read_text())["rental"]) == {"H100-SXM", "A100-SXM-40GB", "MI325X"}


def test_what_ships_wins_over_an_older_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [offer("a", "H100", 80, 1, 8.0), offer("b", "H100", 80, 1, 9.0)])
    shipped = rental(find_device("H100"))
    refresh(date(2024, 1, 1))
    assert rental(find_device("H100")) == shipped


def test_without_gpuhunt_or_a_network_the_table_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpuhunt", None)
    with pytest.raises(UserError, match="pip install gpuhunt"):
        refresh(TODAY)
    install(monkeypatch, [], OSError("no route to host"))
    with pytest.raises(UserError, match="no route to host"):
        refresh(TODAY)
    install(monkeypatch, [])
    with pytest.raises(UserError, match="no offers"):
        refresh(TODAY)
    assert rental(find_device("H100"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rental": {"H100-SXM": {"low": 2}}}', '{"rental": []'])
def test_a_broken_file_is_named(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_text(text)
    with pytest.raises(UserError, match="prices.json"):
        rental(find_device("H100"))


def test_a_cache_that_is_a_file_holds_no_prices(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    cache.parent.parent.mkdir(exist_ok=True)
    (cache.parent.parent / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent / "file"))
    assert rental(find_device("H100")) is not None
