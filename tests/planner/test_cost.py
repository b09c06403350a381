"""pytest tests/planner/test_cost.py"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.errors import UserError
from minga.planner.cost import (
    Rates,
    carbon,
    energy,
    estimate_watts,
    measured_watts,
    rent,
    training_watts,
    with_development,
)
from minga.planner.estimate import Estimate

amounts = st.floats(0, 1e9)
exactly = Estimate.exactly


def ends(value: Estimate | None) -> tuple[float, float, float]:
    assert value is not None
    return value.low, value.typical, value.high


def test_an_hour_of_a_known_machine() -> None:
    rates = Rates(Estimate(500, 700, 1000), price_per_kwh=0.2, machine_price_per_hour=1.0, pue=1.5)
    assert ends(rates.kwh(3600)) == pytest.approx((0.75, 1.05, 1.5))
    assert ends(rates.money(3600)) == pytest.approx((1.15, 1.21, 1.3))
    assert ends(rates.price_per_million_tokens(3600, 500_000)) == pytest.approx((2.3, 2.42, 2.6))
    assert rates.price_per_million_tokens(3600, 0) is None


@given(amounts, amounts, amounts)
def test_cost_is_in_proportion_and_low_is_below_high(low: float, more: float, seconds: float) -> None:
    rates = Rates(Estimate.between(low, low + more))
    once, twice = rates.money(seconds), rates.money(2 * seconds)
    assert 0 <= once.low <= once.high
    assert (twice.low, twice.high) == (pytest.approx(2 * once.low), pytest.approx(2 * once.high))


@given(st.integers(1, 512), st.one_of(st.none(), st.floats(1, 1000)), st.one_of(st.none(), st.floats(1, 5000)))
def test_watts_are_a_range_that_grows_with_the_machine(cores: int, cpu: float | None, gpu: float | None) -> None:
    watts = estimate_watts(cores=cores, host_cores=1024, cpu_limit=cpu, gpu_limit=gpu)
    more = estimate_watts(cores=2 * cores, host_cores=1024, cpu_limit=cpu, gpu_limit=gpu)
    assert 0 < watts.low < watts.high
    assert watts.low < more.low and watts.high < more.high


def test_watts_of_a_machine() -> None:
    eight = estimate_watts(cores=8)
    assert eight.low == 28 and 142 <= eight.high <= 220  # a cloud's share to a desktop at its socket's limit
    half = estimate_watts(cores=4, host_cores=8, cpu_limit=100)
    assert half.low < 50 < half.high < 100
    assert estimate_watts(cores=16, host_cores=8, cpu_limit=100) == estimate_watts(cores=8, cpu_limit=100)
    assert estimate_watts(cores=8, gpu_limit=450).high == pytest.approx(eight.high + 675)


@pytest.mark.parametrize(
    "change",
    [
        {"watts": Estimate(-1, 0, 1)},
        {"watts": exactly(math.inf)},
        {"price_per_kwh": -0.1},
        {"machine_price_per_hour": math.nan},
        {"pue": 0.9},
        {"pue": math.nan},
    ],
)
def test_rates_that_are_none(change: dict) -> None:
    with pytest.raises(UserError, match=r"\(cost\)"):
        Rates(**{"watts": Estimate.between(1, 2)} | change)


@pytest.mark.parametrize("watts", [-1, math.inf, math.nan])
def test_a_meter_that_says_nothing(watts: float) -> None:
    with pytest.raises(UserError, match=r"\(cost\)"):
        measured_watts(watts)


# ---------------------------------------------------------------------------------------------- of a run


@pytest.mark.parametrize(
    ("hours", "gwh"),
    [(2.788e6, 2.2), (30.84e6, 26.0)],  # V3 at 0.65 kW, Llama 405B at its 0.7 kW limit; both with a PUE of 1.2
    ids=["deepseek-v3", "llama-3.1-405b"],
)
def test_energy_of_published_runs(hours: float, gwh: float) -> None:
    kwh = energy(exactly(hours), training_watts(700))
    assert kwh.low < gwh * 1e6 < kwh.high
    assert kwh.typical == pytest.approx(gwh * 1e6, rel=0.1)


def test_energy_of_bloom() -> None:
    """400 W a GPU-hour and nothing else, as its authors count."""
    alone = {"overhead": exactly(1), "pue": exactly(1)}
    assert energy(exactly(1_082_990), 400, **alone).typical == pytest.approx(433_196, rel=1e-5)
    assert carbon(exactly(433_196), 57).typical == pytest.approx(24_700, rel=0.001)


@pytest.mark.parametrize(
    ("million_hours", "tonnes"),
    [
        (1.3, 390),
        (6.4, 1900),
        (39.3, 11_390),
        (5.0, 1354),
        (2.38, 645),
    ],  # Llama 3 8B, 70B, 3.1 in all, 4 Scout, Maverick
)
def test_carbon_of_the_llama_cards(million_hours: float, tonnes: float) -> None:
    """Their hours at the power limit agree with one grid, 387 to 429 g/kWh."""
    kwh = energy(exactly(million_hours * 1e6), 700, overhead=exactly(1), pue=exactly(1))
    grams = tonnes * 1e6 / kwh.typical
    assert 386.5 < grams < 429
    assert carbon(kwh, grams).typical == pytest.approx(tonnes * 1000)


def test_money_of_rented_machines() -> None:
    assert rent(exactly(2.788e6), exactly(2.0)).typical == 5.576e6  # the figure that V3's report gives


@given(st.floats(0, 1e9))
def test_a_project_costs_twice_to_five_point_six_times_its_final_run(hours: float) -> None:
    project = with_development(exactly(hours))
    assert (project.low, project.high) == (pytest.approx(2 * hours), pytest.approx(5.6 * hours, rel=0.01))
