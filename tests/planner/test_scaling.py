"""Scaling laws give what their papers print, say where they were fitted, and the searches find the best that fits."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minga.config import ModelConfig
from minga.config.presets import v2_lite, v3
from minga.errors import UserError
from minga.planner.counts import count_parameters
from minga.planner.dial import WIDTHS, architecture
from minga.planner.estimate import Estimate, Fact
from minga.planner.scaling import (
    ADAMW,
    CHINCHILLA,
    DEEPSEEK,
    EPOCH,
    JOINT,
    LAWS,
    MUENNIGHOFF,
    MUON,
    PETAFLOP_DAY,
    Surface,
    best_for_compute,
    best_within,
    effective_tokens,
    expansion,
    for_loss,
    model_for,
    models,
    tokens_read,
)

GOPHER = 5.76e23  # operations: Hoffmann et al. 2022, section 1
SURFACES = [CHINCHILLA, EPOCH, MUENNIGHOFF, JOINT]
COMPUTE = st.floats(1e16, 1e26)
EXPERTS = st.sampled_from([1.0, 2.0, 8.25, 32.0])


def named(facts: tuple[Fact, ...], name: str) -> Fact:
    (found,) = [fact for fact in facts if fact.name == f"scaling.{name}"]
    return found


# ------------------------------------------------------------------ what the papers print


def test_chinchilla_is_the_best_run_of_gophers_compute_by_the_replication() -> None:
    best = best_for_compute(GOPHER, law=EPOCH)
    assert best.parameters == pytest.approx(70e9, rel=0.05)
    assert best.tokens == pytest.approx(1.4e12, rel=0.06)
    # Hoffmann et al. print 40 B for their own approach 3 there (figure 4)
    assert best_for_compute(GOPHER, law=CHINCHILLA).parameters == pytest.approx(40e9, rel=0.02)


def test_two_fits_of_the_same_runs_lie_in_the_range_of_each_other_within_them() -> None:
    for step in range(33):
        flops = 7.5e18 * (1.3e22 / 7.5e18) ** (step / 32)  # the largest of the runs; from 5e9 tokens on
        N = math.sqrt(flops / 120)
        for one, other in ((EPOCH, CHINCHILLA), (CHINCHILLA, EPOCH)):
            loss = one.loss(N, 20 * N)
            assert loss.low <= other.loss(N, 20 * N).typical <= loss.high


@pytest.mark.parametrize(
    "flops, experts, parameters, tokens",
    [
        (1e20, 1, 1.7e9, 9.7e9),
        (1e20, 8, 990e6, 17e9),
        (1e20, 32, 669e6, 24.9e9),
        (1e21, 4, 4.4e9, 38e9),
        (1e22, 1, 18.8e9, 88.6e9),
        (1e22, 32, 12.2e9, 136.9e9),
    ],
)
def test_joint_law_gives_table_1_of_its_paper(flops: float, experts: int, parameters: float, tokens: float) -> None:
    best = best_for_compute(flops, law=JOINT, experts=experts)
    assert best.parameters == pytest.approx(parameters, rel=0.02)
    assert best.tokens == pytest.approx(tokens, rel=0.02)


@pytest.mark.parametrize(
    "experts, m, mu, n, nu",
    [
        (1, 30.3640, 0.1817, 53.9838, 0.1965),
        (8, 21.8330, 0.1676, 119.9126, 0.2338),
        (32, 16.5424, 0.1557, 234.67, 0.2652),
    ],
)
def test_joint_law_reduces_to_table_4_of_its_paper(experts: int, m: float, mu: float, n: float, nu: float) -> None:
    assert JOINT.terms(experts) == pytest.approx((1.3637, m, mu, n, nu), rel=3e-3)


def test_deepseek_67b_is_near_the_best_run_of_its_compute() -> None:
    """They trained it on the 2 T tokens that they had; the law would have it half larger on two thirds of them."""
    best = best_for_compute(6 * 67e9 * 2e12, law=DEEPSEEK)
    assert 1 < best.parameters / 67e9 < 1.5
    assert 1 < 2e12 / best.tokens < 1.5
    assert best.loss is None  # none is printed
    # 4.2e-4 and 9.4 M tokens for the 7 B, 3.2e-4 and 18.9 M for the 67 B: section 2.3, table 2
    assert named(best.facts, "learning_rate").value == pytest.approx(3.2e-4, rel=0.01)
    assert named(best.facts, "batch_tokens").value == pytest.approx(4608 * 4096, rel=0.03)


@pytest.mark.parametrize(
    "parameters, tokens, rate, sequences",
    [(399e6, 8.92e9, 9.503e-4, 96), (822e6, 20.76e9, 8.825e-4, 160), (1.5e9, 38.91e9, 8.305e-4, 256)],
)
def test_moonlights_law_gives_its_own_runs(parameters: float, tokens: float, rate: float, sequences: int) -> None:
    """Table 2, up to what the paper's own table and formulae leave between them."""
    best = best_for_compute(6 * parameters * tokens, law=MUON)
    assert best.parameters == pytest.approx(parameters, rel=0.08)
    assert best.tokens == pytest.approx(tokens, rel=0.09)
    assert named(best.facts, "learning_rate").value == pytest.approx(rate, rel=0.04)
    assert named(best.facts, "batch_tokens").value == pytest.approx(sequences * 8192, rel=0.2)  # rounded up to 32


