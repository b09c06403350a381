"""The operations as the model calls them: the fastest form this machine has, each equal to its twin in `reference`.

On a CPU that is our compiled kernels, once training has loaded them (`minga.kernels.cpu.load`) and where a tensor is large
enough to be worth a call; on an NVIDIA GPU our Triton kernels, where no gradient is to come of it (FP8 apart, whose three
products they are); elsewhere torch's fused attention and a sorted expert layer.

  B batch, T query tokens, S cached tokens, H heads, K query/key dim, V value dim
  N tokens of the whole batch, D model dim, E experts, A active experts a token, F expert hidden
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minga.kernels import cpu, fp8, gpu, reference
from minga.kernels.cross_entropy import linear_cross_entropy
from minga.kernels.reference import (
    attend_latent_absorbed,
    dequantize_codes,
    dequantize_int4,
    dequantize_int8,
    pack_int4,
    quantize_int4,
    quantize_int8,
    swiglu,
    to_int4,
    unpack_codes,
)

__all__ = [
    "attend",
    "attend_latent_absorbed",
    "attend_latent_paged",
    "compiled",
    "dequantize_codes",
    "dequantize_int4",
    "dequantize_int8",
    "experts",
    "experts_int8",
    "linear",
    "linear_cross_entropy",
    "linear_int8",
    "mlp",
    "on_gpu",
    "pack_int4",
    "quantize_int4",
    "quantize_int8",
    "rms_norm",
    "route",
    "swiglu",
    "to_int4",
    "unpack_codes",
]

_WORTH_A_CALL = 2**14  # elements of the input below which torch's own operations are as quick


def compiled(*tensors: Tensor) -> bool:
    """Whether the compiled kernels are loaded and take these tensors: float32 in this machine's memory, the first large."""
    return (
        cpu.available()
        and tensors[0].numel() >= _WORTH_A_CALL
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    )


def on_gpu(*tensors: Tensor) -> bool:
    """Whether the Triton kernels take these tensors: on an NVIDIA GPU, without a gradient to come."""
    return gpu.usable(*tensors)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm` in one pass each way."""
    return cpu.RMSNorm.apply(x, weight, eps) if compiled(x, weight) else reference.rms_norm(x, weight, eps)


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


def attend_latent_paged(
    q_latent_BTHC: Tensor,
    q_rope_BTHR: Tensor,
    pages_NPW: Tensor,
    table_BL: Tensor,
    positions_BT: Tensor,
    *,
    scale: float,
) -> Tensor:
    """`reference.attend_latent_paged` reading each cached row once for many heads."""
    arguments = (q_latent_BTHC, q_rope_BTHR, pages_NPW, table_BL, positions_BT)
    if on_gpu(*arguments):
        from minga.kernels.gpu import latent_attention

        return latent_attention.attend_latent_paged(*arguments, scale=scale)
    return reference.attend_latent_paged(*arguments, scale=scale)


def route(
    logits_NE: Tensor,
    bias_E: Tensor | None,
    *,
    num_active: int,
    sigmoid: bool,
    num_groups: int,
    groups_kept: int,
    group_top: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.route` in one pass over a token's logits."""
    chosen = reference.route
    if on_gpu(logits_NE):
        from minga.kernels.gpu import router

        chosen = router.route
    return chosen(
        *(logits_NE, bias_E),
        num_active=num_active,
        sigmoid=sigmoid,
        num_groups=num_groups,
        groups_kept=groups_kept,
        group_top=group_top,
        normalize=normalize,
        scale=scale,
    )


def linear(x: Tensor, weight_OI: Tensor, bias: Tensor | None = None, *, precision: str = "float32") -> Tensor:
    """x @ W.T + bias over the last dimension of x, its product and those of its gradients in `precision`."""
    if precision == "fp8":
        return fp8.linear(x, weight_OI, bias)
    if compiled(x, weight_OI):
        y = cpu.Linear.apply(x, weight_OI, cpu.PRECISIONS[precision])
        return y if bias is None else y + bias
    if precision == "float32":
        return F.linear(x, weight_OI, bias)
    return reference.linear_rounded(x, weight_OI, bias, precision=precision)


