"""pytest tests/planner/test_cost.py"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.errors import UserError
from minga.planner.cost import Range, Rates, estimate_watts

amounts = st.floats(0, 1e9)


def test_an_hour_of_a_known_machine() -> None:
    rates = Rates(Range(500, 1000), price_per_kwh=0.2, machine_price_per_hour=1.0, pue=1.5)
    assert rates.kwh(3600) == Range(0.75, 1.5)
    assert rates.money(3600) == Range(1.15, 1.3)
    assert rates.price_per_million_tokens(3600, 500_000) == Range(2.3, 2.6)
    assert rates.price_per_million_tokens(3600, 0) is None


@given(amounts, amounts, amounts)
def test_cost_is_in_proportion_and_low_is_below_high(low: float, more: float, seconds: float) -> None:
    rates = Rates(Range(low, low + more))
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
        {"watts": Range(-1, 1)},
        {"watts": Range(2, 1)},
        {"watts": Range(0, math.inf)},
        {"price_per_kwh": -0.1},
        {"machine_price_per_hour": math.nan},
        {"pue": 0.9},
        {"pue": math.nan},
    ],
)
def test_rates_that_are_none(change: dict) -> None:
    with pytest.raises(UserError, match=r"\(cost\)"):
        Rates(**{"watts": Range(1, 2)} | change)
