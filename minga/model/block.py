"""One pre-norm block: attention, then feed-forward, each added to the residual stream. Both halves are pluggable."""

from __future__ import annotations

from torch import Tensor, nn

from minga.config import ModelConfig
from minga.model.attention import Context, GroupedQueryAttention, LatentAttention, RMSNorm
from minga.model.experts import MLP, MoE


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        attention = LatentAttention if config.is_mla else GroupedQueryAttention
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module
        if config.is_moe_layer(layer):
            self.mlp = MoE(config)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), context)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
