"""The time of a step: what physics demands, and the figures that others published."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.config.hardware import Device, Machine, devices, find_device, machine
from minga.config.presets import v3
from minga.errors import UserError
from minga.planner.setup import Setup
from minga.planner.time import (
    BOUNDS,
    FAMILIES,
    SHIPPED,
    Measured,
    calibrate,
    coefficients_of,
    ideal_times,
    least_squares,
    run_time,
    shares_of,
    shipped,
    step_time,
    work_of,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fit

LLAMA = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008,
}  # fmt: skip
SIZES = st.integers(0, 4).map(lambda n: 2**n)
LAYOUTS = st.builds(
    Setup,
    seq_len=st.sampled_from([512, 2048, 8192]),
    micro_batch=SIZES,
    accumulate=SIZES,
    dp=SIZES,
    tp=st.sampled_from([1, 2, 8]),
    pp=st.sampled_from([1, 2, 4]),
    shard=st.sampled_from([0, 1, 2, 3]),
    precision=st.sampled_from(["bf16", "fp8"]),
    recompute=st.sampled_from(["none", "selective", "full"]),
)
DEVICES = st.sampled_from(["A100-SXM-80GB", "H100-SXM", "B200", "RTX-4090"]).map(find_device)


def on(device: Device, setup: Setup) -> Machine:
    return Machine(device, setup.devices, min(8, setup.devices), 50e9)


def seconds(setup: Setup, device: Device, model: object = None) -> float:
    return step_time(model or LLAMA, setup, on(device, setup)).total.typical  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- physics


@given(LAYOUTS, DEVICES)
def test_parts_add_up_to_the_total_and_none_is_negative(setup: Setup, device: Device) -> None:
    step = step_time(LLAMA, setup, on(device, setup))
    assert min(step.parts.values()) >= 0
    assert sum(step.parts.values()) == pytest.approx(step.total.typical)
    assert step.total.low < step.total.typical < step.total.high


@given(LAYOUTS, DEVICES)
def test_no_step_is_faster_than_the_peak(setup: Setup, device: Device) -> None:
    work = work_of(LLAMA, setup.seq_len)
    flops = 6 * (work.dense + work.scores) * setup.step_tokens / setup.devices
    assert seconds(setup, device) > flops / device.rate(setup.precision)


@given(LAYOUTS, DEVICES)
def test_more_work_takes_longer(setup: Setup, device: Device) -> None:
    base = seconds(setup, device)
    assert seconds(replace(setup, accumulate=2 * setup.accumulate), device) > base
    assert seconds(replace(setup, micro_batch=2 * setup.micro_batch), device) > base
    assert seconds(replace(setup, seq_len=2 * setup.seq_len), device) > base
    assert seconds(setup, device, LLAMA | {"num_hidden_layers": 64}) > base
    assert seconds(setup, device, LLAMA | {"intermediate_size": 16384}) > base
    if setup.recompute != "full":
        assert seconds(replace(setup, recompute="full"), device) > base


@given(LAYOUTS, DEVICES)
def test_a_longer_sequence_costs_more_a_token(setup: Setup, device: Device) -> None:
    longer = replace(setup, seq_len=2 * setup.seq_len)
    assert seconds(longer, device) / longer.step_tokens > 0.5 * seconds(setup, device) / setup.step_tokens
    work, twice = (work_of(LLAMA, s.seq_len) for s in (setup, longer))
    assert twice.scores == pytest.approx(2 * work.scores, rel=0.01)


@given(LAYOUTS, DEVICES)
def test_more_devices_are_not_slower_at_the_same_work_but_for_traffic(setup: Setup, device: Device) -> None:
    """Of 2 x accumulate micro-batches, each of twice as many ranks does half."""
    few, many = replace(setup, accumulate=2 * setup.accumulate), replace(setup, dp=2 * setup.dp)
    assert few.step_tokens == many.step_tokens
    slow, fast = (step_time(LLAMA, s, on(device, s)).parts for s in (few, many))
    for part in slow.keys() - {"data", "bubble"}:
        assert fast[part] <= slow[part] * (1 + 1e-9), part


@given(LAYOUTS, DEVICES)
def test_traffic_hides_behind_no_more_than_there_is(setup: Setup, device: Device) -> None:
    wire = replace(device, link=1e6, network=1e6)
    cut = Machine(wire, setup.devices, min(8, setup.devices), 1e6)
    ideal = ideal_times(work_of(LLAMA, setup.seq_len), setup, cut)
    traffic = ideal["data"] + ideal["tensor"]
    assert step_time(LLAMA, setup, cut).total.typical >= 0.999 * traffic


def test_a_ring_over_nodes_has_all_network_cards_of_a_node() -> None:
    """The most damaging mistake: 16 devices in two nodes with one card's bandwidth each."""
    setup = Setup(seq_len=2048, dp=16, shard=3)
    device, work = find_device("H100"), work_of(LLAMA, 2048)
    inside = ideal_times(work, setup, Machine(device, 16, 16))["data"]
    slow, fast = (ideal_times(work, setup, Machine(device, 16, 8, speed))["data"] for speed in (50e9, 400e9))
    latency = 3 * 32 * 1e-5
    assert slow - latency == pytest.approx(8 * (fast - latency), rel=1e-3)
    assert fast == pytest.approx(inside * 450 / 400 + latency, rel=1e-3)


