"""The dial is a pure function: what it chooses follows the budget, the machine and the corpus, and each choice says why."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from minga.config import ModelConfig, TrainConfig
from minga.config.presets import laptop, tiny
from minga.config.units import parse_bytes
from minga.errors import UserError
from minga.planner.counts import count_parameters, forward_flops, muon_flops
from minga.planner.dial import (
    TOKENS_PER_PARAMETER,
    Budget,
    Corpus,
    Decisions,
    MachineSpeed,
    architecture,
    choose,
)
from minga.planner.memory import GREEN

SPEED = MachineSpeed(((128, 30e9), (384, 60e9)), memory=20 * 10**9)
CORPUS = Corpus(tokens=10**8, vocab_size=4096, tokens_per_document=700.0)


def plan(budget: Budget, speed: MachineSpeed = SPEED, corpus: Corpus = CORPUS) -> Decisions:
    return Decisions({}, tuple(choose(budget, speed, corpus)))


def model_of(made: Decisions) -> ModelConfig:
    return laptop().replace(vocab_size=CORPUS.vocab_size, **made.values("model."))


def value(made: Decisions, name: str) -> object:
    (found,) = [choice.value for choice in made.choices if choice.name == name]
    return found


def test_every_choice_has_a_value_a_formula_and_a_source_and_makes_a_run() -> None:
    made = plan(Budget(seconds=3600))
    assert all(choice.formula and choice.source and choice.value is not None for choice in made.choices)
    assert len({choice.name for choice in made.choices}) == len(made.choices)
    config = TrainConfig(model=model_of(made), hours=1.0, **made.values())
    assert config.seq_len <= config.model.max_position_embeddings
    assert {"batch_size", "accumulate", "seq_len", "lr_matrix", "lr_embedding", "lr_other"} <= made.values().keys()


@pytest.mark.parametrize("seconds", [1800, 36_000, 720_000])
def test_the_chosen_run_takes_the_time_that_was_given(seconds: float) -> None:
    made = plan(Budget(seconds=seconds))
    config, model = TrainConfig(model=model_of(made), hours=1.0, **made.values()), model_of(made)
    batch = config.batch_size * config.accumulate * config.seq_len
    half = (config.seq_len + 1) // 2
    plain, mtp = (3 * batch * forward_flops(model, half, mtp=on) + muon_flops(model, mtp=on) for on in (False, True))
    step = (config.mtp_from * plain + (1 - config.mtp_from) * mtp) / SPEED.at(model.hidden_size)
    steps = value(made, "steps expected")
    assert isinstance(steps, int)
    assert steps * step == pytest.approx(seconds, rel=0.05)


def test_more_time_makes_wider_models_and_larger_batches() -> None:
    made = [plan(Budget(seconds=3600.0 * hours)) for hours in (1, 10, 100, 1000)]
    widths = [model_of(each).hidden_size for each in made]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    assert all(width % 64 == 0 for width in widths)
    batches = [math.prod(each.values()[key] for key in ("batch_size", "accumulate", "seq_len")) for each in made]
    assert batches == sorted(batches)


@pytest.mark.parametrize("tokens", [3 * 10**7, 10**9])
def test_the_width_gives_each_parameter_its_tokens(tokens: int) -> None:
    counts = count_parameters(model_of(plan(Budget(tokens=tokens))))
    ratio = tokens / (counts.active - counts.embedding)
    assert TOKENS_PER_PARAMETER / 2 < ratio < TOKENS_PER_PARAMETER * 2


@pytest.mark.parametrize("size", [10**7, 3 * 10**7, 10**8])
def test_size_is_met_within_a_tenth(size: int) -> None:
    assert count_parameters(model_of(plan(Budget(tokens=10**8, size=size)))).active == pytest.approx(size, rel=0.1)


def test_tokens_give_the_steps() -> None:
    chosen = plan(Budget(tokens=10**8)).values()
    batch = math.prod(chosen[key] for key in ("batch_size", "accumulate", "seq_len"))
    assert chosen["steps"] * batch == pytest.approx(10**8, rel=0.01)


def test_at_its_own_width_the_architecture_is_the_measured_preset() -> None:
    assert architecture(192, 4096) == laptop()


def test_a_preset_stays_as_it_is() -> None:
    made = plan(Budget(seconds=60, model=tiny()))
    assert made.values("model.") == {"hidden_size": 64}
    assert made.values()["seq_len"] <= tiny().max_position_embeddings
    assert "given (--preset)" in {choice.source for choice in made.choices}


def test_little_memory_first_halves_the_micro_batch_then_the_model() -> None:
    budget = Budget(tokens=10**9, size=3 * 10**7)
    roomy = plan(budget)
    tight = plan(budget, MachineSpeed(SPEED.probes, memory=3 * 10**9))
    assert tight.values()["accumulate"] > roomy.values()["accumulate"]
    assert tight.values()["batch_size"] < roomy.values()["batch_size"]
    (why,) = [choice.formula for choice in tight.choices if choice.name == "accumulate"]
    assert "memory" in why
    narrow = plan(budget, MachineSpeed(SPEED.probes, memory=10**9))
    assert model_of(narrow).hidden_size < model_of(roomy).hidden_size
    (why,) = [choice.formula for choice in narrow.choices if choice.name == "model.hidden_size"]
    assert "too much" in why
    held = value(narrow, "memory")
    assert isinstance(held, str)
    assert parse_bytes(held, "memory") <= GREEN * 10**9


def test_short_texts_are_repeated_and_it_is_said() -> None:
    (choice,) = [c for c in plan(Budget(tokens=5 * 10**8)).choices if c.name == "epochs"]
    assert choice.value == pytest.approx(5, rel=0.01)
    assert "more text would help" in choice.formula
    (choice,) = [c for c in plan(Budget(tokens=2 * 10**8)).choices if c.name == "epochs"]
    assert "nearly as good" in choice.formula


def test_a_tiny_corpus_gets_a_batch_that_it_holds() -> None:
    corpus = Corpus(tokens=5000, vocab_size=384, tokens_per_document=200.0)
    chosen = plan(Budget(seconds=600), corpus=corpus).values()
    assert chosen["batch_size"] * chosen["seq_len"] * 4 <= 5000


def test_speed_between_the_probes() -> None:
    assert SPEED.at(64) == 30e9
    assert SPEED.at(1024) == 60e9
    assert 30e9 < SPEED.at(256) < 60e9


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(), "either time or tokens"),
        (Budget(seconds=1, tokens=1), "either time or tokens"),
        (Budget(seconds=0), "no time to train"),
        (Budget(seconds=math.nan), "no time to train"),
        (Budget(tokens=0), "tokens is 0"),
        (Budget(tokens=10, size=10), "active parameters"),
        (Budget(tokens=10, size=10**13), "active parameters"),
    ],
)
def test_what_makes_no_run_is_one_line(budget: Budget, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan(budget)
    assert "\n" not in str(caught.value)


def test_too_little_memory_for_any_model_is_refused() -> None:
    with pytest.raises(UserError, match="smallest run needs"):
        plan(Budget(seconds=600), MachineSpeed(SPEED.probes, memory=10**6))


def test_the_dial_needs_no_torch() -> None:
    code = "import sys, minga.planner.dial; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
