"""pytest tests/planner/test_words.py: numbers, tables and amounts as people read and write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.config.hardware import machine
from minga.config.presets import laptop, v2_lite
from minga.config.units import parse_bytes, parse_count, parse_link
from minga.errors import UserError
from minga.planner.estimate import Estimate
from minga.planner.plan import plan
from minga.planner.table import compare, explain, memory_bar, table
from minga.planner.words import batches, between, count, duration, in_unit, machine_words, number, size, spread


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (number(0.00123), "0.00123"),
        (number(99.96), "100"),
        (number(12345.6), "12,346"),
        (count(37_552_282_624), "37.6 B"),
        (count(999_960_000), "1,000 M"),
        (count(83_988), "83,988"),
        (size(70_272), "70.3 kB"),
        (size(85.9e9), "85.9 GB"),
        (size(12), "12 B"),
        (duration(0.0123), "12.3 ms"),
        (duration(61), "61 s"),
        (duration(7200), "2 h"),
        (duration(86400 * 40), "40 days"),
        (in_unit(2.6e11, "FLOP"), "260 GFLOP"),
        (in_unit(0.324, "share"), "32.4 %"),
        (in_unit(5.82e6, "USD"), "USD 5.82 M"),
        (in_unit(0.4, "USD"), "USD 0.40"),
        (in_unit(0.000085, "USD"), "USD 0.000085"),
        (in_unit(2.16e11, "kg"), "216 Mt"),
        (spread(Estimate(29_507, 49_179, 68_851), "tokens/s"), "49,200 tokens/s (29,500 - 68,900 tokens/s)"),
        (in_unit(1.5, "days"), "36 h"),
        (in_unit(3.72e6, "kWh"), "3.72 GWh"),
        (between(12, 1234.0, "kg"), "12 kg - 1.23 t"),
        (between(2e-5, 7e-5, "kWh"), "0.02 - 0.07 Wh"),
        (batches(1, 8, 1024), "1 micro-batch of 8 x 1,024"),
        (in_unit(2.5e6, "tokens/s"), "2.5 M tokens/s"),
        (between(1.36e6, 3.63e6, "tokens/s"), "1.36 - 3.63 M tokens/s"),
        (between(5.8e6, 2.9e7, "USD"), "USD 5.8 M - 29 M"),
        (between(50, 7200, "s"), "50 s - 2 h"),
        (spread(Estimate(1, 2, 4), "USD"), "USD 2.00 (USD 1.00 - 4.00)"),
        (spread(Estimate.exactly(3.0)), "3"),
        (machine_words(machine("H100")), "H100-SXM"),
        (machine_words(machine("2048xH800")), "2,048 x H800 (256 nodes of 8)"),
    ],
)
def test_numbers_in_words(said: str, expected: str) -> None:
    assert said == expected


@given(st.floats(1, 9e14))
def test_a_count_that_was_written_is_read_again(value: float) -> None:
    written = count(value, 15).replace(" ", "").lower()
    assert parse_count(written, "--tokens") == pytest.approx(round(value), rel=1e-9, abs=1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("14.8t", 14_800_000_000_000),
        ("14.8e12", 14_800_000_000_000),
        ("10M", 10_000_000),
        ("1,000", 1000),
        ("2g", 2 * 10**9),
    ],
)
def test_counts(text: str, value: int) -> None:
    assert parse_count(text, "--tokens") == value


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan", "inf", "1e99", "0.5", "1..2", "1ee3", "9" * 50])
def test_what_is_no_count(text: str) -> None:
    with pytest.raises(UserError, match=r"is no number of tokens \(--tokens\)"):
        parse_count(text, "--tokens")


def test_sizes_and_links() -> None:
    assert parse_bytes("1.5GiB", "memory") == 1.5 * 2**30
    assert (parse_link("20Mbit", "--up"), parse_link("1.5Gbit/s", "--up"), parse_link("3MB/s", "--up")) == (
        2.5e6,
        187.5e6,
        3e6,
    )
    for text in ("", "20", "0Mbit", "-3Mbit", "nanMbit", "20Tbit"):
        with pytest.raises(UserError, match=r"no speed of a link \(--up\)"):
            parse_link(text, "--up")


@given(st.lists(st.floats(1, 1e12), min_size=1, max_size=7), st.floats(1, 1e12))
def test_a_bar_is_as_long_as_the_memory(values: list[float], available: float) -> None:
    line, *legend = memory_bar({f"part{i}": value for i, value in enumerate(values)}, available)
    inside = line[1 : line.index("]")]
    over = line[line.index("]") + 1 :]
    assert (sum(values) <= available) <= (len(over.rstrip()) <= len(values))  # a shade each part, however small
    assert len(inside) <= 57 and "█" in line and legend


def test_the_table_names_sections_values_and_notes() -> None:
    made = plan(v2_lite(), "8xH100", tokens=1e10)
    text = table(made)
    for words in (
        "deepseek_v2 on 8 x H100-SXM",
        "parameters",
        "15.7 B",
        "device-hours",
        "rent of the final run",
        "utilisation",
    ):
        assert words in text
    assert text.count("\n! ") == len(made.notes)
    assert max(map(len, text.splitlines())) <= 120


def test_two_plans_side_by_side() -> None:
    text = compare([plan(v2_lite(), "8xH100", tokens=1e10), plan(v2_lite(), "16xH100", tokens=1e10)])
    assert next(line for line in text.splitlines() if line.startswith("parameters")).endswith("x 1")
    assert "16 x H100-SXM" in text.splitlines()[0]


def test_one_number_is_explained_or_all_of_a_section() -> None:
    made = plan(laptop(), "8xH100", tokens=1e10)
    one = explain(made, "train.gpu_hours")
    assert "formula" in one and "source" in one and "steps" in one
    assert explain(made, "train").count("train.") > 5
    with pytest.raises(UserError, match=r"no 'train.gpuhours' \(--explain\). it has train.gpu_hours"):
        explain(made, "train.gpuhours")
