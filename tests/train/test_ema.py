from __future__ import annotations

import torch

from minga.config.presets import tiny
from minga.model.transformer import Transformer
from minga.train.ema import Ema


def test_the_mean_follows_the_recurrence() -> None:
    """In float64 by hand; the decay is lower at first, and router biases are weights too."""
    model = Transformer(tiny()).init_weights()
    ema = Ema(model, 0.5)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    expected = {key: value.double() for key, value in model.state_dict().items()}
    for step in range(1, 20):
        with torch.no_grad():
            for value in model.state_dict().values():
                value += 0.1 * torch.randn_like(value)
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value.double()
    for key, value in ema.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], atol=1e-6, rtol=1e-5)
    assert ema.model.state_dict()[name].any()
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_the_mean_is_no_view_of_the_model() -> None:
    model = Transformer(tiny()).init_weights()
    ema = Ema(model, 0.9)
    before = ema.model.model.norm.weight.clone()
    with torch.no_grad():
        model.model.norm.weight += 1
    assert torch.equal(ema.model.model.norm.weight, before)