def linear_int8(x: Tensor, weight_OI: Tensor, scale_OG: Tensor, block: int) -> Tensor:
    """`reference.linear_int8` on the tensor cores."""
    if on_gpu(x, weight_OI):
        from minga.kernels.gpu.block_gemm import block_gemm
        from minga.kernels.gpu.quantize import quantize_int8

        rows = quantize_int8(x.flatten(0, -2), block)
        y = block_gemm(*rows, weight_OI, scale_OG, block=block, rows=1, dtype=x.dtype)
        return y.unflatten(0, x.shape[:-1])
    return reference.linear_int8(x, weight_OI, scale_OG, block)


def mlp(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, *, precision: str = "float32") -> Tensor:
    """down(silu(gate(x)) · up(x)), over the last dimension of x."""
    if precision in cpu.PRECISIONS and compiled(x, gate_FD, up_FD, down_DF):
        weights = (torch.cat([gate_FD, up_FD])[None], down_DF[None])
        return cpu.Experts.apply(x.flatten(0, -2), None, None, *weights, cpu.PRECISIONS[precision]).view_as(x)
    gate, up = (linear(x, weight, precision=precision) for weight in (gate_FD, up_FD))
    return linear(F.silu(gate) * up, down_DF, precision=precision)


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
    if precision in cpu.PRECISIONS and compiled(x_ND, weight_NA, gate_up_EGD, down_EDF):
        return cpu.Experts.apply(x_ND, index_NA, weight_NA, gate_up_EGD, down_EDF, cpu.PRECISIONS[precision])
    if on_gpu(x_ND, weight_NA, gate_up_EGD, down_EDF):
        from minga.kernels.gpu import grouped_gemm

        if precision == "float32":
            return grouped_gemm.experts(x_ND, index_NA, weight_NA, gate_up_EGD, down_EDF)
        if precision == "fp8":
            weights, scales = zip(*(fp8.quantize(w, fp8.WEIGHT) for w in (gate_up_EGD, down_EDF)), strict=True)
            return grouped_gemm.experts(x_ND, index_NA, weight_NA, *weights, weight_scales=scales)
    active = index_NA.shape[1]
    order = index_NA.flatten().argsort(stable=True)
    counts = torch.bincount(index_NA.flatten(), minlength=gate_up_EGD.shape[0]).tolist()
    token = order // active
    rows = x_ND[token]
    if precision == "fp8":
        out = fp8.grouped_linear(swiglu(fp8.grouped_linear(rows, gate_up_EGD, counts)), down_EDF, counts)
    else:
        out = torch.cat(
            [
                linear(swiglu(linear(x, gate_up, precision=precision)), down, precision=precision)
                for x, gate_up, down in zip(rows.split(counts), gate_up_EGD.unbind(0), down_EDF.unbind(0), strict=True)
                if len(x)
            ]
        )
    weighted = out * weight_NA.flatten()[order, None]
    return torch.zeros_like(x_ND).index_add(0, token, weighted)


def experts_int8(
    x_ND: Tensor,
    index_NA: Tensor,
    weight_NA: Tensor,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    *,
    block: int,
) -> Tensor:
    """`reference.experts_int8` as two grouped products."""
    if on_gpu(x_ND, weight_NA, *gate_up, *down):
        from minga.kernels.gpu import grouped_gemm

        scales = (gate_up[1], down[1])
        return grouped_gemm.experts(x_ND, index_NA, weight_NA, gate_up[0], down[0], weight_scales=scales, block=block)
    return reference.experts_int8(x_ND, index_NA, weight_NA, gate_up, down, block=block)
