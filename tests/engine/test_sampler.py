"""pytest tests/engine/test_sampler.py"""

from __future__ import annotations

import math

import pytest
import torch

from minga.config.presets import tiny
from minga.engine.compiled import compile_model
from minga.engine.plain import PlainModel
from minga.engine.sampler import SamplingParams, adjust, choose, distribution, race, token_logprobs
from minga.errors import UserError
from minga.model.transformer import Transformer

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]))


def probabilities(**params) -> list[float]:
    return [round(p, 4) for p in distribution(LOGITS, SamplingParams(**params)).tolist()]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.1, 0.4, 0.05, 0.3, 0.15]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 0.5714, 0, 0.4286, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.05, 0.3, 0.15]),
        ({"top_p": 0.69}, [0, 0.5714, 0, 0.4286, 0]),
        ({"top_p": 0.71}, [0, 0.4706, 0, 0.3529, 0.1765]),
        ({"top_p": 0.001}, [0, 1, 0, 0, 0]),
        ({"min_p": 0.3}, [0, 0.4706, 0, 0.3529, 0.1765]),
        ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0, 0.5714, 0, 0.4286, 0]),  # of the three left, two hold 0.82
    ],
)
def test_cuts(params, expected):
    assert probabilities(**params) == expected


def test_temperature_sharpens_and_flattens():
    expected = LOGITS.exp() ** 2 / (LOGITS.exp() ** 2).sum()
    torch.testing.assert_close(distribution(LOGITS, SamplingParams(temperature=0.5)), expected)
    assert probabilities(temperature=1e-30) == [0, 1, 0, 0, 0]
    assert probabilities(temperature=1e6) == pytest.approx([0.2] * 5, abs=1e-3)


def test_top_p_beyond_the_first_look():
    """A flat distribution over 5,000 tokens needs more of them than the shortcut looks at."""
    flat = torch.zeros(5000)
    assert (distribution(flat, SamplingParams(top_p=0.5)) > 0).sum().item() == pytest.approx(2500, abs=2)
    assert (distribution(flat, SamplingParams(top_p=0.1)) > 0).sum().item() == pytest.approx(500, abs=2)


def test_several_positions_at_once_equal_each_alone():
    logits_TV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01)
    together = distribution(logits_TV, params)
    torch.testing.assert_close(together, torch.stack([distribution(row, params) for row in logits_TV]))
    torch.testing.assert_close(together.sum(-1), torch.ones(4))


@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_a_race_follows_its_weights(over):
    """20,000 draws, chi-square with 7 degrees of freedom: 29.9 is the 0.01 % point."""
    weights = torch.tensor([0.0, 3.0, 1e-3, 1.0, 0.0, 0.5, 2.0, 2.0, 0.1, 0.4])
    draws = [race(weights, *((n, 5) if over == "seeds" else (5, n))) for n in range(20_000)]
    counts = torch.bincount(torch.tensor(draws), minlength=10).double()
    assert counts[[0, 4]].tolist() == [0, 0]
    expected = 20_000 * weights.double() / weights.double().sum()
    some = expected > 0
    assert float(((counts - expected)[some] ** 2 / expected[some]).sum()) < 29.9


def test_draws_of_neighbouring_places_and_seeds_are_independent():
    """Pairs of successive draws of four tokens: chi-square with 15 degrees of freedom, 44.3 is the 0.01 % point."""
    weights = torch.ones(4)
    for step in ((0, 1), (1, 0), (1, 1)):
        pairs = [4 * race(weights, n, n % 7) + race(weights, n + step[0], n % 7 + step[1]) for n in range(8000)]
        counts = torch.bincount(torch.tensor(pairs), minlength=16).double()
        assert float(((counts - 500) ** 2 / 500).sum()) < 44.3


def test_a_large_vocabulary_is_drawn_from_evenly():
    draws = torch.tensor([race(torch.ones(50_000), seed, 0) for seed in range(2000)])
    counts = torch.histc(draws.double(), 10, 0, 50_000)
    assert float(((counts - 200) ** 2 / 200).sum()) < 33.7  # 9 degrees of freedom
    assert len(draws.unique()) > 1900


def test_choose_refuses_what_is_not_a_number():
    for temperature in (0, 1):
        with pytest.raises(UserError, match="not numbers"):
            choose(torch.tensor([[math.nan, math.nan]]), SamplingParams(temperature=temperature), [(0, 0)])


