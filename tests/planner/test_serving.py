"""pytest tests/planner/test_serving.py"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minga.config.hardware import Device, Machine, find_device, machine
from minga.config.presets import small, v2_lite, v3
from minga.errors import UserError
from minga.planner.counts import count_parameters, parameters_read, speculation_limit
from minga.planner.estimate import Estimate
from minga.planner.memory import WEIGHT_BYTES
from minga.planner.serving import Serving, serve_estimate

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import plan_serving

H800, ONE = machine("144xH800"), machine("1xH200")
ASKED: dict[str, Any] = {"utilization": 1.0, "prompt_tokens": 1000, "output_tokens": 500}


def serve(model: Any = None, machine: Machine = ONE, **changes: Any) -> Serving:
    return serve_estimate(plan_serving.MODELS["llama-3.1-8b"] if model is None else model, machine, **ASKED | changes)


# ---------------------------------------------------------------------------------------------- what is published


def test_deepseeks_day() -> None:
    """open-infra-index, day 6: 226.75 nodes, $87,072, $562,027, 545 %, each from the other figures within 1 %."""
    day = plan_serving.serving_day()
    assert day.nodes == pytest.approx(226.75, rel=0.01)
    assert day.cost == pytest.approx(87_072, rel=0.01)
    assert day.revenue == pytest.approx(562_027, rel=0.01)
    assert day.margin == pytest.approx(5.45, rel=0.01)


def test_a_day_with_a_tenth_of_the_tokens_on_the_same_nodes_costs_ten_times_as_much_a_token() -> None:
    full, idle = serve(utilization=1.0, price=Estimate(1, 2, 4)), serve(utilization=0.1, price=Estimate(1, 2, 4))
    assert full.cost is not None and idle.cost is not None
    assert idle.cost.blended.typical == pytest.approx(10 * full.cost.blended.typical)
    assert idle.decode == full.decode and idle.facts[0].value == 0.1


def test_published_rows() -> None:
    """The goal: nine of ten inside the printed range; a median error that we print in `minga bench plan`."""
    checked = list(plan_serving.check())
    assert len(checked) == 148
    for split, error in (("fit", 0.10), ("held", 0.20)):
        part = [c for c in checked if c.split == split]
        assert statistics.median(abs(c.error) for c in part) < error
        assert sum(c.inside for c in part) >= 0.9 * len(part)


def test_the_days_speeds_are_in_the_range_of_the_roofline() -> None:
    for predicted, published in plan_serving.node_speeds().values():
        assert predicted.low < published < predicted.high


def test_rows_of_the_benchmark() -> None:
    rows = {row["id"]: row for row in plan_serving.rows()}
    assert rows["plan/serving-day"]["ratio"] == pytest.approx(1, rel=0.01)
    assert {"plan/serving/fit", "plan/serving/held", "plan/serving-day/decode-node"} < rows.keys()


@pytest.mark.parametrize(
    ("model", "device", "ceiling"),
    [  # 0.7 of the bandwidth over the bytes of 4.5-bit weights, the rule of thumb
        ("qwen3-8b", Device("RTX-3090", "consumer", {"bf16": 71e12}, 24e9, 0.936e12), 142),
        ("qwen3-8b", Device("RTX-5090", "consumer", {"bf16": 209e12}, 32e9, 1.792e12), 272),
        ("qwen3-8b", Device("two channels of DDR5", "cpu", {"float32": 1e12}, 32e9, 0.09e12), 14),
        ("qwen3-30b-a3b", Device("RTX-3090", "consumer", {"bf16": 71e12}, 24e9, 0.936e12), 348),
        ("qwen3-30b-a3b", Device("two channels of DDR5", "cpu", {"float32": 1e12}, 32e9, 0.09e12), 33),
    ],
)
def test_one_user_of_a_small_machine(model: str, device: Device, ceiling: float) -> None:
    alone = serve(plan_serving.MODELS[model], Machine(device), weights="int4", batch=1, prompt_tokens=100)
    assert 0.5 * ceiling < alone.per_user.typical < 1.15 * ceiling
    assert alone.decode.limit == "memory"


# ---------------------------------------------------------------------------------------------- how it behaves


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 100_000),
    st.integers(1, 20_000),
    st.floats(0.01, 1.0),
    st.sampled_from(["bf16", "fp8", "int8", "int4"]),
)
def test_every_estimate_is_a_range(prompt: int, output: int, utilization: float, weights: str) -> None:
    found = serve(
        prompt_tokens=prompt, output_tokens=output, utilization=utilization, weights=weights, price=Estimate(1, 2, 3)
    )
    assert found.cost is not None
    for value in (found.per_user, found.cost.input, found.cost.output, found.cost.blended):
        assert 0 < value.low < value.typical < value.high
    assert found.utilization == utilization
    assert found.cost.blended.typical == pytest.approx(
        (prompt * found.cost.input.typical + output * found.cost.output.typical) / (prompt + output)
    )


def test_batches_share_the_weights() -> None:
    """The reason why a full server is cheap: 64 users get far more than one, each a little less."""
    one, many = serve(batch=1), serve(batch=64)
    assert many.decode.tokens_per_second.typical > 30 * one.decode.tokens_per_second.typical
    assert many.per_user.typical < one.per_user.typical


@pytest.mark.parametrize("target", [20.0, 50.0, 100.0])
def test_a_target_is_met_by_the_largest_batch_that_does(target: float) -> None:
    found = serve(target=target)
    assert found.per_user.typical >= target * (1 - 1e-9)
    assert found.decode.batch == serve().decode.batch or serve(batch=found.decode.batch + 1).per_user.typical < target


def test_fewer_bits_hold_more_users_and_serve_one_faster() -> None:
    found = [serve(weights=weights, batch=1).per_user.typical for weights in ("bf16", "fp8")]
    assert found == sorted(found)
    fits = [
        serve(v3(), H800, cache=cache, context=30_000, devices=32).decode.batch for cache in ("float32", "bf16", "fp8")
    ]
    assert fits == sorted(fits) and fits[2] > 3.5 * fits[0]


def test_experts_are_read_as_they_wake() -> None:
    """A step of one token reads a sixth of V2-Lite; of 64 tokens nearly all."""
    card = Machine(Device("card", "consumer", {"bf16": 1e15}, 80e9, 1e12))
    seconds = {
        b: serve(v2_lite(), card, weights="bf16", batch=b, context=100).facts[3].inputs["matrices_memory"]
        for b in (1, 64)
    }
    for batch, found in seconds.items():
        assert found == pytest.approx(2 * parameters_read(v2_lite(), batch) / 0.8e12)
    assert seconds[64] > 5 * seconds[1]


def test_guesses_help_one_user_and_not_a_full_machine() -> None:
    gains = []
    for batch in (144, 144 * 16, 144 * 128):
        found = serve(v3(), H800, acceptance=0.85, batch=batch, devices=144, context=2000)
        assert found.speculation is not None
        gains.append(found.speculation.typical)
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 1.3 > gains[-1]
    wrong = serve(v3(), H800, acceptance=0.0, batch=144, devices=144, context=2000)
    plain = serve(v3(), H800, batch=144, devices=144, context=2000)
    assert wrong.speculation is not None and wrong.speculation.typical < 1
    assert wrong.decode.seconds == plain.decode.seconds  # so it does not guess


def test_a_guess_gains_at_most_what_reading_parameters_allows() -> None:
    model = small().replace(num_nextn_predict_layers=1)
    slow = Machine(Device("cpu", "cpu", {"float32": 1e15}, 8e9, 2e10))
    found = serve(model, slow, weights="float32", cache="float32", batch=1, acceptance=0.8, context=1)
    assert found.speculation is not None
    assert found.speculation.typical == pytest.approx(speculation_limit(model, 0.8), rel=0.05)


def test_a_model_too_large_for_one_device_is_spread() -> None:
    found = serve(v3(), machine("32xH800"))
    assert found.decode.devices >= 16 and found.decode.parallel == "expert"
    dense = serve(plan_serving.MODELS["llama-3.3-70b"], machine("8xH800"), weights="bf16")
    assert dense.decode.devices in (4, 8) and dense.decode.parallel == "tensor"


@pytest.mark.parametrize("context", [100, 3000, 30_000])
@pytest.mark.parametrize("parallel", ["expert", "tensor"])
def test_a_full_device_holds_what_it_has(context: int, parallel: str) -> None:
    full = serve(v3(), machine("32xH800"), context=context, prompt_tokens=context, devices=32, parallel=parallel)
    memory = H800.device.memory
    assert full.memory.total <= 0.9 * memory
    assert full.memory.total > 0.85 * memory or full.decode.batch in (1024, 32 * 1024)  # as many as engines schedule


def test_what_guesses_is_in_memory_too() -> None:
    with_mtp, without = (
        serve(v3(), machine("8xH200"), acceptance=a, devices=8, parallel="tensor") for a in (0.85, None)
    )
    assert with_mtp.memory.weights > without.memory.weights
    assert with_mtp.memory.total <= 0.9 * find_device("H200").memory
    module = with_mtp.memory.weights - without.memory.weights
    assert module == pytest.approx(count_parameters(v3()).mtp * WEIGHT_BYTES["fp8"] / 8)


def test_the_verdict_is_on_what_must_be_there() -> None:
    full = serve(batch=100)
    assert full.needed == pytest.approx(full.memory.weights + full.memory.cache / 100)


def test_prompts_in_the_cache_are_cheap() -> None:
    half, none = serve(cached_share=0.5), serve()
    assert 1.8 < half.prefill.tokens_per_second.typical / none.prefill.tokens_per_second.typical < 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"utilization": 0}, "utilization is 0"),
        ({"utilization": 1.5}, "utilization is 1.5"),
        ({"weights": "int3"}, "'int3' is no number format .* int4"),
        ({"cache": "int4"}, "cache 'int4' is no number format"),
        ({"weights": "fp4"}, "multiplies no fp4"),
        ({"acceptance": 0.8}, "no multi-token prediction"),
        ({"model": v3(), "acceptance": 2}, "acceptance is 2"),
        ({"cached_share": 1}, "cached_share is 1"),
        ({"output_tokens": 0}, "each is 1 or more"),
        ({"prompt_tokens": float("nan")}, "each is 1 or more"),
        ({"target": 0}, "target is 0"),
        ({"target": 1e6}, "no batch gives 1e\\+06 tokens/s"),
        ({"batch": 100_000}, "100000 sequences do not fit"),
        ({"model": v3()}, "weights on each of 1 devices of 151 GB"),
        ({"devices": 2}, "the machine has 1"),
        ({"machine": Machine(Device("chip", "apple", {}, 64e9, 0.4e12))}, "chip computes is not known"),
        ({"parallel": "magic"}, "'magic' is not known"),
        (
            {"machine": Machine(Device("x", "cpu", {"float32": 1e12}, 1e9, 1e10), 2, 1), "devices": 2},
            "network between nodes",
        ),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        serve(**changes)
