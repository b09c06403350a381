"""Products of two matrices in 8 bits, each with its block scales: V3's E4M3 (section 3.3) and our int8 are one kernel.

  format   columns of a block   rows of the second matrix that share a scale
  E4M3     128                  128 (weights), or 1 (both operands of a weight's gradient)
  int8     64                   1

The last block of a side may be cut.

  M rows, N output columns, K summed columns, G blocks of a row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minga.kernels.gpu.tiles import accumulate, as_stored, dot_arguments, scales, tile_columns, tile_rows

_NEIGHBOURS = 8  # tiles of rows that go through the columns together, so that the second matrix stays in the L2 cache


@triton.jit
def _block_gemm(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    m, n = tl.swizzle2d(program // num_n, program % num_n, num_m, num_n, NEIGHBOURS)
    row_M = (m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column_N = (n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    out_MN = accumulate(
        x_ptr,
        x_scale_ptr,
        row_M,
        row_M < M,
        weight_ptr,
        weight_scale_ptr,
        column_N,
        column_N < N,
        column_N // ROWS,
        K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        DOT,
        True,
        PRECISION,
    )
    valid_MN = (row_M < M)[:, None] & (column_N < N)[None, :]
    tl.store(out_ptr + row_M[:, None] * N + column_N[None, :], out_MN.to(out_ptr.dtype.element_ty), mask=valid_MN)


def block_gemm(
    x_MK: Tensor,
    x_scale_MG: Tensor,
    weight_NK: Tensor,
    weight_scale: Tensor,
    *,
    block: int,
    rows: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`reference.block_gemm`, (M, N) in `dtype`. Both matrices E4M3 or both int8; weight_scale: (ceil(N / rows), G).

    `block` is a power of two from 32 on. Scales are float32, float16 or E8M0.
    """
    M, K = x_MK.shape
    N = weight_NK.shape[0]
    out_MN = torch.empty(M, N, dtype=dtype, device=x_MK.device)
    if not out_MN.numel():
        return out_MN
    x, weight = as_stored(x_MK), as_stored(weight_NK)
    block_m, block_n = tile_rows(M, 64), tile_columns(N, weight)
    _block_gemm[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
        *(x, scales(x_scale_MG), weight, scales(weight_scale)),
        *(out_MN, M, N, K),
        ROWS=rows,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block,
        NEIGHBOURS=_NEIGHBOURS,
        **dot_arguments(x_MK),
        num_warps=4,
        num_stages=3,
    )
    return out_MN
