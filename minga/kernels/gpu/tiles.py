"""What the kernels share: the loop over the summed dimension of a product, with or without block scales.

M rows, N columns of a tile of the output, K columns that are summed
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret


@triton.jit
def e4m3_to_half(bits):
    """E4M3 bytes as float16, exactly: the same fields 7 bits higher, with an exponent whose bias is 8 more."""
    bits = bits.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    half = tl.where((bits & 0x7F) == 0x7F, 0x7E00, half).to(tl.uint16)  # all ones are NaN
    return half.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def operand(tile, DOT: tl.constexpr):
    """A loaded tile in the type that is multiplied."""
    if tile.dtype == tl.uint8:
        tile = e4m3_to_half(tile)
    return tile.to(DOT)


@triton.jit
def accumulate(
    a_ptr,
    a_scale_ptr,
    a_row_M,
    a_valid_M,
    b_ptr,
    b_scale_ptr,
    b_row_N,
    b_valid_N,
    b_scale_row_N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a[a_row] @ b[b_row].T in float32, of two row-major matrices of K columns.

    SCALED: a row of `a` and a block of rows of `b` have a scale for every BLOCK_K columns. The sum of a block is taken by
    the tensor cores, whole numbers in int32, and added to the total in float32: V3's promotion (section 3.3.2), since
    Hopper's tensor cores keep some 14 bits of a sum of FP8 products.
    """
    column_K = tl.arange(0, BLOCK_K)
    num_blocks = tl.cdiv(K, BLOCK_K)
    a_ptrs = a_ptr + a_row_M[:, None] * K + column_K[None, :]
    b_ptrs = b_ptr + b_row_N[None, :] * K + column_K[:, None]
    total_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(num_blocks):
        inside_K = column_K < K - block * BLOCK_K
        a_MK = operand(tl.load(a_ptrs, mask=a_valid_M[:, None] & inside_K[None, :], other=0.0), DOT)
        b_KN = operand(tl.load(b_ptrs, mask=b_valid_N[None, :] & inside_K[:, None], other=0.0), DOT)
        if SCALED:
            a_scale_M = tl.load(a_scale_ptr + a_row_M * num_blocks + block, mask=a_valid_M, other=0.0)
            b_scale_N = tl.load(b_scale_ptr + b_scale_row_N * num_blocks + block, mask=b_valid_N, other=0.0)
            part_MN = tl.dot(a_MK, b_KN, out_dtype=tl.int32 if DOT.is_int() else tl.float32)
            scale_MN = a_scale_M.to(tl.float32)[:, None] * b_scale_N.to(tl.float32)[None, :]
            total_MN += part_MN.to(tl.float32) * scale_MN
        else:
            total_MN = tl.dot(a_MK, b_KN, total_MN, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    return total_MN


def dot_arguments(tensor: Tensor) -> dict[str, Any]:
    """DOT and PRECISION for tiles of this tensor.

    E4M3 is multiplied as it is where tensor cores take it, from 8.9 on, and else as float16, which holds all its values.
    float32 is three products of its halves in TF32, nearly as exact and on the tensor cores, or one if torch is allowed that.
    """
    dtype = tensor.dtype
    if dtype == torch.float8_e4m3fn:
        dot = tl.float8e4nv if multiplies_e4m3(tensor.device) else tl.float16
    elif dtype == torch.bfloat16:
        dot = tl.float32 if INTERPRETED else tl.bfloat16  # the interpreter multiplies bf16 as if it were uint16
    else:
        dot = {torch.float32: tl.float32, torch.float16: tl.float16, torch.int8: tl.int8}[dtype]
    return {"DOT": dot, "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"}


def multiplies_e4m3(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def as_stored(tensor: Tensor) -> Tensor:
    """The tensor as a kernel takes it: before 8.9 Triton knows no E4M3, so its bytes."""
    hidden = tensor.dtype == torch.float8_e4m3fn and not multiplies_e4m3(tensor.device)
    return tensor.contiguous().view(torch.uint8) if hidden else tensor.contiguous()


def scales(scale: Tensor) -> Tensor:
    """Block scales as a kernel takes them; E8M0 is a type that Triton does not know."""
    return (scale if scale.dtype in (torch.float32, torch.float16) else scale.float()).contiguous()


def tile_rows(rows: int, largest: int) -> int:
    """Rows of a tile for a product of so many rows; tensor cores take 16 at a time."""
    return min(max(16, triton.next_power_of_2(rows)), largest)


def tile_columns(columns: int, stored: Tensor) -> int:
    """Columns of a tile for a product with this matrix: fewer where registers are short, since bytes are widened or float32
    is three numbers."""
    return tile_rows(columns, 64 if stored.dtype in (torch.uint8, torch.float32) else 128)
