"""Attention: multi-head latent (DeepSeek) and grouped-query (Llama, Qwen). Both take and give (B, T, D).

B batch, T query tokens, S keys, D model dim, H heads, K nope dim, R rope dim, C latent, V value dim
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, einsum, nn

from minga.config import ModelConfig
from minga.kernels import cpu, ops
from minga.model.cache import Cache
from minga.model.linear import Linear
from minga.model.rope import rotate
from minga.quant.blocks import dense_weight


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


@dataclass
class Context:
    """What every layer of one call shares: angles, who may look at whom, and the cache."""

    cos_BTP: Tensor
    sin_BTP: Tensor
    positions_BT: Tensor
    segments_BT: Tensor | None = None  # document of each token; None: one document a row
    cache: Cache | None = None
    length: int = 0  # slots of the cache that any query of this call looks at

    @cached_property
    def mask_BTS(self) -> Tensor | None:
        """True where a query may look. None means plain causal attention over the tokens of this call."""
        if self.cache is not None:
            return torch.arange(self.length, device=self.positions_BT.device) <= self.positions_BT[:, :, None]
        if self.segments_BT is None:
            return None
        T = self.segments_BT.shape[1]
        past = torch.ones(T, T, dtype=torch.bool, device=self.segments_BT.device).tril()[None]
        return past & (self.segments_BT[:, :, None] == self.segments_BT[:, None, :])

    def through_cache(self, layer: int, row_BTW: Tensor) -> Tensor:
        """Stores this call's rows and returns all rows to attend over, (B, S, W)."""
        if self.cache is None:
            return row_BTW
        self.cache.write(layer, self.positions_BT, row_BTW)
        return self.cache.read(layer, self.length).to(row_BTW.dtype)