def test_muon_takes_half_the_compute_of_adamw() -> None:
    """52 %, by the figure; the printed exponents have two digits."""
    loss = MUON.at("loss", 4.0)
    adamw = (ADAMW.coefficients["loss"] / loss) ** (1 / 0.054)
    assert 4.0 / adamw == pytest.approx(0.52, abs=0.03)
    at_one = best_for_compute(PETAFLOP_DAY, law=MUON).loss
    assert at_one is not None and at_one.typical == pytest.approx(2.506)


def test_expansion_counts_shared_experts_among_both() -> None:
    assert expansion(v3()) == pytest.approx(257 / 9)
    assert expansion(models(experts=False)[0]) == 1.0


def test_repeated_text_teaches_less_and_less() -> None:
    assert effective_tokens(4e9, 1e9) == pytest.approx(4e9, rel=0.1)  # "up to 4 epochs are nearly as good"
    assert effective_tokens(1e13, 1e9) == pytest.approx(16.387756e9)  # all that it will ever teach
    assert tokens_read(17e9, 1e9) == math.inf


# ------------------------------------------------------------------ what holds everywhere


@given(COMPUTE, EXPERTS, st.sampled_from(SURFACES), st.none() | st.floats(1e8, 1e13))
def test_more_compute_never_ends_higher_and_is_all_spent(
    flops: float, experts: float, law: Surface, unique: float | None
) -> None:
    less, more = (best_for_compute(f, law=law, experts=experts, unique=unique) for f in (flops, 2 * flops))
    assert more.loss is not None and less.loss is not None
    assert more.loss.typical <= less.loss.typical * (1 + 1e-9)
    assert 6 * less.parameters * less.tokens == pytest.approx(flops)
    assert less.loss.low < less.loss.typical < less.loss.high


@given(COMPUTE, EXPERTS, st.sampled_from(SURFACES), st.floats(0.1, 10), st.none() | st.floats(1e8, 1e13))
def test_no_other_split_ends_lower(
    flops: float, experts: float, law: Surface, factor: float, unique: float | None
) -> None:
    best = best_for_compute(flops, law=law, experts=experts, unique=unique)
    assert best.loss is not None
    other = law.loss(best.parameters * factor, best.tokens / factor, experts=experts, unique=unique)
    assert best.loss.typical <= other.typical * (1 + 1e-9)


@given(st.floats(1e18, 1e24), EXPERTS, st.sampled_from(SURFACES))
def test_the_compute_for_a_loss_is_the_one_that_ends_there(flops: float, experts: float, law: Surface) -> None:
    loss = best_for_compute(flops, law=law, experts=experts).loss
    assert loss is not None
    needed = for_loss(loss.typical, law=law, experts=experts)
    assert needed.flops.typical == pytest.approx(flops, rel=1e-3)
    assert needed.flops.low < flops < needed.flops.high


@given(st.floats(1e9, 1e13), st.floats(1e8, 1e12))
def test_tokens_read_undoes_effective_tokens(tokens: float, unique: float) -> None:
    effective = effective_tokens(tokens, unique)
    assert effective <= tokens * (1 + 1e-12)
    if tokens < 20 * unique:
        assert tokens_read(effective, unique) == pytest.approx(tokens, rel=1e-6)


@given(st.floats(1, 1e6), st.floats(1, 1e6))
def test_further_outside_is_more_in_doubt(near: float, far: float) -> None:
    near, far = sorted((near, far))
    widths = [EPOCH.loss(1.6e10 * factor, 5e11) for factor in (near, far)]
    relative = [(loss.high - loss.low) / (loss.typical - 1.8172) for loss in widths]
    assert relative[0] <= relative[1] * (1 + 1e-9)


