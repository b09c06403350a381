"""Expert balance without an auxiliary loss (V3 section 2.1.2; arXiv 2408.15664): a bias per expert, moved after each step.

An expert that got more than its share of the whole batch is made a little less eligible, one that got less a little
more. The bias changes who is chosen, never how much an expert's output weighs, so no gradient is spent on balance.

V3 moves every bias by the same 0.001. How many tokens that sends elsewhere depends on how far a router's scores lie
apart: what is too slow for one router swings another (docs/log.md). So a bias moves by a share of that spread, in
proportion to what its expert has too much or too little.

  N tokens, E experts, A active experts a token, L expert layers
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minga.config import TrainConfig
from minga.model.experts import MoE


class LoadCounter:
    """Counts how often each expert of each layer was chosen, and how far scores lie apart, over all of a step's tokens."""

    def __init__(self, layers: list[MoE]):
        self.layers = layers
        experts = [layer.gate.config.n_routed_experts for layer in layers]
        self.counts_LE = [torch.zeros(number) for number in experts]
        # of scores less their token's mean: what all experts have in common chooses none
        self._sums_LE = [torch.zeros(number, dtype=torch.float64) for number in experts]
        self._squares_L = [torch.zeros(1, dtype=torch.float64) for _ in experts]

    @property
    def totals(self) -> list[Tensor]:
        """All that is counted, to be summed over processes."""
        return [*self.counts_LE, *self._sums_LE, *self._squares_L]

    def add(self, layer: int, index_NA: Tensor, score_NE: Tensor) -> None:
        counts_E = self.counts_LE[layer]
        counts_E += torch.bincount(index_NA.flatten(), minlength=len(counts_E)).to(counts_E)
        score_NE = score_NE.detach()
        score_NE = (score_NE - score_NE.mean(-1, keepdim=True)).double()
        self._sums_LE[layer] += score_NE.sum(0).to(self._sums_LE[layer])
        self._squares_L[layer] += score_NE.square().sum().to(self._squares_L[layer])

    def relative(self) -> list[Tensor]:
        """Load of each expert over the layer's mean, one (E,) tensor a layer that ran; 1.0 is an even share."""
        return [counts_E / counts_E.mean() for counts_E in self.counts_LE if counts_E.sum() > 0]

    def reset(self) -> None:
        """Forgets the counts of a step that is not taken."""
        for total in self.totals:
            total.zero_()

    @torch.no_grad()
    def update_bias(self, rates: Sequence[float]) -> None:
        """One step of each router's bias: its layer's rate x the spread of scores x the missing share. Counts restart."""
        for number, (layer, counts_E, rate) in enumerate(zip(self.layers, self.counts_LE, rates, strict=True)):
            bias_E = layer.gate.e_score_correction_bias
            if bias_E is not None and counts_E.sum() > 0:
                missing_E = (1 - counts_E / counts_E.mean()).clamp(min=-1)
                bias_E += rate * self._spread(number) * missing_E.to(bias_E)
        self.reset()

    def _spread(self, layer: int) -> float:
        """Standard deviation over tokens of one expert's score, all experts of a layer together."""
        tokens = float(self.counts_LE[layer].sum()) / self.layers[layer].gate.config.num_experts_per_tok
        variance = float(self._squares_L[layer]) - float(self._sums_LE[layer].square().sum()) / tokens
        return math.sqrt(max(0.0, variance / (tokens * len(self.counts_LE[layer]))))


def balance_rates(config: TrainConfig, step: int, layers: list[MoE]) -> list[float]:
    """How far each layer's bias moves after `step`: `balance_rate_warm` at first, half of it after `balance_warm_steps`,
    a third after twice as many, down to `balance_rate`.

    As in stochastic approximation: far while loads are far apart, little once only chance moves them. The MTP modules'
    routers, last in `layers`, start when MTP does.
    """
    mtp_start = math.ceil(config.mtp_from * config.steps)
    num_main = len(layers) - config.model.num_nextn_predict_layers
    ages = [step if number < num_main else max(0, step - mtp_start) for number in range(len(layers))]
    return [max(config.balance_rate, config.balance_rate_warm / (1 + age / config.balance_warm_steps)) for age in ages]
