"""Expert balance without an auxiliary loss (V3 section 2.1.2; arXiv 2408.15664): a bias per expert, moved after each step.

An expert that got more than its share of the whole batch is made a little less eligible, one that got less a little
more. The bias changes who is chosen, never how much an expert's output weighs, so no gradient is spent on balance.

  E experts, L expert layers
"""

from __future__ import annotations

import torch
from torch import Tensor

from minga.model.experts import MoE


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

    @torch.no_grad()
    def update_bias(self, rate: float) -> None:
        """One step of every router's bias by the sign of its expert's load error; then the counts start again."""
        for layer, counts_E in zip(self.layers, self.counts_LE, strict=True):
            bias_E = layer.gate.e_score_correction_bias
            if bias_E is not None and counts_E.sum() > 0:
                bias_E += rate * torch.sign(counts_E.mean() - counts_E).to(bias_E)
            counts_E.zero_()