def test_penalties_and_biases():
    """Row 0 follows the answer [1, 1, 3], row 1 that and the guess 2; the prompt is [0]."""
    logits = torch.tensor([[2.0, 2.0, -2.0, 2.0, 2.0]]).repeat(2, 1)
    rows = adjust(logits, SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), [0], [1, 1, 3], [2])
    assert rows.tolist() == [[2, 1, -2, 1.25, 2], [2, 1, -2.75, 1.25, 2]]
    rows = adjust(logits, SamplingParams(repetition_penalty=2.0), [0], [1, 1, 3], [2])
    assert rows.tolist() == [[1, 1, -2, 1, 2], [1, 1, -4, 1, 2]]
    rows = adjust(logits, SamplingParams(logit_bias={4: -100, 2: 7.5, 99: 1}), [0], [], [2])
    assert rows.tolist() == [[2, 2, 5.5, 2, -98]] * 2
    assert logits.unique().tolist() == [-2, 2]  # a copy


def test_logprobs_are_the_raw_ones():
    logits_TV = torch.stack([LOGITS, LOGITS.flip(0)])
    first, second = token_logprobs(logits_TV, [3, 3], num_top=2)
    assert first.token_id == 3 and first.logprob == pytest.approx(math.log(0.3))
    assert [token for token, _ in first.top] == [1, 3]
    assert first.top[0][1] == pytest.approx(math.log(0.4))
    assert second.logprob == pytest.approx(math.log(0.4))
    assert token_logprobs(logits_TV, [0], num_top=0)[0].top == ()


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ("",)}, "stop"),
        ({"stop": (7,)}, "stop"),
        ({"stop": 7}, "stop"),
        ({"logprobs": -1}, "logprobs"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"frequency_penalty": "much"}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias"),
    ],
)
def test_impossible_values_are_named(params, name):
    with pytest.raises(UserError, match=name):
        SamplingParams(**params)


def test_stop_may_be_one_string():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(
    "kind",
    [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.02}, {"top_k": 50, "top_p": 0.9, "min_p": 0.001}, {"top_p": 0.999}],
)
def test_the_compiled_choice_is_this_one(forward_pass, kind):
    """But for a token at the very edge of a cut, and races that float32 cannot decide: fewer than one in 200."""
    if forward_pass == "torch":
        pytest.skip("there is one form only")
    model = compile_model(Transformer(tiny()).init_weights())
    logits_NV = 3 * torch.randn(400, 1003, generator=torch.Generator().manual_seed(0))
    each = [(SamplingParams(temperature=0.5 + n % 3, **kind), [(7 * n, 11 * n)]) for n in range(400)]
    ours = model.choose(list(logits_NV[:, None]), each)
    expected = [choose(row_V[None], *how) for row_V, how in zip(logits_NV, each, strict=True)]
    assert sum(a != b for a, b in zip(ours, expected, strict=True)) <= 2
    greedy = (SamplingParams(temperature=0), [(0, 0)] * 3)
    assert model.choose([logits_NV[:3]], [greedy]) == [logits_NV[:3].argmax(-1).tolist()]
    for how in (greedy, each[0]):
        with pytest.raises(UserError, match="not numbers"):
            model.choose([torch.full((1, 9), math.nan)], [how])


def test_the_compiled_choice_takes_what_is_allowed(forward_pass):
    """As the choice from logits that are minus infinity elsewhere, whether few, half or all may be taken, or a word's last."""
    if forward_pass == "torch":
        pytest.skip("there is one form only")
    model = compile_model(Transformer(tiny()).init_weights())
    random = torch.Generator().manual_seed(1)
    for V in (31, 32, 37, 1003):
        logits_NV = 3 * torch.randn(120, V, generator=random)
        words_NW = torch.randint(-(2**31), 2**31, (120, -(-V // 32)), generator=random, dtype=torch.int32)
        words_NW[:40] &= torch.randint(-(2**31), 2**31, words_NW[:40].shape, generator=random, dtype=torch.int32)
        words_NW[40:50], words_NW[50:60], words_NW[60] = -1, 0, 0
        words_NW[50:60, (V - 1) // 32] = 1 << (V - 1) % 32 if V % 32 else -(2**31)
        each = [(SamplingParams(n % 3, top_k=n % 5), [(7 * n, 11 * n)]) for n in range(120)]
        allowed = [None if n % 7 == 6 else [words_NW[n]] for n in range(120)]
        ours = model.choose(list(logits_NV[:, None]), each, allowed)
        expected = PlainModel.choose(model, list(logits_NV[:, None]), each, allowed)
        assert sum(a != b for a, b in zip(ours, expected, strict=True)) <= 1, V
        assert all(words_NW[n, t // 32] >> t % 32 & 1 for n, (t,) in enumerate(ours) if n % 7 != 6 and n != 60)
        rows = ours[4:6] + ours[8:9]
        together = model.choose(
            [logits_NV[4:6], logits_NV[8:9]],
            [(each[4][0], each[4][1] + [(35, 55)]), each[8]],
            [[words_NW[4], words_NW[5]], [words_NW[8]]],
        )
        assert [together[0][0], together[1][0]] == [rows[0][0], rows[2][0]]
