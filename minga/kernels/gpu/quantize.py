"""Activations in 8 bits, with a scale for each block along a row, as the products of `block_gemm` take them.

N rows, K columns, G blocks of a row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16  # of a program


@triton.jit
def _quantize(x_ptr, values_ptr, scale_ptr, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FP8: tl.constexpr):
    block, num_blocks = tl.program_id(1), tl.num_programs(1)
    row_N = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    column_K = block * BLOCK_K + tl.arange(0, BLOCK_K)
    offset_NK = row_N[:, None] * K + column_K[None, :]
    valid_NK = (row_N < N)[:, None] & (column_K < K)[None, :]
    x_NK = tl.load(x_ptr + offset_NK, mask=valid_NK, other=0).to(tl.float32)
    top_N = tl.max(tl.abs(x_NK), 1)
    # a maximum passes over NaN, and infinity has no scale: a run that diverges must say so
    lost_N = tl.max((~(tl.abs(x_NK) <= 3.4028234663852886e38)).to(tl.int32), 1) > 0
    if FP8:
        # E8M0, the smallest 2**k with top / 2**k <= 1.75 · 2**8: adding carries into the exponent if the mantissa is above
        exponent_N = tl.maximum(((top_N.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8, 1)
        inverse_N = ((254 - exponent_N) << 23).to(tl.float32, bitcast=True)
        values_NK = tl.where(lost_N[:, None], 0x7F, _to_e4m3(x_NK * inverse_N[:, None])).to(tl.uint8)
        scale_N = tl.where(lost_N, 255, exponent_N).to(tl.uint8)
    else:
        end_N = tl.full((BLOCK_N,), 127.0, tl.float32)
        inverse_N = tl.div_rn(end_N, tl.maximum(top_N, 1e-36))
        # from 1.5 · 2**23 on float32 holds whole numbers only: adding rounds, a tie to the even one
        rounded_NK = (x_NK * inverse_N[:, None] + 12582912.0) - 12582912.0
        values_NK = tl.where(lost_N[:, None], 0.0, rounded_NK).to(tl.int8)
        scale_N = tl.where(lost_N, float("nan"), tl.div_rn(top_N, end_N))
    tl.store(values_ptr + offset_NK, values_NK, mask=valid_NK)
    tl.store(scale_ptr + row_N * num_blocks + block, scale_N, mask=row_N < N)


@triton.jit
def _to_e4m3(x):
    """The bytes of the nearest E4M3 values, ties to even, of |x| <= 448; in integers, for chips that know no E4M3."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # below 2**-6 a step is 2**-9, which is float32's own step at 2**14
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`fp8.quantize` in blocks of 1 × 128, bit for bit: E4M3 (..., K) and E8M0 scales (..., G)."""
    values, scale = _launch(x, 128, torch.uint8, torch.uint8)
    return values.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)


def quantize_int8(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """`reference.round_activations`: int8 (..., K) and float32 scales (..., G). `block`: a power of two."""
    return _launch(x, block, torch.int8, torch.float32)


def _launch(x: Tensor, block: int, values_dtype: torch.dtype, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    K, num_blocks = x.shape[-1], triton.cdiv(x.shape[-1], block)
    values = torch.empty_like(x, dtype=values_dtype)
    scale = x.new_empty((*x.shape[:-1], num_blocks), dtype=scale_dtype)
    if x.numel():
        N = x.numel() // K
        grid = (triton.cdiv(N, _ROWS), num_blocks)
        _quantize[grid](
            *(x, values, scale, N, K),
            BLOCK_N=_ROWS,
            BLOCK_K=block,
            FP8=values_dtype == torch.uint8,
            enable_fp_fusion=False,  # to round a product that was not rounded itself may give another whole number
        )
    return values, scale
