"""The experts of a layer as two grouped products. The rows of an expert are gathered and scattered by the products themselves.

A token and one of its A experts are a slot, number token · A + rank. Slots are sorted by expert, and an expert's slots are
cut into tiles of rows; `_plan` says for each tile which expert it belongs to and which slots it has. The number of tiles
is bounded without asking the GPU, and those beyond the last do nothing. The first product reads the row slot // A and
applies SwiGLU, the second reads the slot's own row and applies its weight. Both write to the slot's row, so that no two
programs add to one number and a result is the same each time; a token's A rows are added at the end.

  N tokens, A active experts a token, S = N·A slots, D model dim, F expert hidden, G = 2F gate and up, E experts
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minga.kernels.gpu.quantize import quantize_fp8, quantize_int8
from minga.kernels.gpu.tiles import accumulate, as_stored, dot_arguments, scales, tile_columns, tile_rows


@triton.jit
def _slots(order_ptr, plan_ptr, BLOCK_M: tl.constexpr):
    """This tile's expert (-1: none), its slots, and which of them there are."""
    tile, num_tiles = tl.program_id(0), tl.num_programs(0)
    expert = tl.load(plan_ptr + tile)
    place_M = tl.load(plan_ptr + num_tiles + tile) + tl.arange(0, BLOCK_M)
    valid_M = place_M < tl.load(plan_ptr + 2 * num_tiles + tile)
    return expert, tl.load(order_ptr + place_M, mask=valid_M, other=0), valid_M


@triton.jit
def _gate_up(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    out_ptr,
    order_ptr,
    plan_ptr,
    active,
    D,
    F,
    expert_scales,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, slot_M, valid_M = _slots(order_ptr, plan_ptr, BLOCK_M)
    if expert < 0:
        return
    # gate and up rows of a hidden number side by side, so that one product has both and `split` parts them
    place_N = tl.arange(0, BLOCK_N)
    hidden_N = (tl.program_id(1) * (BLOCK_N // 2) + place_N // 2).to(tl.int64)
    row_N = hidden_N + place_N % 2 * F
    both_MN = accumulate(
        x_ptr,
        x_scale_ptr,
        slot_M // active,
        valid_M,
        weight_ptr + expert * 2 * F * D,
        weight_scale_ptr + expert * expert_scales,
        row_N,
        hidden_N < F,
        row_N // ROWS,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        DOT,
        SCALED,
        PRECISION,
    )
    gate_MF, up_MF = tl.split(tl.reshape(both_MN, (BLOCK_M, BLOCK_N // 2, 2)))
    out_MF = gate_MF * tl.sigmoid(gate_MF) * up_MF
    column_F = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    valid_MF = valid_M[:, None] & (column_F < F)[None, :]
    tl.store(out_ptr + slot_M[:, None] * F + column_F[None, :], out_MF.to(out_ptr.dtype.element_ty), mask=valid_MF)


@triton.jit
def _down(
    hidden_ptr,
    hidden_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    out_ptr,
    order_ptr,
    plan_ptr,
    route_ptr,
    F,
    D,
    expert_scales,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, slot_M, valid_M = _slots(order_ptr, plan_ptr, BLOCK_M)
    if expert < 0:
        return
    row_N = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    out_MN = accumulate(
        hidden_ptr,
        hidden_scale_ptr,
        slot_M,
        valid_M,
        weight_ptr + expert * D * F,
        weight_scale_ptr + expert * expert_scales,
        row_N,
        row_N < D,
        row_N // ROWS,
        F,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        DOT,
        SCALED,
        PRECISION,
    )
    out_MN *= tl.load(route_ptr + slot_M, mask=valid_M, other=0).to(tl.float32)[:, None]
    valid_MN = valid_M[:, None] & (row_N < D)[None, :]
    tl.store(out_ptr + slot_M[:, None] * D + row_N[None, :], out_MN.to(out_ptr.dtype.element_ty), mask=valid_MN)


def experts(
    x_ND: Tensor,
    index_NA: Tensor,
    weight_NA: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    *,
    weight_scales: tuple[Tensor, Tensor] | None = None,
    block: int = 128,
) -> Tensor:
    """`reference.experts` in x's dtype, accumulated in float32; with `weight_scales`, from E4M3 or int8 weights.

    weight_scales: of both. E4M3: one a block of 128 × 128, (E, ceil(G / 128), ceil(D / 128)) and likewise; the inputs of
    both products are rounded by `fp8.quantize`. int8: one a block of `block` columns of a row, (E, G, ceil(D / block)) and
    likewise; the inputs are rounded by `reference.round_activations`.
    """
    (N, D), A = x_ND.shape, index_NA.shape[1]
    F = down_EDF.shape[2]
    hidden_SF, out_SD = x_ND.new_empty(N * A, F), x_ND.new_empty(N * A, D)
    if not N:
        return out_SD.view(N, D)
    block_m = tile_rows(N * A // len(down_EDF), 64)  # about an expert's share
    order_S, plan = _plan(index_NA, len(down_EDF), block_m)
    route_S = weight_NA.contiguous()
    gate_up_scale, down_scale = weight_scales or (None, None)
    for kernel, x, weight, scale, out, tail, columns in (
        (_gate_up, x_ND, gate_up_EGD, gate_up_scale, hidden_SF, (A, D, F), 2 * F),
        (_down, hidden_SF, down_EDF, down_scale, out_SD, (route_S, F, D), D),
    ):
        rows, x_scale = x.contiguous(), None
        if scale is not None:
            rows, x_scale = quantize_fp8(x) if weight.dtype == torch.float8_e4m3fn else quantize_int8(x, block)
        stored = as_stored(weight)
        block_n = tile_columns(columns, stored)
        kernel[(plan.shape[1], triton.cdiv(columns, block_n))](
            *(as_stored(rows), _scales(x_scale, rows), stored, _scales(scale, rows), out, order_S, plan),
            *(*tail, 0 if scale is None else scale[0].numel()),
            ROWS=128 if weight.dtype == torch.float8_e4m3fn else 1,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            SCALED=scale is not None,
            **_loop(rows, block if scale is not None else None),
        )
    return out_SD.view(N, A, D).sum(1)


def _plan(index_NA: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Slots sorted by expert, (S,), and for each tile its expert, its first place among them and the end, (3, tiles)."""
    chosen_S, order_S = index_NA.flatten().sort(stable=True)
    num_tiles = min(len(chosen_S), len(chosen_S) // block_m + num_experts)  # every expert may leave one tile part empty
    first_E = torch.searchsorted(chosen_S, torch.arange(num_experts + 1, device=chosen_S.device))
    tiles_E = (first_E.diff() + block_m - 1) // block_m
    end_E = tiles_E.cumsum(0)
    tile = torch.arange(num_tiles, device=chosen_S.device)
    expert = torch.searchsorted(end_E, tile, right=True)
    real = expert < num_experts
    expert = expert.clamp(max=num_experts - 1)
    first = first_E[expert] + (tile - (end_E - tiles_E)[expert]) * block_m
    return order_S, torch.stack([expert.where(real, -1), first, first_E[expert + 1]])


def _scales(scale: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel without scales still wants a pointer."""
    return stand_in if scale is None else scales(scale)


def _loop(rows: Tensor, block: int | None) -> dict[str, Any]:
    """How the summed dimension is walked: in scale blocks, else in 128 bytes a row."""
    block_k = 128 // rows.element_size() if block is None else block
    return {"BLOCK_K": block_k, **dot_arguments(rows), "num_warps": 4, "num_stages": 3}