def test_a_fact_says_of_what_text_and_how_far_outside() -> None:
    inside, outside = (named(best_for_compute(flops).facts, "loss").source for flops in (1e21, GOPHER))
    assert "MassiveText" in inside and "2404.10102" in inside
    assert "extrapolated" not in inside
    assert "extrapolated: parameters 4.5" in outside and "the largest" in outside
    tiny = named(best_for_compute(1e15).facts, "loss").source
    assert "less than the smallest" in tiny
    for law in LAWS.values():
        assert all(fact.source and fact.formula for fact in best_for_compute(1e20, law=law).facts)


# ------------------------------------------------------------------ what else a run is for


def test_what_is_served_much_is_smaller_and_trained_longer() -> None:
    plain, served, more = (for_loss(2.2, served=tokens) for tokens in (0.0, 1e12, 1e14))
    assert plain.parameters > served.parameters > more.parameters
    assert plain.tokens < served.tokens < more.tokens
    assert plain.flops.typical < served.flops.typical < more.flops.typical

    def life(run: tuple[float, float], tokens: float) -> float:
        return 6 * run[0] * run[1] + 2 * run[0] * tokens

    assert life(served[:2], 1e12) < life(plain[:2], 1e12)
    assert life(served[:2], 1e12) < life(more[:2], 1e12)


def test_a_served_13b_is_better_a_7b() -> None:
    """Sardana et al. 2024, figure 1: 1.7e22 operations, 17 %, are saved where 2 T tokens are served."""
    N, served = 13e9, 2e12
    D = CHINCHILLA.best_tokens(N)
    better = for_loss(CHINCHILLA.loss(N, D).typical, law=CHINCHILLA, served=served)
    assert better.parameters == pytest.approx(7e9, rel=0.03)
    saved = 6 * N * D + 2 * N * served - better.flops.typical - 2 * better.parameters * served
    assert saved == pytest.approx(1.7e22, rel=0.05)
    assert saved / (6 * N * D + 2 * N * served) == pytest.approx(0.17, abs=0.01)


def test_little_text_keeps_what_is_served_larger() -> None:
    much, little = for_loss(2.2, served=1e14), for_loss(2.2, served=1e14, unique=2e10)
    assert much.parameters < little.parameters < for_loss(2.2, unique=2e10).parameters * 1.01
    assert math.isfinite(little.tokens)
    reached = EPOCH.loss(little.parameters, little.tokens, unique=2e10)
    assert reached.typical == pytest.approx(2.2)


def test_overtraining_and_little_text_cost_compute() -> None:
    plain = for_loss(2.2)
    longer = for_loss(2.2, tokens_per_parameter=200)
    assert longer.tokens / longer.parameters == pytest.approx(200)
    assert longer.flops.typical > plain.flops.typical
    little = for_loss(2.2, unique=1e10)
    assert little.flops.typical > plain.flops.typical
    assert little.parameters > plain.parameters
    epochs = named(little.facts, "epochs").value
    assert isinstance(epochs, float) and epochs == pytest.approx(little.tokens / 1e10)


def test_a_loss_near_the_floor_may_never_come() -> None:
    assert for_loss(1.83).flops.high == math.inf


@pytest.mark.parametrize("loss", [1.8, 0.0, -1.0, math.nan, math.inf])
def test_a_loss_that_none_reaches_is_refused(loss: float) -> None:
    with pytest.raises(UserError, match="out of reach"):
        for_loss(loss)
    with pytest.raises(UserError, match="get more text"):
        for_loss(2.0, unique=1e7)


@pytest.mark.parametrize("flops", [0.0, -1e20, math.nan, math.inf])
def test_a_compute_that_is_none_is_refused(flops: float) -> None:
    with pytest.raises(UserError, match="positive number"):
        best_for_compute(flops)
    if flops:
        with pytest.raises(UserError, match="tokens served"):
            for_loss(2.5, served=flops)


# ------------------------------------------------------------------ models of every size


def test_at_their_widths_the_published_models_come_out() -> None:
    for published, rel in (
        (v3(), 1e-4),
        (v2_lite(), 0.05),
    ):  # ours routes to V2-Lite's experts as V3 does, and has no YaRN
        active = count_parameters(published).active
        grid = models(vocab_size=published.vocab_size)
        model = min(grid, key=lambda m: abs(count_parameters(m).active - active))
        assert count_parameters(model).active == pytest.approx(active, rel=rel)
        assert count_parameters(model).total == pytest.approx(count_parameters(published).total, rel=rel)
    V2 = next(model for model in models(vocab_size=102400) if model.hidden_size == 5120)
    assert count_parameters(V2).total == pytest.approx(235.741e9, rel=1e-3)


