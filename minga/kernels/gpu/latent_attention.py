"""Absorbed latent attention over a paged cache (V2 section 2.1.2), for the few queries of a decoding step.

A cached token is one row [latent C | rope R] that all heads share, key and value at once: a program takes some heads and
reads each row once. Few sequences would leave most of the GPU idle, so a sequence's tokens are split among programs
(Flash-Decoding): `_partial` has the attention over each part and the logarithm of its sum, `_combine` weighs the parts.

A sequence's tokens lie in pages of P rows, in the order of its row of the table: `minga.model.cache` as it is.

  B sequences, T query tokens of each, H heads, C latent, R rope dim, M = T·H rows of queries, S cached tokens, P rows of
  a page, W = C + R, L parts
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from minga.kernels.gpu.tiles import dot_arguments, tile_rows

_LEAST = 128  # tokens that are worth a program of their own


@triton.jit
def _partial(
    q_latent_ptr,
    q_rope_ptr,
    pages_ptr,
    table_ptr,
    positions_ptr,
    out_ptr,
    log_sum_ptr,
    scale,
    T,
    H,
    C,
    R,
    page_rows,
    page_stride,
    row_stride,
    table_width,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    sequence, part, num_parts = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    row_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_M = row_M < T * H
    column_C, column_R = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    query_M = (sequence * T * H + row_M).to(tl.int64)
    q_latent_MC = tl.load(
        q_latent_ptr + query_M[:, None] * C + column_C[None, :],
        mask=valid_M[:, None] & (column_C < C)[None, :],
        other=0.0,
    ).to(DOT)
    q_rope_MR = tl.load(
        q_rope_ptr + query_M[:, None] * R + column_R[None, :],
        mask=valid_M[:, None] & (column_R < R)[None, :],
        other=0.0,
    ).to(DOT)
    last_M = tl.load(positions_ptr + sequence * T + row_M // H, mask=valid_M, other=-1).to(tl.int32)
    length = tl.max(last_M, 0) + 1
    part_length = tl.cdiv(tl.cdiv(length, num_parts), BLOCK_S) * BLOCK_S
    first = part * part_length
    end = tl.minimum(first + part_length, length)

    top_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((BLOCK_M,), tl.float32)
    total_MC = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(first, end, BLOCK_S):
        token_S = start + tl.arange(0, BLOCK_S)
        there_S = token_S < end
        page_S = tl.load(table_ptr + sequence * table_width + token_S // page_rows, mask=there_S, other=0).to(tl.int64)
        cached_S = pages_ptr + page_S * page_stride + (token_S % page_rows).to(tl.int64) * row_stride
        latent_SC = tl.load(
            cached_S[:, None] + column_C[None, :], mask=there_S[:, None] & (column_C < C)[None, :], other=0.0
        ).to(DOT)
        rope_SR = tl.load(
            cached_S[:, None] + C + column_R[None, :], mask=there_S[:, None] & (column_R < R)[None, :], other=0.0
        ).to(DOT)
        score_MS = tl.dot(q_latent_MC, tl.trans(latent_SC), input_precision=PRECISION)
        score_MS = tl.dot(q_rope_MR, tl.trans(rope_SR), score_MS, input_precision=PRECISION)
        seen_MS = there_S[None, :] & (token_S[None, :] <= last_M[:, None])
        # exp(x) = exp2(x · log2 e)
        score_MS = tl.where(seen_MS, score_MS * (scale * 1.4426950408889634), float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(score_MS, 1))
        shift_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)  # a row that has seen nothing yet stays zero
        weight_MS = tl.exp2(score_MS - shift_M[:, None])
        fade_M = tl.exp2(top_M - shift_M)
        sum_M = sum_M * fade_M + tl.sum(weight_MS, 1)
        total_MC = tl.dot(weight_MS.to(DOT), latent_SC, total_MC * fade_M[:, None], input_precision=PRECISION)
        top_M = new_top_M

    slot_M = query_M * num_parts + part
    mean_MC = total_MC / tl.where(sum_M > 0, sum_M, 1.0)[:, None]
    tl.store(
        out_ptr + slot_M[:, None] * C + column_C[None, :], mean_MC, mask=valid_M[:, None] & (column_C < C)[None, :]
    )
    tl.store(log_sum_ptr + slot_M, top_M + tl.log2(sum_M), mask=valid_M)


@triton.jit
def _combine(part_ptr, log_sum_ptr, out_ptr, C, num_parts, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    query = tl.program_id(0).to(tl.int64)
    part_L, column_C = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_C)
    log_sum_L = tl.load(log_sum_ptr + query * num_parts + part_L, mask=part_L < num_parts, other=float("-inf"))
    top = tl.max(log_sum_L, 0)
    total = tl.sum(tl.exp2(log_sum_L - top), 0)
    out_C = tl.zeros((BLOCK_C,), tl.float32)
    for part in range(num_parts):
        share = tl.exp2(tl.load(log_sum_ptr + query * num_parts + part) - top) / total
        mean_C = tl.load(part_ptr + (query * num_parts + part) * C + column_C, mask=column_C < C, other=0.0)
        out_C += share * mean_C
    tl.store(out_ptr + query * C + column_C, out_C.to(out_ptr.dtype.element_ty), mask=column_C < C)


def attend_latent_paged(
    q_latent_BTHC: Tensor,
    q_rope_BTHR: Tensor,
    pages_NPW: Tensor,
    table_BL: Tensor,
    positions_BT: Tensor,
    *,
    scale: float,
    num_parts: int | None = None,
) -> Tensor:
    """`reference.attend_latent_paged`, (B, T, H, C). num_parts: None chooses enough to fill the GPU twice."""
    B, T, H, C = q_latent_BTHC.shape
    R, page_rows = q_rope_BTHR.shape[-1], pages_NPW.shape[1]
    if pages_NPW.stride(2) != 1:
        pages_NPW = pages_NPW.contiguous()
    block_m = tile_rows(T * H, 16)
    num_m = triton.cdiv(T * H, block_m)
    if num_parts is None:
        num_parts = _num_parts(B * num_m, table_BL.shape[1] * page_rows, pages_NPW.device)
    block_c, block_r = (max(16, triton.next_power_of_2(n)) for n in (C, R))
    wide = pages_NPW.element_size() == 4
    part_MLC = torch.empty(B * T * H, num_parts, C, dtype=torch.float32, device=pages_NPW.device)
    log_sum_ML = torch.empty_like(part_MLC[..., 0])
    out_BTHC = torch.empty_like(q_latent_BTHC, memory_format=torch.contiguous_format)
    _partial[(B, num_m, num_parts)](
        *(q_latent_BTHC.contiguous(), q_rope_BTHR.contiguous(), pages_NPW, table_BL.contiguous()),
        *(positions_BT.expand(B, T).contiguous(), part_MLC, log_sum_ML, scale, T, H, C, R),
        *(page_rows, pages_NPW.stride(0), pages_NPW.stride(1), table_BL.shape[1]),
        BLOCK_M=block_m,
        BLOCK_S=16 if wide else 32,
        BLOCK_C=block_c,
        BLOCK_R=block_r,
        # three TF32 products want more shared memory than chips of 8.6 and 8.9 have
        **dot_arguments(pages_NPW) | {"PRECISION": "ieee"},
        num_warps=4,
        num_stages=1 if wide else 2,
    )
    _combine[(B * T * H,)](
        *(part_MLC, log_sum_ML, out_BTHC, C, num_parts), BLOCK_L=triton.next_power_of_2(num_parts), BLOCK_C=block_c
    )
    return out_BTHC


def _num_parts(programs: int, tokens: int, device: torch.device) -> int:
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(triton.cdiv(2 * processors, programs), triton.cdiv(tokens, _LEAST)))