class LatentAttention(nn.Module):
    """Multi-head latent attention (V2 section 2.1): keys and values are up-projections of one small latent a token."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        assert config.kv_lora_rank is not None
        D, H, C, R = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        self.config, self.layer = config, layer
        bias, eps = config.attention_bias, 1e-6  # the two latent norms always use 1e-6 (transformers, vLLM)
        if config.q_lora_rank is None:
            self.q_proj = Linear(D, H * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = Linear(D, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
            self.q_b_proj = Linear(config.q_lora_rank, H * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(D, C + R, bias=bias)
        self.kv_a_layernorm = RMSNorm(C, eps)
        self.kv_b_proj = Linear(C, H * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o_proj = Linear(H * config.v_head_dim, D, bias=bias)

    def forward(self, x_BTD: Tensor, context: Context, absorb: bool | None = None) -> Tensor:
        """`absorb` chooses the form; None takes the one with fewer multiply-adds for this T and S."""
        c = self.config
        B, T, _ = x_BTD.shape
        q_BTHQ = self._queries(x_BTD).view(B, T, c.num_attention_heads, c.qk_head_dim)
        latent_BTC, k_rope_BTR = self.kv_a_proj_with_mqa(x_BTD).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        if context.cache is None and absorb is None and c.rope_style != "complex" and ops.compiled(q_BTHQ):
            return self.o_proj(self._attend_compiled(q_BTHQ, latent_BTC, k_rope_BTR, context).flatten(2))
        q_nope_BTHK, q_rope_BTHR = q_BTHQ.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q_rope_BTHR = rotate(q_rope_BTHR, context.cos_BTP, context.sin_BTP, style=c.rope_style)
        k_rope_BTHR = rotate(k_rope_BTR[:, :, None], context.cos_BTP, context.sin_BTP, style=c.rope_style)
        row_BTW = torch.cat([self.kv_a_layernorm(latent_BTC), k_rope_BTHR.squeeze(2)], -1)
        if absorb is None:
            absorb = self._absorbing_is_cheaper(T, T if context.cache is None else context.length)
        if absorb and (cache := context.cache) and cache.dtype == row_BTW.dtype and ops.on_gpu(row_BTW):
            cache.write(self.layer, context.positions_BT, row_BTW)
            out_BTHV = self._attend_pages(q_nope_BTHK, q_rope_BTHR, cache, context.positions_BT)
        else:
            latent_BSC, rope_BSR = context.through_cache(self.layer, row_BTW).split(
                [c.kv_lora_rank, c.qk_rope_head_dim], -1
            )
            attend = self._attend_absorbed if absorb else self._attend_naive
            out_BTHV = attend(q_nope_BTHK, q_rope_BTHR, latent_BSC, rope_BSR, context.mask_BTS)
        return self.o_proj(out_BTHV.reshape(B, T, -1))

    def _attend_compiled(self, q_BTHQ: Tensor, latent_BTC: Tensor, k_rope_BTR: Tensor, context: Context) -> Tensor:
        """The naive form in one call, rotation included, (B, T, H, V)."""
        c = self.config
        kv_BTHO = self.kv_b_proj(self.kv_a_layernorm(latent_BTC)).unflatten(-1, (c.num_attention_heads, -1))
        precision = (
            "float32" if getattr(self.o_proj, "precision", "float32") == "float32" else "bf16"
        )  # 8 bits stop at the attention core
        angles = (context.cos_BTP, context.sin_BTP)
        return cpu.LatentAttention.apply(
            *(q_BTHQ, kv_BTHO, k_rope_BTR, *angles, context.segments_BT),
            *(c.rope_style == "halves", c.attention_scale, cpu.PRECISIONS[precision]),
        )

    def _queries(self, x_BTD: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(x_BTD)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))

    def _absorbing_is_cheaper(self, T: int, S: int) -> bool:
        """Multiply-adds per head: naive S·C(K+V) + T·S(K+R+V), absorbed T·C(K+V) + T·S(2C+R)."""
        c = self.config
        assert c.kv_lora_rank is not None
        up = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
        naive = S * up + T * S * (c.qk_head_dim + c.v_head_dim)
        return T * up + T * S * (2 * c.kv_lora_rank + c.qk_rope_head_dim) < naive

    def _attend_naive(
        self, q_nope: Tensor, q_rope: Tensor, latent_BSC: Tensor, rope_BSR: Tensor, mask: Tensor | None
    ) -> Tensor:
        c = self.config
        B, S, _ = latent_BSC.shape
        kv_BSHO = self.kv_b_proj(latent_BSC).view(B, S, c.num_attention_heads, -1)
        k_nope, v_BSHV = kv_BSHO.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = rope_BSR[:, :, None].expand(-1, -1, c.num_attention_heads, -1)
        q, k = torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, k_rope], -1)
        return ops.attend(q, k, v_BSHV, mask, scale=c.attention_scale)

    def _attend_absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent_BSC: Tensor, rope_BSR: Tensor, mask: Tensor | None
    ) -> Tensor:
        w_uk, w_uv = self._up_projections()
        return ops.attend_latent_absorbed(
            q_nope, q_rope, latent_BSC, rope_BSR, mask, w_uk_HKC=w_uk, w_uv_HVC=w_uv, scale=self.config.attention_scale
        )

    def _attend_pages(self, q_nope: Tensor, q_rope: Tensor, cache: Cache, positions_BT: Tensor) -> Tensor:
        """`_attend_absorbed` over the pages as they lie: no row is copied."""
        w_uk, w_uv = (w.to(q_nope.dtype) for w in self._up_projections())
        q_latent_BTHC = einsum("bthk,hkc->bthc", q_nope, w_uk)
        pages_NPW = cache.pages.slots[self.layer]
        out_BTHC = ops.attend_latent_paged(
            q_latent_BTHC, q_rope, pages_NPW, cache.table_BP, positions_BT, scale=self.config.attention_scale
        )
        return einsum("bthc,hvc->bthv", out_BTHC, w_uv)

    def _up_projections(self) -> tuple[Tensor, Tensor]:
        """From the latent to keys (H, K, C) and to values (H, V, C)."""
        c = self.config
        w_HOC = dense_weight(self.kv_b_proj).view(c.num_attention_heads, -1, c.kv_lora_rank or 0)
        w_uk, w_uv = w_HOC.split([c.qk_nope_head_dim, c.v_head_dim], 1)
        return w_uk, w_uv


class GroupedQueryAttention(nn.Module):
    """Attention in which several query heads share one key head (arXiv 2305.13245), as Llama and Qwen have it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        D, H, G, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config, self.layer = config, layer
        self.q_proj = Linear(D, H * K, bias=config.qkv_bias)
        self.k_proj = Linear(D, G * K, bias=config.qkv_bias)
        self.v_proj = Linear(D, G * K, bias=config.qkv_bias)
        self.o_proj = Linear(H * K, D, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(K, config.rms_norm_eps), RMSNorm(K, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        c = self.config
        B, T, _ = x_BTD.shape
        q_BTHK = self.q_proj(x_BTD).view(B, T, c.num_attention_heads, c.head_dim)
        k_BTGK = self.k_proj(x_BTD).view(B, T, c.num_key_value_heads, c.head_dim)
        if c.qk_norm:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        q_BTHK = rotate(q_BTHK, context.cos_BTP, context.sin_BTP, style=c.rope_style)
        k_BTGK = rotate(k_BTGK, context.cos_BTP, context.sin_BTP, style=c.rope_style)
        row_BTW = torch.cat([k_BTGK.flatten(2), self.v_proj(x_BTD)], -1)
        k_BSW, v_BSW = context.through_cache(self.layer, row_BTW).chunk(2, -1)
        heads = (c.num_key_value_heads, c.head_dim)
        out = ops.attend(
            q_BTHK, k_BSW.unflatten(-1, heads), v_BSW.unflatten(-1, heads), context.mask_BTS, scale=c.attention_scale
        )
        return self.o_proj(out.reshape(B, T, -1))