def test_below_they_are_those_of_the_dial() -> None:
    grid = models(vocab_size=4096)
    assert all(architecture(width, 4096) in grid for width in WIDTHS)


@pytest.mark.parametrize(
    "family, experts", [("deepseek_v3", True), ("deepseek_v3", False), ("llama", False), ("qwen3", False)]
)
@settings(max_examples=20, deadline=None)
@given(st.floats(8.5, 10.4))
def test_a_model_is_found_for_a_size(family: str, experts: bool, exponent: float) -> None:
    model = model_for(10**exponent, experts=experts, vocab_size=32768, family=family)
    assert count_parameters(model).active == pytest.approx(10**exponent, rel=0.08)
    assert model.model_type == family
    assert bool(model.n_routed_experts) == experts
    assert ModelConfig.from_hf(model.to_hf()).hidden_size == model.hidden_size


def test_llama_3_8b_and_405b_come_out() -> None:
    grid = {model.hidden_size: model for model in models(experts=False, vocab_size=128256, family="llama")}
    assert count_parameters(grid[4096]).total == pytest.approx(8.03e9, rel=1e-3)
    assert count_parameters(grid[16384]).total == pytest.approx(
        405.85e9, rel=0.1
    )  # 126 layers, and an MLP of 3.25 widths


def test_a_size_or_family_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="no model of ours has about"):
        model_for(1e15)
    with pytest.raises(UserError, match="known: deepseek_v3, llama, qwen3"):
        models(family="mamba")
    with pytest.raises(UserError, match="have no experts"):
        models(family="llama")


# ------------------------------------------------------------------ within limits


def seconds(model: ModelConfig, tokens: float) -> Estimate:
    """A machine of 4e14 operations a second that takes a minute to start."""
    typical = 60 + 6 * count_parameters(model).active * tokens / 4e14
    return Estimate(0.8 * typical, typical, 1.3 * typical)


def training_bytes(model: ModelConfig) -> float:
    return 16.0 * count_parameters(model).total


def test_the_best_within_a_time_takes_it_and_no_other_ends_lower() -> None:
    found = best_within(seconds_of=seconds, limit_seconds=864_000)
    assert found.best.seconds is not None
    assert found.best.seconds.typical == pytest.approx(864_000, rel=2e-3)
    assert found.best.loss.typical == min(option.loss.typical for option in found.options)
    ideal = best_for_compute(4e14 * 864_000, experts=expansion(found.best.model))
    assert 0.5 < found.best.parameters / ideal.parameters < 2
    assert named(found.facts, "loss").value == found.best.loss


def test_memory_limits_the_size_and_so_does_little_text() -> None:
    free = best_within(seconds_of=seconds, limit_seconds=864_000)
    tight = best_within(seconds_of=seconds, limit_seconds=864_000, memory_of=training_bytes, limit_bytes=8e9)
    assert tight.best.memory is not None and tight.best.memory <= 8e9
    assert all(option.memory is not None and option.memory <= 8e9 for option in tight.options)
    assert tight.best.loss.typical > free.best.loss.typical
    little = best_within(seconds_of=seconds, limit_seconds=864_000, unique=1e9)
    assert little.best.parameters > free.best.parameters
    assert little.best.loss.typical > free.best.loss.typical


def test_on_the_front_longer_is_better() -> None:
    front = best_within(seconds_of=seconds, limit_seconds=864_000).front
    assert len(front) > 10
    pairs = [(option.seconds.typical, option.loss.typical) for option in front if option.seconds is not None]
    assert [time for time, _ in pairs] == sorted(time for time, _ in pairs)
    assert [loss for _, loss in pairs] == sorted((loss for _, loss in pairs), reverse=True)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e3, 1e8))
def test_more_time_never_ends_higher(limit: float) -> None:
    less, more = (best_within(seconds_of=seconds, limit_seconds=time).best for time in (limit, 2 * limit))
    assert more.loss.typical <= less.loss.typical


def test_what_fits_nowhere_is_refused() -> None:
    with pytest.raises(UserError, match="the smallest takes"):
        best_within(seconds_of=seconds, limit_seconds=1e5, memory_of=training_bytes, limit_bytes=1e6)
    with pytest.raises(UserError, match="no time"):
        best_within(seconds_of=seconds, limit_seconds=1)
    with pytest.raises(UserError, match="positive number"):
        best_within(seconds_of=seconds, limit_seconds=math.nan)


def test_needs_no_torch() -> None:
    code = "import sys, minga.planner.scaling; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
