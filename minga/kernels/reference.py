"""Each operation in plain torch, written to be read: the definition that every faster form is tested against.

B batch, T query tokens, S cached tokens, H heads, K nope dim, R rope dim, C latent, V value dim
N tokens of the whole batch, D model dim, E experts, A active experts a token, F expert hidden, Q groups of experts
O output rows, I input columns, G blocks of a row
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, einsum
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32 whatever the input (as transformers does)."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def masked_softmax(score_BHTS: Tensor, mask_BTS: Tensor | None) -> Tensor:
    """Softmax over S. `mask_BTS` is true where a query may look; None: T is the tail of S and may look at its past."""
    T, S = score_BHTS.shape[-2:]
    if mask_BTS is None:
        mask_BTS = torch.ones(T, S, dtype=torch.bool, device=score_BHTS.device).tril(S - T)[None]
    return score_BHTS.masked_fill(~mask_BTS[:, None], float("-inf")).softmax(-1)


def attend(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, mask_BTS: Tensor | None, *, scale: float) -> Tensor:
    """Softmax attention. Returns (B, T, H, V). Grouped queries: k and v may have fewer heads, which must divide H."""
    groups = q_BTHK.shape[2] // k_BSHK.shape[2]
    k_BSHK, v_BSHV = k_BSHK.repeat_interleave(groups, 2), v_BSHV.repeat_interleave(groups, 2)
    score_BHTS = einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * scale
    return einsum("bhts,bshv->bthv", masked_softmax(score_BHTS, mask_BTS), v_BSHV)


def attend_latent(
    q_nope_BTHK: Tensor,
    q_rope_BTHR: Tensor,
    latent_BSC: Tensor,
    rope_BSR: Tensor,
    mask_BTS: Tensor | None,
    *,
    w_uk_HKC: Tensor,
    w_uv_HVC: Tensor,
    scale: float,
) -> Tensor:
    """Attention over the latent cache in its naive form: keys and values are expanded for every cached token.

    V2 paper, section 2.1. Returns (B, T, H, V).
    """
    k_nope_BSHK = einsum("bsc,hkc->bshk", latent_BSC, w_uk_HKC)
    v_BSHV = einsum("bsc,hvc->bshv", latent_BSC, w_uv_HVC)
    k_rope_BSHR = rope_BSR[:, :, None].expand(-1, -1, k_nope_BSHK.shape[2], -1)
    q, k = torch.cat([q_nope_BTHK, q_rope_BTHR], -1), torch.cat([k_nope_BSHK, k_rope_BSHR], -1)
    return attend(q, k, v_BSHV, mask_BTS, scale=scale)


def attend_latent_absorbed(
    q_nope_BTHK: Tensor,
    q_rope_BTHR: Tensor,
    latent_BSC: Tensor,
    rope_BSR: Tensor,
    mask_BTS: Tensor | None,
    *,
    w_uk_HKC: Tensor,
    w_uv_HVC: Tensor,
    scale: float,
) -> Tensor:
    """The same attention with the up-projections folded into query and output (V2 paper, section 2.1.2).

    Equal to `attend_latent` up to rounding; the cache is read as it lies, H·(K+V)/(C+R) times fewer bytes a token.
    """
    q_latent_BTHC = einsum("bthk,hkc->bthc", q_nope_BTHK, w_uk_HKC)
    score_BHTS = einsum("bthc,bsc->bhts", q_latent_BTHC, latent_BSC) + einsum("bthr,bsr->bhts", q_rope_BTHR, rope_BSR)
    weight_BHTS = masked_softmax(score_BHTS * scale, mask_BTS)
    return einsum("bthc,hvc->bthv", einsum("bhts,bsc->bthc", weight_BHTS, latent_BSC), w_uv_HVC)


def attend_latent_paged(
    q_latent_BTHC: Tensor,
    q_rope_BTHR: Tensor,
    pages_NPW: Tensor,
    table_BL: Tensor,
    positions_BT: Tensor,
    *,
    scale: float,
) -> Tensor:
    """The middle of `attend_latent_absorbed`, over a cache in pages: (B, T, H, C), in the latent's space.

    N pages of P rows [latent C | rope R]. `table_BL`: the pages of each sequence, in order. A query sees the tokens 0 to
    its own position, which is 0 or more.
    """
    B, C = len(table_BL), q_latent_BTHC.shape[-1]
    row_BSW = pages_NPW[table_BL].reshape(B, -1, pages_NPW.shape[-1])
    latent_BSC, rope_BSR = row_BSW[..., :C], row_BSW[..., C:]
    score_BHTS = einsum("bthc,bsc->bhts", q_latent_BTHC, latent_BSC) + einsum("bthr,bsr->bhts", q_rope_BTHR, rope_BSR)
    mask_BTS = torch.arange(row_BSW.shape[1], device=row_BSW.device) <= positions_BT[..., None]
    return einsum("bhts,bsc->bthc", masked_softmax(score_BHTS * scale, mask_BTS), latent_BSC)


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
    """A of E experts for each token: their numbers (N, A), weights (N, A) and all scores (N, E), in the logits' float32.

    The bias takes part in the choice only, never in the weight (V3 section 2.1.2).
    """
    score_NE = logits_NE.sigmoid() if sigmoid else logits_NE.softmax(-1)
    groups = {"num_groups": num_groups, "groups_kept": groups_kept, "group_top": group_top}
    index_NA = choose_experts(score_NE.detach(), bias_E, num_active=num_active, **groups)
    weight_NA = score_NE.gather(1, index_NA)
    if normalize:
        weight_NA = weight_NA / (weight_NA.sum(-1, keepdim=True) + 1e-20)
    return index_NA, weight_NA * scale, score_NE


def choose_experts(
    score_NE: Tensor, bias_E: Tensor | None, *, num_active: int, num_groups: int, groups_kept: int, group_top: int
) -> Tensor:
    """The numbers of the best experts by score and bias, (N, A), in no order.

    They come from the `groups_kept` groups whose `group_top` best add up to most: 2 in V3, 1 in V2. All groups kept: there
    is no limit.
    """
    if bias_E is not None:
        score_NE = score_NE + bias_E
    if groups_kept < num_groups:
        group_NQE = score_NE.unflatten(1, (num_groups, -1))
        group_score_NQ = group_NQE.topk(group_top, -1).values.sum(-1)
        kept = group_score_NQ.topk(groups_kept, -1, sorted=False).indices
        allowed_NQ = torch.zeros_like(group_score_NQ, dtype=torch.bool).scatter_(1, kept, True)
        # -inf, not 0: with a bias a score may be negative, and 0 would win against it
        score_NE = group_NQE.masked_fill(~allowed_NQ[..., None], float("-inf")).flatten(1)
    return score_NE.topk(num_active, -1, sorted=False).indices


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, the two halves of the last dimension."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def experts(x_ND: Tensor, index_NA: Tensor, weight_NA: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """Weighted sum of each token's experts, a SwiGLU each (G = 2F: gate rows, then up rows). Returns (N, D)."""

    def expert(number: int, x: Tensor) -> Tensor:
        return swiglu(x @ gate_up_EGD[number].T) @ down_EDF[number].T

    return _each_expert(expert, len(gate_up_EGD), x_ND, index_NA, weight_NA)


