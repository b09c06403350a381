"""A running mean of the weights: often a better model than the last weights, above all before the rate has decayed."""

from __future__ import annotations

import copy

import torch

from minga.model.transformer import Transformer


class Ema:
    """`model` holds the means, in float32: mean <- d · mean + (1 - d) · weight after each step, router biases included.

    d = min(decay, (1 + step) / (10 + step)), so that a young run's mean is not mostly its random beginning.
    """

    def __init__(self, model: Transformer, decay: float):
        self.model = copy.deepcopy(model).float().requires_grad_(False).eval()
        self._decay = decay

    @torch.no_grad()
    def update(self, model: Transformer, step: int) -> None:
        """`step`: steps taken so far, this one included."""
        means, weights = self.model.state_dict(), model.state_dict()
        names = [name for name, mean in means.items() if mean.is_floating_point()]
        rate = 1 - min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([means[name] for name in names], [weights[name].float() for name in names], rate)
