from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from minga.config import TrainConfig
from minga.config.presets import tiny
from minga.data.loader import Loader
from minga.data.shards import open_shards
from minga.kernels.reference import choose_experts
from minga.model.transformer import Transformer
from minga.train.balance import LoadCounter, balance_rates
from minga.train.optim import Optimizer
from minga.train.step import train_step


def _count(counter: LoadCounter, index: list[list[int]], seed: int) -> torch.Tensor:
    score_NE = torch.rand(len(index), 8, generator=torch.Generator().manual_seed(seed))
    counter.add(0, torch.tensor(index), score_NE)
    return score_NE


def test_bias_moves_against_the_load_by_the_rate_in_spreads() -> None:
    model = Transformer(tiny()).init_weights()
    counter = LoadCounter(model.moe_layers())
    scores = [_count(counter, [[0, 1], [0, 2], [0, 3]], 1), _count(counter, [[0, 4]], 2)]
    counter.update_bias([0.1] * 3)
    bias = model.moe_layers()[0].gate.e_score_correction_bias
    score_NE = torch.cat(scores)
    spread = (score_NE - score_NE.mean(-1, keepdim=True)).var(0, correction=0).mean().sqrt()
    # mean load is 8 / 8 = 1: expert 0 has 4 (counted as two at the most), experts 1-4 have 1, experts 5-7 none
    torch.testing.assert_close(bias, 0.1 * spread * torch.tensor([-1.0, 0, 0, 0, 0, 1, 1, 1]))
    assert all(not total.any() for total in counter.totals)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_any_router_is_levelled_and_stays_level(size: float) -> None:
    """Scores that lie close or far apart, experts that all tokens like: level in fifty steps, and no swinging after."""
    model = Transformer(tiny().replace(n_group=1, topk_group=1)).init_weights()
    layer = model.moe_layers()[0]
    counter, config = LoadCounter(model.moe_layers()), TrainConfig(steps=100, model=tiny())
    generator = torch.Generator().manual_seed(0)
    liked_E = size * torch.linspace(-2, 2, 8)
    num_active, no_groups = tiny().num_experts_per_tok, {"num_groups": 1, "groups_kept": 1, "group_top": 2}
    ratios = []
    for step in range(100):
        score_NE = liked_E + size * torch.randn(4096, 8, generator=generator)
        index_NA = choose_experts(score_NE, layer.gate.e_score_correction_bias, num_active=num_active, **no_groups)
        counter.add(0, index_NA, score_NE)
        ratios.append(float(counter.relative()[0].max()))
        counter.update_bias(balance_rates(config, step, counter.layers))
    assert ratios[0] > 2.5
    assert max(ratios[50:]) < 1.15


def test_training_levels_a_skewed_router(make_config: Callable[..., TrainConfig]) -> None:
    """A router that sends everything to two experts is brought below 1.5 times the mean load by the bias alone."""
    config = make_config(accumulate=1, batch_size=8, sequence_loss=0.0)
    shards = open_shards(config.data)
    model_config = config.model.replace(vocab_size=384, n_group=1, topk_group=1)
    torch.manual_seed(0)
    model = Transformer(model_config).init_weights().train()
    for layer in model.moe_layers():
        layer.gate.e_score_correction_bias += torch.tensor([0.2, 0.2, 0, 0, 0, 0, 0, 0])
    before = [layer.gate.e_score_correction_bias.clone() for layer in model.moe_layers()]
    optimizer, counter = Optimizer(model, config), LoadCounter(model.moe_layers())
    loader = Loader(shards, batch_size=16, seq_len=32, num_extra=2)
    ratios = []
    for _ in range(60):
        optimizer.set_scale(0.0)  # the weights stand still: what levels the load is the bias
        metrics = train_step(model, [next(loader)], optimizer, config, counter, with_mtp=True, balance_rates=[0.3] * 3)
        ratios.append(metrics.max_over_mean)
    assert ratios[0] > 3.0
    assert sum(ratios[-10:]) / 10 < 1.5
    for layer, bias in zip(model.moe_layers(), before, strict=True):
        assert not torch.equal(layer.gate.e_score_correction_bias, bias)
        assert layer.gate.e_score_correction_bias.dtype == torch.float32


def test_routers_of_mtp_modules_are_counted_too() -> None:
    model = Transformer(tiny()).init_weights()
    assert len(model.moe_layers()) == 2 + 1  # layers 1 and 2, and the MTP module


def test_a_router_starts_fast_and_mtps_starts_with_mtp() -> None:
    config = TrainConfig(steps=1000, model=tiny(), mtp_from=0.6, balance_warm_steps=100)
    layers = Transformer(tiny()).moe_layers()
    fast, slow = config.balance_rate_warm, config.balance_rate
    assert balance_rates(config, 0, layers) == [fast, fast, fast]
    assert balance_rates(config, 100, layers) == [fast / 2, fast / 2, fast]
    assert balance_rates(config, 700, layers) == [fast / 8, fast / 8, fast / 2]
    assert balance_rates(config, 999, layers) == [slow, slow, fast / 4.99]
