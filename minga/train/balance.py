"""Expert balance without an auxiliary loss (V3 section 2.1.2; arXiv 2408.15664): a bias per expert, moved after each step.

An expert that got more than its share of the whole batch is made a little less eligible, one that got less a little
more. V3 moves every bias by the same amount; here an expert that is near its share moves by less, so that a step large
enough to follow a young router does not make loads swing (docs/log.md). The bias changes who is chosen, never how much an expert's output weighs, so no gradient is spent on balance.

  E experts, L expert layers
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minga.config import TrainConfig
from minga.model.experts import MoE


FULL_STEP_FROM = 1 / 3  # of an even share: an expert that is further off moves by the whole rate


class LoadCounter:
    """Counts how often each expert of each layer was chosen, over all micro-batches of a step."""

    def __init__(self, layers: list[MoE]):
        self.layers = layers
        self.counts_LE = [torch.zeros(layer.gate.config.n_routed_experts) for layer in layers]

    def add(self, layer: int, index_NA: Tensor) -> None:
        counts_E = self.counts_LE[layer]
        counts_E += torch.bincount(index_NA.flatten(), minlength=len(counts_E)).to(counts_E)

    def relative(self) -> list[Tensor]:
        """Load of each expert over the layer's mean, one (E,) tensor a layer that ran; 1.0 is an even share."""
        return [counts_E / counts_E.mean() for counts_E in self.counts_LE if counts_E.sum() > 0]

    def reset(self) -> None:
        """Forgets the counts of a step that is not taken."""
        for counts_E in self.counts_LE:
            counts_E.zero_()

    @torch.no_grad()
    def update_bias(self, rates: Sequence[float]) -> None:
        """One step of each router's bias, by its layer's rate at most, against each expert's load error. Counts restart."""
        for layer, counts_E, rate in zip(self.layers, self.counts_LE, rates, strict=True):
            bias_E = layer.gate.e_score_correction_bias
            if bias_E is not None and counts_E.sum() > 0:
                missing_E = 1 - counts_E / counts_E.mean()
                bias_E += rate * (missing_E / FULL_STEP_FROM).clamp(-1, 1).to(bias_E)
        self.reset()


def balance_rates(config: TrainConfig, step: int, layers: list[MoE]) -> list[float]:
    """How far each layer's bias moves after `step`: further at first, when loads are furthest apart.

    The MTP modules' routers, last in `layers`, start when MTP does.
    """
    mtp_start = math.ceil(config.mtp_from * config.steps)
    num_main = len(layers) - config.model.num_nextn_predict_layers
    ages = [step if number < num_main else step - mtp_start for number in range(len(layers))]
    return [config.balance_rate_warm if age < config.balance_warm_steps else config.balance_rate for age in ages]
