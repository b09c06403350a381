"""Head and cross-entropy in one, a few rows at a time: the logits of a whole batch are never in memory together.

The gradients are computed on the way forward, while a chunk's logits are still there (as Liger's kernel does, BSD-2,
arXiv 2410.10989): memory depends on the chunk, not on tokens x vocabulary, and no logit is computed twice.

  N tokens, D model dim, V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minga.kernels import cpu

_CHUNK = 2**22  # logits in memory at a time


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, precision: str) -> Tensor:
        hidden_ND, weight_VD = hidden_ND.contiguous(), weight_VD.contiguous()
        with_grad = any(ctx.needs_input_grad[:2])
        compiled = cpu.available() and hidden_ND.dtype == torch.float32 and hidden_ND.device.type == "cpu"
        chunk_loss = _chunk_compiled if compiled else _chunk
        total = hidden_ND.new_zeros(())
        d_hidden = torch.empty_like(hidden_ND) if with_grad else None
        d_weight = torch.zeros_like(weight_VD) if with_grad else None
        rows = max(1, _CHUNK // weight_VD.shape[0])
        for start in range(0, len(hidden_ND), rows):
            part = slice(start, start + rows)
            d_part = None if d_hidden is None else d_hidden[part]
            total += chunk_loss(hidden_ND[part], weight_VD, targets_N[part], d_part, d_weight, precision)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden.mul_(d_total), d_weight.mul_(d_total), None, None


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, precision: str = "float32"
) -> Tensor:
    """Sum over tokens of -log softmax(hidden W.T)[target], nats; targets below 0 are not counted.

    `precision` "float32" computes the head's products in the tensors' own dtype, anything else in bf16: the head stays
    out of 8 bits, as in V3 section 3.3.1.
    """
    total: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, precision)
    return total


def _chunk_compiled(
    hidden: Tensor, weight: Tensor, targets: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, precision: str
) -> Tensor:
    product = cpu.PRECISIONS["float32" if precision == "float32" else "bf16"]
    logits = cpu.Linear.apply(hidden, weight, product)
    loss_N = cpu.cross_entropy_in_place(logits, targets, 0.0 if d_hidden is None else 1.0)
    if d_hidden is not None:
        cpu.linear_backward(logits, hidden, weight, d_hidden, d_weight, add=True, precision=product)
    return loss_N.sum()


def _chunk(
    hidden: Tensor, weight: Tensor, targets: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, precision: str
) -> Tensor:
    dtype = hidden.dtype
    if precision != "float32":
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logits = F.linear(hidden, weight).to(torch.promote_types(dtype, torch.float32))
    counted = targets >= 0
    chosen = targets.clamp(min=0)[:, None]
    log_sum = logits.logsumexp(-1)
    loss_N = (log_sum - logits.gather(1, chosen)[:, 0]) * counted
    if d_hidden is not None and d_weight is not None:
        d_logits = logits.sub_(log_sum[:, None]).exp_().scatter_add_(1, chosen, logits.new_full(chosen.shape, -1.0))
        d_logits = (d_logits * counted[:, None]).to(hidden.dtype)
        d_hidden.copy_(d_logits @ weight)
        d_weight += d_logits.T @ hidden
    return loss_N.sum().to(dtype)
