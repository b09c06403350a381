"""GPTQ (arXiv 2210.17323): int4 weights chosen for the inputs that a layer really gets.

Rounding to nearest makes the smallest error in the weights; what counts is the error in the product, whose square is
(w - q) H (w - q).T for a row w and the inputs' second moments H. GPTQ rounds the columns in order and takes each column's
error back in the columns after it, as much as H says they can: with U.T U = H^-1, U upper triangular, column j's error
divided by U[j, j] is subtracted U[j, k] times from column k. A block's scale is chosen when its first column comes,
from the weights as they then are. It is a greedy way and no proof: a row that comes out worse is rounded to nearest.

  O output rows, I input columns
"""

from __future__ import annotations

import torch
from torch import Tensor

from minga.kernels import ops

DAMPING = 0.01  # of H's mean diagonal, added to it: the paper's (section 4)


def quantize_int4(
    weight_OI: Tensor, moments_II: Tensor, block: int, *, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """As `ops.quantize_int4`, with the second moments (.., I, I) of the inputs, in any unit and finite.

    Inputs that were always zero tell nothing: their columns are rounded to nearest.
    """
    rest_OI = weight_OI.float().clone()
    upper_II = _inverse_root(moments_II, damping)
    codes_OI, scales = torch.empty_like(rest_OI), []
    columns = rest_OI.shape[-1]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part = rest_OI[..., start:end]
        scale = ops.quantize_int4(part, block)[1]
        scales.append(scale)
        wide, errors = scale.float(), torch.empty_like(part)
        for j in range(end - start):
            column = part[..., j : j + 1]
            code = ops.to_int4(column, wide)
            root = upper_II[..., start + j, None, start + j : end]
            error = (column - code * wide) / root[..., :1]
            part[..., j:] -= error * root
            codes_OI[..., start + j : start + j + 1], errors[..., j : j + 1] = code, error
        rest_OI[..., end:] -= errors @ upper_II[..., start:end, end:]
    chosen, nearest = (ops.pack_int4(codes_OI), torch.cat(scales, -1)), ops.quantize_int4(weight_OI, block)
    better = output_error(weight_OI, *chosen, moments_II, block) < output_error(weight_OI, *nearest, moments_II, block)
    data, scale = (torch.where(better[..., None], *pair) for pair in zip(chosen, nearest, strict=True))
    return data, scale


def output_error(weight_OI: Tensor, stored: Tensor, scale_OG: Tensor, moments_II: Tensor, block: int) -> Tensor:
    """(w - q) H (w - q).T of each row, (.., O), float32: the square of what is wrong in the layer's output."""
    wide_OI = ops.dequantize_int4(stored, scale_OG, block, weight_OI.shape[-1], torch.float32)
    error_OI = weight_OI.float() - wide_OI
    return ((error_OI @ moments_II.float()) * error_OI).sum(-1)


def _inverse_root(moments_II: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U.T U the inverse of the damped moments, float32; computed in float64."""
    moments_II = moments_II.double()
    diagonal_I = moments_II.diagonal(dim1=-2, dim2=-1)
    mean = diagonal_I.mean(-1, keepdim=True)
    added_I = damping * mean + torch.where(diagonal_I == 0, torch.where(mean == 0, 1.0, mean), 0.0)
    lower_II = torch.linalg.cholesky(moments_II + torch.diag_embed(added_I))
    inverse_II = torch.cholesky_inverse(lower_II)
    return torch.linalg.cholesky(inverse_II, upper=True).float()