def test_experts_of_limited_groups_reach_fewer_nodes() -> None:
    device = find_device("H800")
    setup = Setup(seq_len=4096, dp=128, pp=16, ep=64, accumulate=64, shard=1, precision="fp8")
    limited, free = v3(), v3().replace(n_group=1, topk_group=1)
    times = [
        ideal_times(work_of(config, 4096), setup, Machine(device, 2048, 8, device.network))["routing"]
        for config in (limited, free)
    ]
    assert 0.6 < times[0] / times[1] < 0.8


def test_low_rank_training_costs_two_thirds_of_the_products() -> None:
    full, lora = Setup(seq_len=2048, micro_batch=4), Setup(seq_len=2048, micro_batch=4, lora_rank=16)
    one = Machine(find_device("RTX-4090"))
    times = [ideal_times(work_of(LLAMA, 2048), setup, one) for setup in (full, lora)]
    assert times[1]["linear"] / times[0]["linear"] == pytest.approx(2 / 3)
    assert times[1]["optimizer"] < times[0]["optimizer"] / 100


def test_ranks_share_the_optimizer_s_work_on_experts_too() -> None:
    """However experts are spread, each of 64 ranks updates a 64th of all."""
    device = find_device("H800")
    setups = [Setup(seq_len=4096, dp=64, ep=ep, shard=1) for ep in (1, 8, 64)]
    times = [ideal_times(work_of(v3(), 4096), s, Machine(device, 64, 8, device.network))["optimizer"] for s in setups]
    assert times == pytest.approx([times[0]] * 3)


def test_nodes_without_a_known_network_are_refused() -> None:
    card = replace(find_device("RTX-4090"), network=None)
    with pytest.raises(UserError, match="need a network"):
        step_time(LLAMA, Setup(seq_len=2048, dp=4), Machine(card, 4, 2))


# ----------------------------------------------------------------------------------------------------------- published


def test_the_shipped_coefficients_are_what_the_rows_say() -> None:
    said, found = json.loads(SHIPPED.read_text()), fit.document()
    assert said["runs"] == pytest.approx(found["runs"], rel=5e-3)
    assert said["families"].keys() == found["families"].keys()
    for name, family in found["families"].items():
        assert said["families"][name]["source"] == family["source"]
        assert said["families"][name]["terms"] == pytest.approx(family["terms"], rel=5e-3, abs=1e-7)
        for kind in ("dense", "sparse"):
            assert said["families"][name][kind] == pytest.approx(family[kind], rel=5e-3)


def test_families_are_of_devices_in_the_table() -> None:
    members = [name for family in FAMILIES.values() for name in family]
    assert set(FAMILIES) <= set(members) <= set(devices()) and len(members) == len(set(members))


def test_shipped_coefficients_are_physical() -> None:
    for family in (*FAMILIES, "other"):
        terms = shipped()["families"][family]["terms"]
        for term, (low, high) in BOUNDS.items():
            assert low <= terms[term] <= high


def test_a_device_has_its_family_s_coefficients_and_an_unknown_one_a_wider_doubt() -> None:
    assert coefficients_of(find_device("H800")).terms == coefficients_of(find_device("H100")).terms
    known, other = coefficients_of(find_device("H100")), coefficients_of(find_device("RTX-4090"))
    assert other.dense[1] / other.dense[0] > known.dense[1] / known.dense[0]


def test_every_row_of_the_files_is_read() -> None:
    assert len(fit.foundry()) == 216 and sum(row.precision == "bf16" for row in fit.foundry()) == 209
    assert {row.source for row in fit.others()} == {"megatron", "torchtitan"}
    assert len(fit.lines("runs.csv")) >= 50 and all(r["source"] for r in fit.lines("runs.csv"))


