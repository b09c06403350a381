"""The operations as the model calls them: the fastest form this machine has, each equal to its twin in `reference`.

Today that is torch's fused attention and a sorted expert layer; compiled kernels slot in here without a change above.

  B batch, T query tokens, S cached tokens, H heads, K query/key dim, V value dim
  N tokens of the whole batch, D model dim, E experts, A active experts a token, F expert hidden
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minga.kernels.reference import (
    attend_latent_absorbed,
    dequantize_int8,
    linear_int8,
    quantize_int8,
    rms_norm,
    swiglu,
)

__all__ = [
    "attend",
    "attend_latent_absorbed",
    "dequantize_int8",
    "experts",
    "linear",
    "linear_int8",
    "quantize_int8",
    "rms_norm",
    "swiglu",
]


def attend(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, mask_BTS: Tensor | None, *, scale: float) -> Tensor:
    """`reference.attend` through torch's fused attention. `mask_BTS` None: causal, T the tail of S."""
    T, S = q_BTHK.shape[1], k_BSHK.shape[1]
    if mask_BTS is None and 1 < T != S:
        mask_BTS = torch.ones(T, S, dtype=torch.bool, device=q_BTHK.device).tril(S - T)[None]
    out_BHTV = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSHK.transpose(1, 2),
        v_BSHV.transpose(1, 2),
        attn_mask=None if mask_BTS is None else mask_BTS[:, None],
        is_causal=mask_BTS is None and T > 1,
        scale=scale,
        enable_gqa=q_BTHK.shape[2] != k_BSHK.shape[2],
    )
    return out_BHTV.transpose(1, 2)


def linear(x: Tensor, weight_OI: Tensor, bias: Tensor | None = None, *, precision: str = "float32") -> Tensor:
    """x @ W.T + bias over the last dimension of x, its product and those of its gradients in `precision`."""
    return F.linear(x, weight_OI, bias)


def experts(
    x_ND: Tensor,
    index_NA: Tensor,
    weight_NA: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    *,
    precision: str = "float32",
) -> Tensor:
    """`reference.experts` with the tokens sorted by expert, so that each expert is two dense products.

    The loop is over experts that were chosen, and its slices come from one `split` and one `unbind`: their backward is
    one `cat` and one `stack`, where indexing would add E full-size gradients.
    """
    active = index_NA.shape[1]
    order = index_NA.flatten().argsort(stable=True)
    counts = torch.bincount(index_NA.flatten(), minlength=gate_up_EGD.shape[0]).tolist()
    token = order // active
    rows = x_ND[token].split(counts)
    chosen = [
        F.linear(swiglu(F.linear(x, gate_up)), down)
        for x, gate_up, down in zip(rows, gate_up_EGD.unbind(0), down_EDF.unbind(0), strict=True)
        if len(x)
    ]
    weighted = torch.cat(chosen) * weight_NA.flatten()[order, None]
    return torch.zeros_like(x_ND).index_add(0, token, weighted)
