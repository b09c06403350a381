"""Ways to fit a run and a server into memory: each really fits, the cheapest comes first, and flags say just what changed."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minga.config import PRESETS, TrainConfig
from minga.config.presets import laptop, small, tiny
from minga.errors import UserError
from minga.planner.counts import count_parameters
from minga.planner.own_memory import SERVE_PROCESS, own_training_memory
from minga.planner.own_plan import check_fits, ways_to_train
from minga.planner.own_server import Served, Serving, check_serves, needed_to_serve, serving_loads, ways_to_serve

RUN = TrainConfig(model=small(), steps=10, batch_size=16, seq_len=512)
PRESETS_OF_OURS = {name: PRESETS[name]() for name in ("tiny", "laptop", "small")}


@given(st.floats(0.05, 1.5), st.integers(1, 32), st.sampled_from([64, 256, 512]), st.booleans())
@settings(deadline=None, max_examples=40)
def test_each_way_fits_and_is_what_its_flags_say(share: float, batch: int, seq_len: int, resuming: bool) -> None:
    run = dataclasses.replace(RUN, batch_size=batch, seq_len=seq_len)
    free = share * own_training_memory(run).total
    for changed, flags in ways_to_train(run, free, presets=PRESETS_OF_OURS, resuming=resuming):
        assert own_training_memory(changed).total <= free
        assert changed.batch_size * changed.accumulate * changed.seq_len >= run.batch_size * run.seq_len
        values = dict(flag.split("=") for flag in flags.split() if "=" in flag)
        for key, text in values.items():
            assert str(getattr(changed, key)).lower() == text
        same = {f.name for f in dataclasses.fields(run)} - values.keys() - {"model"}
        assert all(getattr(changed, key) == getattr(run, key) for key in same)
        assert ("--preset" in flags) == (changed.model != run.model)
        assert not resuming or values.keys() <= {"recompute"}


def test_a_smaller_batch_comes_first_and_a_smaller_model_last() -> None:
    total = own_training_memory(RUN).total
    assert ways_to_train(RUN, 2 * total) == []
    first, *_ = ways_to_train(RUN, total * 0.9, presets=PRESETS_OF_OURS)
    assert first[1].startswith("--set batch_size=")
    last = ways_to_train(RUN, own_training_memory(dataclasses.replace(RUN, model=laptop(), batch_size=1)).total * 1.3)
    assert all("--preset" not in flags for _, flags in last)


def test_what_is_said_before_a_run() -> None:
    total = own_training_memory(RUN).total
    assert check_fits(RUN, 2 * total, lambda: pytest.fail("asked")) is None
    assert "little is left" in (check_fits(RUN, 1.1 * total, lambda: pytest.fail("asked")) or "")
    with pytest.raises(UserError, match="a, or b would fit; --force"):
        check_fits(RUN, 0.9 * total, lambda: ["a", "b"])
    with pytest.raises(UserError, match="no change of settings"):
        check_fits(RUN, 0.9 * total, list)


# ---------------------------------------------------------------------------------------------- servers

NUMBERS = count_parameters(small()).total_with_mtp
FLOATS, HALF = Served("floats", small(), 4.0 * NUMBERS), Served("half", small(), 2.0 * NUMBERS)


def test_weights_that_memory_does_not_hold_stay_on_the_disk() -> None:
    how, free = Serving(), SERVE_PROCESS + 1e9
    (load,) = serving_loads([HALF], how, 4 * free)
    assert not load.on_disk
    (load,) = serving_loads([FLOATS], how, free)
    assert load.on_disk
    assert needed_to_serve([load], how) < free
    assert any("stay on the disk" in line for line in check_serves([FLOATS], how, free))  # said, and not refused
    assert any("--quant" in flags for _, flags in ways_to_serve([HALF], how, 2e9))


def test_rounding_that_memory_cannot_do_is_refused() -> None:
    with pytest.raises(UserError, match=r"the server needs about .* --force starts it anyway"):
        check_serves([FLOATS], Serving(quant="int8"), SERVE_PROCESS + 1e8)


@given(st.floats(3.5e8, 5e9), st.sampled_from([None, "int8"]), st.integers(1, 64), st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_ways_to_serve_change_something(free: float, quant: str | None, running: int, num: int) -> None:
    models = [dataclasses.replace(FLOATS, name=f"m{n}") for n in range(num)]
    how = Serving(quant=quant, max_running=running)
    for changed, flags in ways_to_serve(models, how, free):
        assert needed_to_serve(serving_loads(models, changed, free), changed) <= free
        assert changed != how
        assert flags.startswith("--")


def test_several_models_share_one_process() -> None:
    model = Served("tiny", tiny(), 1e6)
    one, two = (needed_to_serve(serving_loads([model] * n, Serving(), 8e9), Serving()) for n in (1, 2))
    assert two - SERVE_PROCESS == pytest.approx(2 * (one - SERVE_PROCESS))
    many = Serving(replicas=3)
    assert needed_to_serve(serving_loads([model], many, 8e9), many) == 3 * one


@pytest.mark.parametrize("change", [{"max_running": 0}, {"replicas": -1}])
def test_nobody_is_not_served(change: dict[str, int]) -> None:
    with pytest.raises(UserError, match="it must be 1 or more"):
        Serving(**change)