def test_foundry_goals() -> None:
    out, large = (statistics.fmean(map(abs, found)) for found in (fit.leave_one_model_out(), fit.large_from_small()))
    assert out <= 0.09 and large <= 0.07


def test_an_unknown_device_after_three_measured_steps() -> None:
    before, after = (statistics.fmean(map(abs, fit.unseen_device(n))) for n in (0, 3))
    assert after <= 0.09 < before


def test_v3_hours_without_any_row_of_that_model() -> None:
    ours, published = fit.v3_hours()
    assert abs(ours / published - 1) <= 0.10


def test_published_runs_lie_between_low_and_high() -> None:
    fits = {name: family["terms"] for name, family in shipped()["families"].items()}
    found = [fit.run_error(run, fits, shipped()["runs"]) for run in fit.runs(fits) if run.use == "held out"]
    assert len(found) >= 20
    assert sum(inside for _, inside in found) >= 0.9 * len(found)
    assert statistics.median(abs(error) for error, _ in found) < 0.2


def test_a_run_s_hours_follow_from_its_steps() -> None:
    setup, eight = Setup(seq_len=2048, micro_batch=4, accumulate=4, dp=8, shard=3), machine("8xH100")
    run = run_time(LLAMA, setup, eight, 1e12)
    step = step_time(LLAMA, setup, eight).total.typical
    assert run.gpu_hours.typical == pytest.approx(1e12 / setup.step_tokens * step * 8 / 3600)
    assert run.billed is not None and run.gpu_hours.low <= run.billed.low < run.gpu_hours.typical < run.billed.typical
    assert run.billed.high <= run.gpu_hours.high
    assert run.days.typical == pytest.approx(run.gpu_hours.typical / 8 / 24)
    assert run_time(LLAMA, setup, eight, 2e12).gpu_hours.typical == pytest.approx(2 * run.gpu_hours.typical)


# --------------------------------------------------------------------------------------------------------- calibration


def measured(factor: float, setups: list[Setup], device: Device) -> list[Measured]:
    return [Measured(LLAMA, s, on(device, s), factor * seconds(s, device)) for s in setups]


@given(st.floats(0.5, 5), DEVICES)
def test_a_machine_that_is_slower_by_one_factor_is_found_from_one_step(factor: float, device: Device) -> None:
    found = calibrate(measured(factor, [Setup(seq_len=2048, micro_batch=4)], device))
    other = Setup(seq_len=1024, micro_batch=8)
    expected = factor * seconds(other, device)
    assert step_time(LLAMA, other, on(device, other), coefficients=found).total.typical == pytest.approx(
        expected, rel=0.02
    )


def test_calibration_moves_a_term_that_the_steps_determine() -> None:
    """Attention twice as slow, seen at four lengths; the others stay nearly where they were."""
    device = find_device("H100")
    setups = [Setup(seq_len=n, micro_batch=32768 // n) for n in (1024, 4096, 16384, 32768)]
    start = coefficients_of(device)
    slower = replace(start, terms={**start.terms, "attention": 0.6 * start.terms["attention"]})
    rows = [
        Measured(LLAMA, s, on(device, s), step_time(LLAMA, s, on(device, s), coefficients=slower).total.typical)
        for s in setups
    ]
    found = calibrate(rows)
    for row in rows:
        predicted = step_time(LLAMA, row.setup, row.machine, coefficients=found).total.typical
        assert predicted == pytest.approx(row.seconds, rel=0.05)
    assert found.terms["attention"] < 0.75 * start.terms["attention"]


def test_nothing_measured_calibrates_nothing() -> None:
    with pytest.raises(UserError, match="no measured step"):
        calibrate([])


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=2, max_size=6))
def test_least_squares_is_within_bounds_and_no_worse_than_where_it_started(rows: list[tuple[float, float]]) -> None:
    shares = [{"a": a, "b": b} for a, b in rows]
    bounds = {"a": (0.5, 2.0), "b": (0.0, 1.0)}

    def loss(c: dict[str, float]) -> float:
        return sum((c["a"] * a + c["b"] * b - 1) ** 2 for a, b in rows)

    start = {"a": 1.0, "b": 0.5}
    found = least_squares(shares, bounds, start)
    assert all(low <= found[term] <= high for term, (low, high) in bounds.items())
    assert loss(found) <= loss(start) + 1e-9


def test_shares_are_ideal_times_of_the_measured_one() -> None:
    row = measured(1.0, [Setup(seq_len=2048)], find_device("H100"))[0]
    terms = coefficients_of(find_device("H100")).terms
    assert sum(terms[term] * share for term, share in shares_of(row).items()) == pytest.approx(1.0)