def _each_expert(
    expert: Callable[[int, Tensor], Tensor], num_experts: int, x_ND: Tensor, index_NA: Tensor, weight_NA: Tensor
) -> Tensor:
    """One expert after the other over a mask of the tokens that chose it; nothing is sorted or gathered cleverly."""
    out_ND = torch.zeros_like(x_ND)
    for number in range(num_experts):
        chosen_NA = index_NA == number
        tokens = chosen_NA.any(-1)
        out_ND[tokens] += expert(number, x_ND[tokens]) * (weight_NA * chosen_NA).sum(-1)[tokens, None]
    return out_ND


def quantize_int8(weight_OI: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 in blocks along a row: returns int8 (..., O, I) and float16 scales (..., O, ceil(I/block)).

    The scale is max|w|/127, rounded up to float16 so that no value leaves [-127, 127]; a last block may be partial.
    """
    *lead, columns = weight_OI.shape
    padded = F.pad(weight_OI.float(), (0, -columns % block)).reshape(*lead, -1, block)
    scale = padded.abs().amax(-1) / 127
    half = scale.clamp(max=65504.0).half()
    half = torch.where(half.float() < scale, torch.nextafter(half, torch.full_like(half, 65504.0)), half)
    quantized = (padded / half.float().clamp(min=1e-12)[..., None]).round().clamp(-127, 127).to(torch.int8)
    return quantized.reshape(*lead, -1)[..., :columns].contiguous(), half


def dequantize_int8(weight_OI: Tensor, scale_OG: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_int8`, up to rounding of half a scale."""
    wide = scale_OG.to(dtype).repeat_interleave(block, -1)[..., : weight_OI.shape[-1]]
    return weight_OI.to(dtype) * wide


def round_activations(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """int8 (..., I) and float32 scales (..., G): the nearest multiples of a block's max|x| / 127, as the int8 products see x.

    Not `quantize_int8`: nothing of this is stored, so the scale is the exact one. A block with an infinity or a NaN becomes
    zeros times NaN.
    """
    blocks = F.pad(x.float(), (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    top = blocks.abs().amax(-1)
    lost = ~top.isfinite()
    end = top.new_tensor(127.0)  # not a Python number: torch then multiplies with an inverse, which rounds twice
    rounded = (blocks * (end / top.clamp(min=1e-36))[..., None]).round().masked_fill(lost[..., None], 0)
    return rounded.to(torch.int8).flatten(-2)[..., : x.shape[-1]], (top / end).masked_fill(lost, float("nan"))


def block_gemm(
    x_NI: Tensor, x_scale_NG: Tensor, weight_OI: Tensor, weight_scale: Tensor, *, block: int, rows: int
) -> Tensor:
    """x @ W.T of two matrices in 8 bits, (N, O) float32: the sum over blocks of products times both blocks' scales.

    A scale of x belongs to `block` columns of a row, one of W, (ceil(O / rows), G), to as many columns of `rows` rows.
    """
    columns = x_NI.shape[1]
    x = x_NI.float() * x_scale_NG.float().repeat_interleave(block, 1)[:, :columns]
    scale_OI = weight_scale.float().repeat_interleave(rows, 0).repeat_interleave(block, 1)
    return x @ (weight_OI.float() * scale_OI[: len(weight_OI), :columns]).T


def linear_int8(x: Tensor, weight_OI: Tensor, scale_OG: Tensor, block: int) -> Tensor:
    """x @ W.T over the last dimension of x, of int8 weights as `quantize_int8` makes them and x rounded in the same blocks."""
    rows, row_scale = round_activations(x.flatten(0, -2), block)
    y = block_gemm(rows, row_scale, weight_OI, scale_OG, block=block, rows=1)
    return y.to(x.dtype).unflatten(0, x.shape[:-1])


def experts_int8(
    x_ND: Tensor,
    index_NA: Tensor,
    weight_NA: Tensor,
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    *,
    block: int,
) -> Tensor:
    """`experts` with int8 weights and their scales: (E, G, D) and (E, D, F) with one a block of a row."""

    def expert(number: int, x: Tensor) -> Tensor:
        first, second = ((stored[number], scale[number]) for stored, scale in (gate_up, down))
        return linear_int8(swiglu(linear_int8(x, *first, block)), *second, block)

    return _each_expert(expert, len(gate_up[0]), x_ND, index_NA, weight_NA)


def quantize_int4(weight_OI: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Symmetric int4 (-8 .. 7) in blocks along a row: bytes (..., O, ceil(I/8)*4) and float16 scales (..., O, ceil(I/block)).

    Byte j of each four holds column j of eight in its low half and column j + 4 in its high half, each plus 8. The number
    of largest magnitude becomes -8 times a scale, as in GGUF's Q4_0, or that scale made smaller by up to a third:
    whichever leaves the least squared error, for most numbers of a block lie far from its end.
    """
    *lead, columns = weight_OI.shape
    blocks = F.pad(weight_OI.float(), (0, -columns % block)).reshape(*lead, -1, block)
    end = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    best, chosen = torch.full_like(end, float("inf")), end
    for shrink in torch.linspace(1.0, 0.65, 15).tolist():
        scale = (end * shrink).half().float()
        error = (to_int4(blocks, scale) * scale - blocks).square().sum(-1, keepdim=True)
        best, chosen = torch.where(error < best, error, best), torch.where(error < best, scale, chosen)
    codes = to_int4(blocks, chosen).flatten(-2)[..., :columns]
    return pack_int4(codes), chosen.squeeze(-1).half()


def to_int4(x: Tensor, scale: Tensor) -> Tensor:
    """The whole numbers (-8 .. 7, as floats) nearest to x / scale."""
    return (x / torch.where(scale == 0, 1.0, scale)).round().clamp(-8, 7)


def pack_int4(codes: Tensor) -> Tensor:
    """Whole numbers -8 .. 7 (..., I) as bytes (..., ceil(I/8)*4), in the order that `quantize_int4` describes."""
    return pack_codes(F.pad(codes + 8, (0, -codes.shape[-1] % 8), value=8).to(torch.uint8), 4, 8)


def dequantize_int4(stored: Tensor, scale_OG: Tensor, block: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_int4`, up to rounding: (..., O, columns)."""
    return dequantize_codes(unpack_codes(stored, 4, block)[..., :columns], scale_OG, None, 8, block, dtype)


def pack_codes(codes_OI: Tensor, bits: int, block: int) -> Tensor:
    """Codes of 4, 5 or 6 bits, (.., I) uint8 with I a multiple of 8, as bytes of a row, (.., I * bits / 8).

    Byte j of each four holds the low four bits of column j of eight in its low half and of column j + 4 in its high half.
    What is above them follows each block as four bytes more: byte j has that of columns j, j + 4, j + 8, .., from its
    lowest bits on, so that the block has as many columns as find room.
    """
    eights = codes_OI.contiguous().view(torch.int32).unflatten(-1, (-1, 2))  # four codes to a word: fewer numbers
    low = eights & 0x0F0F0F0F
    low = low[..., 0] | low[..., 1] << 4
    if bits == 4:
        return low.view(torch.uint8)
    above = (eights >> 4 & 0x01010101 * ((1 << bits - 4) - 1)).flatten(-2).unflatten(-1, (-1, block // 4))
    high = (above << torch.arange(block // 4, dtype=torch.int32) * (bits - 4)).sum(-1, keepdim=True, dtype=torch.int32)
    return torch.cat([low.unflatten(-1, (-1, block // 8)), high], -1).flatten(-2).view(torch.uint8)


def unpack_codes(stored: Tensor, bits: int, block: int) -> Tensor:
    """The inverse of `pack_codes`."""
    if bits == 4:
        fours = stored.unflatten(-1, (-1, 4))
        return torch.stack([fours & 15, fours >> 4], -2).flatten(-3)
    words = stored.unflatten(-1, (-1, block // 8 + 1, 4))
    low, high = unpack_codes(words[..., :-1, :].flatten(-2), 4, block), words[..., -1:, :]
    places = (torch.arange(block // 4) * (bits - 4)).to(torch.uint8)[:, None]
    above = high >> places & (1 << bits - 4) - 1
    return (low | above.flatten(-2) << 4).flatten(-2)


def dequantize_codes(
    codes_OI: Tensor, scale_OG: Tensor, minimum_OG: Tensor | None, zero: int, block: int, dtype: torch.dtype
) -> Tensor:
    """scale * (code - zero), plus the minimum where blocks have one."""
    columns = codes_OI.shape[-1]
    wide = (codes_OI.to(dtype) - zero) * scale_OG.to(dtype).repeat_interleave(block, -1)[..., :columns]
    return wide if minimum_OG is None else wide + minimum_OG.to(dtype).repeat_interleave(block, -1)[..., :columns]


def round_as_llama(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """What a product sees of its activations beside GGUF's types, as in llama.cpp (quantize_row_q8_0, _q8_1, _q8_K).

    Returns them rounded to int8 in blocks of 32 with a float16 scale, or of 256 in which the number of largest magnitude
    becomes -127, and for every 32 of them, (.., I / 32), what a minimum is multiplied with: their sum, rounded to float16
    for blocks of 32.
    """
    blocks = x.unflatten(-1, (-1, block))
    top = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    top = top.abs() / 127 if block == 32 else top / -127
    codes = torch.where(top == 0, 0, blocks / top).round()
    sums = (codes.unflatten(-1, (-1, 32)).sum(-1) * top).flatten(-2)
    if block == 32:
        return (codes * top.half().to(x.dtype)).flatten(-2), sums.half().to(x.dtype)
    return (codes * top).flatten(-2), sums


RUN = 128  # values along the summed dimension that share a scale when products are computed in int8


def round_to(x: Tensor, precision: str, dim: int, *, run: int = RUN) -> Tensor:
    """The values that a product summed over `dim` sees: rounded to bf16, or to int8 in runs along `dim`."""
    if precision == "bf16":
        return x.bfloat16().to(x.dtype)
    x = x.movedim(dim, -1)
    runs = F.pad(x, (0, -x.shape[-1] % run)).unflatten(-1, (-1, run))
    scale = runs.abs().amax(-1, keepdim=True) / 127
    rounded = (runs / scale.clamp(min=1e-30)).round() * scale
    return rounded.flatten(-2)[..., : x.shape[-1]].movedim(-1, dim)


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, precision: str) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.precision = precision
        return F.linear(round_to(x, precision, -1), round_to(weight_OI, precision, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_OI = ctx.saved_tensors
        dx = round_to(dy, ctx.precision, -1) @ round_to(weight_OI, ctx.precision, 0)
        dy_NO, x_NI = dy.flatten(0, -2), x.flatten(0, -2)
        dw = round_to(dy_NO, ctx.precision, 0).T @ round_to(x_NI, ctx.precision, 0)
        return dx, dw, None


def linear_rounded(x: Tensor, weight_OI: Tensor, bias: Tensor | None = None, *, precision: str) -> Tensor:
    """x @ W.T + bias with operands of all three products (forward, both of backward) rounded to bf16 or int8.

    Each operand is rounded along the dimension that its product sums over (V3 section 3.3.2). To the nearest; the compiled
    kernels round gradients stochastically in int8.
    """
    y: Tensor = _RoundedLinear.apply(x, weight_OI, precision)
    return y if bias is None else y + bias
