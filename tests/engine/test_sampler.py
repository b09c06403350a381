"""pytest tests/engine/test_sampler.py"""

from __future__ import annotations

import math

import pytest
import torch

from minga.engine.sampler import SamplingParams, distribution, sample, token_logprobs
from minga.errors import UserError

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


def test_sample_follows_its_weights():
    generator, weights = torch.Generator().manual_seed(0), torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0])
    counts = torch.bincount(torch.tensor([sample(weights, generator) for _ in range(4000)]), minlength=5)
    assert counts[[0, 2, 4]].tolist() == [0, 0, 0]
    assert counts[1].item() == pytest.approx(3000, abs=110)  # four standard deviations


def test_sample_refuses_what_is_not_a_number():
    with pytest.raises(UserError, match="not numbers"):
        sample(torch.tensor([math.nan, math.nan]), torch.Generator().manual_seed(0))


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
    ],
)
def test_impossible_values_are_named(params, name):
    with pytest.raises(UserError, match=name):
        SamplingParams(**params)


def test_stop_may_be_one_string():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
