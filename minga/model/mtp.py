"""Multi-token prediction (V3 section 2.2): a small module that guesses one token further than the model itself.

  h'_i = eh_proj [ enorm(embedding of t_{i+1}) ; hnorm(h_i) ],  h = block(h'),  guess of t_{i+2} = head(norm(h))

The paper writes the hidden state first; every checkpoint has the embedding first, and so have we. h_i is the main model's
output after its final norm (transformers, vLLM). Embedding and head are the main model's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minga.config import ModelConfig
from minga.model.attention import Context, RMSNorm
from minga.model.block import Block
from minga.model.linear import Linear


class MTPModule(nn.Module):
    def __init__(self, config: ModelConfig, depth: int):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.eh_proj = Linear(2 * D, D, bias=False)
        self.block = Block(config, config.num_hidden_layers + depth)
        self.norm = RMSNorm(D, eps)

    def forward(self, embedding_BTD: Tensor, hidden_BTD: Tensor, context: Context) -> Tensor:
        """`embedding_BTD` is of the token after each position of `hidden_BTD`. Returns the normed hidden, (B, T, D)."""
        joined = torch.cat([self.enorm(embedding_BTD), self.hnorm(hidden_BTD)], -1)
        return self.norm(self.block(self.eh_proj(joined), context))
