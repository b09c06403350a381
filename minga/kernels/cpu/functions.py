"""The compiled operations as `torch.autograd.Function`s over float32 tensors.

Matrix products are computed in one of three precisions; the tensors stay float32 and are rounded as they are packed for
the product (gemm.h). In int8 the gradients are rounded stochastically, from torch's generator: a resumed run rounds as
the uninterrupted one. Every sum has an order that depends on the shapes alone, so threads change no bit.

  B batch, T tokens, N = B·T, I inputs, O outputs, D model dim, H heads, K nope dim, R rope dim, V value dim, P = R/2 pairs
  E experts, A active experts a token, F expert hidden, L = N·A rows sorted by expert, S stack of matrices (M, N)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minga.kernels.cpu.build import call

PRECISIONS = {"float32": 0, "bf16": 1, "int8": 2}
_NORM_CHUNKS = 16  # rows of a norm whose weight gradients are summed on their own


def _threads() -> int:
    return torch.get_num_threads()


def _seed(precision: int) -> int:
    return int(torch.randint(2**62, ())) if precision == PRECISIONS["int8"] else 0


def _gradient_of(t: Tensor) -> Tensor:
    """Memory for it."""
    call("minga_make_room", t.nbytes)
    return torch.empty_like(t)


class Linear(torch.autograd.Function):
    """x (.., I), weight (O, I) -> (.., O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, precision: int) -> Tensor:
        x, weight_OI = x.contiguous(), weight_OI.contiguous()
        ctx.save_for_backward(x, weight_OI)
        ctx.precision = precision
        outputs, inputs = weight_OI.shape
        y = x.new_empty((*x.shape[:-1], outputs))
        call("minga_linear", x, weight_OI, y, x.numel() // inputs, outputs, inputs, precision, _threads())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_OI = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = _gradient_of(weight_OI) if ctx.needs_input_grad[1] else None
        linear_backward(dy.contiguous(), x, weight_OI, dx, dw, add=False, precision=ctx.precision)
        return dx, dw, None


def linear_backward(
    dy: Tensor, x: Tensor, weight_OI: Tensor, dx: Tensor | None, dw: Tensor | None, *, add: bool, precision: int
) -> None:
    """Fills `dx` and `dw` (both may be None); `add`: adds to dw instead."""
    outputs, inputs = weight_OI.shape
    sizes = (x.numel() // inputs, outputs, inputs, int(add), precision, _threads())
    call("minga_linear_backward", dy, x, weight_OI, dx, dw, *sizes, _seed(precision))


class Experts(torch.autograd.Function):
    """x (N, D), gate_up (E, 2F, D), down (E, D, F) -> (N, D): tokens sorted by expert, products grouped, SwiGLU fused.

    index and weight (N, A); both None: one expert that every token passes with weight 1, a plain SwiGLU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        index_NA: Tensor | None,
        weight_NA: Tensor | None,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        precision: int,
    ) -> Tensor:
        x_ND, gate_up_EGD, down_EDF = x_ND.contiguous(), gate_up_EGD.contiguous(), down_EDF.contiguous()
        weight_NA = None if weight_NA is None else weight_NA.contiguous()
        N, (E, D, F) = x_ND.shape[0], down_EDF.shape
        A = 1 if index_NA is None else index_NA.shape[1]
        if index_NA is None:
            token_L = place_L = torch.arange(N)
            offset_E = torch.tensor([0, N])
        else:
            order_L = index_NA.flatten().argsort(stable=True)
            token_L, place_L = order_L // A, torch.empty_like(order_L)
            place_L[order_L] = torch.arange(N * A)
            offset_E = torch.zeros(E + 1, dtype=torch.int64)
            torch.cumsum(torch.bincount(index_NA.flatten(), minlength=E), 0, out=offset_E[1:])
        hidden, act, y = (x_ND.new_empty(N * A, width) for width in (2 * F, F, D))
        out = torch.empty_like(x_ND)
        sizes = (N, A, E, D, F, precision, _threads())
        routes = (token_L, place_L, weight_NA, offset_E)
        call("minga_experts", x_ND, *routes, gate_up_EGD, down_EDF, hidden, act, y, out, *sizes)
        ctx.save_for_backward(x_ND, *routes, gate_up_EGD, down_EDF, hidden)
        ctx.sizes = sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, token_L, place_L, weight_NA, offset_E, gate_up_EGD, down_EDF, hidden = ctx.saved_tensors
        N, A, _, D, F, precision, _ = ctx.sizes
        work = [x_ND.new_empty(N * A, width) for width in (F, F, 2 * F, D)]
        dx, d_gate_up, d_down = (_gradient_of(t) for t in (x_ND, gate_up_EGD, down_EDF))
        d_weight = None if weight_NA is None else torch.empty_like(weight_NA)
        routes = (token_L, place_L, weight_NA, offset_E)
        inputs = (d_out.contiguous(), x_ND, *routes, gate_up_EGD, down_EDF, hidden)
        grads = (dx, d_weight, d_gate_up, d_down)
        call("minga_experts_backward", *inputs, *work, *grads, *ctx.sizes, _seed(precision))
        return dx, None, d_weight, d_gate_up, d_down, None


class RMSNorm(torch.autograd.Function):
    """x (.., D), weight (D) -> (.., D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1])
        call("minga_rms_norm", x, weight_D, y, rstd, rstd.numel(), x.shape[-1], float(eps), _threads())
        ctx.save_for_backward(x, weight_D, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, rstd = ctx.saved_tensors
        dx, d_weight, work = torch.empty_like(x), torch.empty_like(weight_D), x.new_empty(_NORM_CHUNKS, x.shape[-1])
        sizes = (rstd.numel(), x.shape[-1], _NORM_CHUNKS, _threads())
        call("minga_rms_norm_backward", dy.contiguous(), x, weight_D, rstd, dx, d_weight, work, *sizes)
        return dx, d_weight, None


class LatentAttention(torch.autograd.Function):
    """Rotation and causal attention in one: q (B, T, H, K+R), kv (B, T, H, K+V), rope (B, T, R) -> (B, T, H, V).

    cos and sin are (1 or B, T, P); segments (B, T) or None for one document a row. Neither rotated keys nor scores are
    kept: backward computes them again, a few rows at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHQ: Tensor,
        kv_BTHO: Tensor,
        rope_BTR: Tensor,
        cos: Tensor,
        sin: Tensor,
        segments_BT: Tensor | None,
        halves: bool,
        scale: float,
        precision: int,
    ) -> Tensor:
        tensors = [t.contiguous() for t in (q_BTHQ, kv_BTHO, rope_BTR, cos, sin)]
        segments_BT = None if segments_BT is None else segments_BT.contiguous()
        B, T, H, Q = q_BTHQ.shape
        R = rope_BTR.shape[-1]
        K, V = Q - R, kv_BTHO.shape[-1] - Q + R
        angles = T if cos.shape[0] == B > 1 else 0
        out, lse = q_BTHQ.new_empty(B, T, H, V), q_BTHQ.new_empty(B, H, T)
        sizes = (B, T, H, K, R, V, angles, int(halves), float(scale), precision, _threads())
        call("minga_attention", *tensors, segments_BT, out, lse, *sizes)
        ctx.save_for_backward(out, lse, *tensors, segments_BT)
        ctx.sizes = sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, q, kv, rope, cos, sin, segments = ctx.saved_tensors
        dq, dkv, d_rope = (torch.empty_like(t) for t in (q, kv, rope))
        work = q.new_empty(*lse.shape, rope.shape[-1])
        inputs = (d_out.contiguous(), out, lse, q, kv, rope, cos, sin, segments)
        call("minga_attention_backward", *inputs, dq, dkv, d_rope, work, *ctx.sizes)
        return dq, dkv, d_rope, None, None, None, None, None, None


def cross_entropy_in_place(logits_NV: Tensor, targets_N: Tensor, scale: float) -> Tensor:
    """Nats of each row, (N,), 0 where the target is negative; the logits become the gradient of scale · their sum."""
    loss_N = logits_NV.new_empty(len(logits_NV))
    call("minga_cross_entropy", logits_NV, targets_N, loss_N, *logits_NV.shape, float(scale), _threads())
    return loss_N


def muon_step(
    weight_SMN: Tensor,
    grad_SMN: Tensor,
    momentum: Tensor | tuple[Tensor, Tensor],
    coefficients: Tensor,
    *,
    beta: float,
    weight_decay: float,
    step_size: float,
    precision: str,
    block: int = 1,
) -> None:
    """One step of Muon for a stack of matrices: one matrix at a time in a core's cache, nothing else allocated.

    weight <- weight (1 - weight_decay) - step_size · orthogonalized(Nesterov momentum); the momentum is updated too.
    In 8 bits the momentum is its linear codes (S, M, N) and the largest magnitude of each `block` numbers of a row
    (minga/train/lowbit.py).
    """
    codes, absmax = momentum if isinstance(momentum, tuple) else (None, None)
    wide = None if isinstance(momentum, tuple) else momentum
    floats = [t for t in (weight_SMN, grad_SMN, wide, absmax) if t is not None]
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in floats)
    kept = (wide, codes, absmax, block)
    sizes = (*weight_SMN.shape, float(beta), float(weight_decay), float(step_size), len(coefficients))
    steps = coefficients.float().contiguous()
    call("minga_muon", weight_SMN, grad_SMN, *kept, steps, *sizes, PRECISIONS[precision], _threads())
