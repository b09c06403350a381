"""Block-FP8 products as DeepSeek-V3 trains with them (V3 sections 3.3 and 3.5.2), on a GPU or emulated in plain torch.

All tensors are E4M3 (4 exponent bits, 3 of mantissa, largest value 448). Activations and gradients share a scale along
a tile of 1 token × 128 channels, weights along a block of 128 × 128; a scale is taken from the largest value of its
tile at that moment and is a power of two, one E8M0 byte (V3.1). Each of the three products reads quantised operands:

  forward     y  = x · W.T    x in tiles along its channels, W in blocks
  gradient    dx = g · W      g in tiles along its channels, the same W
  of weights  dW = g.T · x    both in tiles of 128 tokens × 1 channel: x from the forward's FP8, g from the gradient

The last one sums over tokens, and a scale may not change within a sum's tile. Since scales are powers of two, that
second quantisation of x loses nothing but what falls below the new tile's smallest step.

On an NVIDIA GPU the tensor cores multiply what was quantised (minga/kernels/gpu/block_gemm.py). Elsewhere this is emulated:
quantised, widened to float32 and multiplied there. A product of two E4M3 values has at most 8 significant
bits and the scales move its exponent only, so every term is exact: the result differs from exact arithmetic over the
same bytes by float32 accumulation alone, which is what V3's promotion to float32 every 128 terms aims at. It is here to
prove the loss, not for speed. What it does keep of FP8 is memory: activations wait for the backward as bytes.
Outputs are in the input's dtype. Not emulated: V3 keeps the input of the projection after attention in E5M6.

  N tokens, I input columns, O output columns, E experts
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minga.kernels import gpu

ALONG_CHANNELS, ALONG_TOKENS, WEIGHT = (1, 128), (128, 1), (128, 128)  # rows and columns that share a scale


def quantize(x: Tensor, block: tuple[int, int], *, power_of_two: bool = True) -> tuple[Tensor, Tensor]:
    """E4M3 values of x (..., R, C) and an E8M0 scale for each block; blocks at the far edges may be partial.

    The scale is the smallest power of two that brings the block's largest value to 448 or below (2**-126 at least, so
    that its inverse is a number). A block that holds an infinity or a NaN becomes NaN: a run that diverges must say so.
    Without `power_of_two` it is the float32 that makes the largest value 448, as in the files of DeepSeek-V3.
    """
    if block == ALONG_CHANNELS and gpu.usable(x):
        from minga.kernels.gpu.quantize import quantize_fp8

        return quantize_fp8(x)
    tiles = _blocks(x.float(), block)
    amax = tiles.abs().amax((-3, -1))
    scale = _power_of_two(amax) if power_of_two else (amax / 448).clamp(min=2.0**-126)
    values = (tiles / _spread(scale)).to(torch.float8_e4m3fn).flatten(-2).flatten(-3, -2)
    return values[..., : x.shape[-2], : x.shape[-1]], scale


def dequantize(values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """The float32 numbers that `quantize` stored; exact if the scales are powers of two, as ours are."""
    wide = _widen(values)
    return (_blocks(wide, block) * _spread(scale)).flatten(-2).flatten(-3, -2)[..., : wide.shape[-2], : wide.shape[-1]]


def linear(x: Tensor, weight_OI: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias over the last dimension of x, forward and backward from FP8 operands; the bias is added as it is."""
    x_NI = x.flatten(0, -2)
    y = grouped_linear(x_NI, weight_OI[None], [len(x_NI)]).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, counts: Sequence[int]) -> Tensor:
    """The first counts[0] rows of x times the first weight, and so on: (N, O). Tiles never reach into another group."""
    y_NO: Tensor = _GroupedLinear.apply(x_NI, weight_EOI, counts)
    return y_NO


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_EOI: Tensor, counts: Sequence[int]) -> Tensor:
        x, weight = quantize(x_NI, ALONG_CHANNELS), quantize(weight_EOI, WEIGHT)
        ctx.save_for_backward(*x, *weight)
        ctx.counts, ctx.dtypes = counts, (x_NI.dtype, weight_EOI.dtype)
        if gpu.usable(*x, *weight):
            return _grouped_on_gpu(x, weight, counts).to(x_NI.dtype)
        y_NO = torch.empty(len(x_NI), weight_EOI.shape[1], device=x_NI.device)
        groups = (dequantize(*x, ALONG_CHANNELS).split(counts), dequantize(*weight, WEIGHT), y_NO.split(counts))
        for rows_NI, weight_OI, out_NO in zip(*groups, strict=True):
            torch.mm(rows_NI, weight_OI.T, out=out_NO)
        return y_NO.to(x_NI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, x_scale, weight, weight_scale = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        grad_x_NI = grad_weight_EOI = None
        if gpu.usable(grad_NO, x):
            if ctx.needs_input_grad[0]:
                turned = (weight.mT, weight_scale.mT)  # blocks are square
                grad_x_NI = _grouped_on_gpu(quantize(grad_NO, ALONG_CHANNELS), turned, ctx.counts).to(x_dtype)
            if ctx.needs_input_grad[1]:
                rows_NI = dequantize(x, x_scale, ALONG_CHANNELS)
                pairs = zip(grad_NO.split(ctx.counts), rows_NI.split(ctx.counts), strict=True)
                grad_weight_EOI = torch.stack([_over_tokens_on_gpu(*pair) for pair in pairs]).to(weight_dtype)
            return grad_x_NI, grad_weight_EOI, None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty(x.shape, device=x.device)
            tiles_NO = _rounded(grad_NO, ALONG_CHANNELS)
            groups = (tiles_NO.split(ctx.counts), dequantize(weight, weight_scale, WEIGHT), grad_x.split(ctx.counts))
            for rows_NO, weight_OI, out_NI in zip(*groups, strict=True):
                torch.mm(rows_NO, weight_OI, out=out_NI)
            grad_x_NI = grad_x.to(x_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty(weight.shape, device=x.device)
            rows = dequantize(x, x_scale, ALONG_CHANNELS).split(ctx.counts)
            for rows_NI, rows_NO, out_OI in zip(rows, grad_NO.split(ctx.counts), grad_weight, strict=True):
                torch.mm(_rounded(rows_NO, ALONG_TOKENS).T, _rounded(rows_NI, ALONG_TOKENS), out=out_OI)
            grad_weight_EOI = grad_weight.to(weight_dtype)
        return grad_x_NI, grad_weight_EOI, None


def _grouped_on_gpu(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], counts: Sequence[int]) -> Tensor:
    from minga.kernels.gpu.block_gemm import block_gemm

    groups = zip(*(t.split(counts) for t in x), *weight, strict=True)
    return torch.cat([block_gemm(*group, block=128, rows=128) for group in groups])


def _over_tokens_on_gpu(grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """g.T · x, both in tiles along the tokens: tiles along the channels of the transposed."""
    from minga.kernels.gpu.block_gemm import block_gemm

    turned = (*quantize(grad_NO.T, ALONG_CHANNELS), *quantize(x_NI.T, ALONG_CHANNELS))
    return block_gemm(*turned, block=128, rows=1)


def _rounded(x: Tensor, block: tuple[int, int]) -> Tensor:
    return dequantize(*quantize(x, block), block)


def _blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """(..., R, C) -> (..., block rows, rows, block columns, columns), filled up with zeros, which change no maximum."""
    grid = [-(-side // step) for side, step in zip(x.shape[-2:], block, strict=True)]
    padding = [n * step - side for n, step, side in zip(grid, block, x.shape[-2:], strict=True)]
    if any(padding):
        x = F.pad(x, (0, padding[1], 0, padding[0]))
    return x.reshape(*x.shape[:-2], grid[0], block[0], grid[1], block[1])


def _spread(scale: Tensor) -> Tensor:
    return scale.float()[..., :, None, :, None]


def _power_of_two(amax: Tensor) -> Tensor:
    """E8M0: the smallest 2**k with amax / 2**k <= 448 = 1.75 · 2**8, read off the bits of float32."""
    # adding 0x1fffff carries into the exponent exactly if the mantissa is above 1.75
    exponent = ((amax.view(torch.int32) + 0x1FFFFF) >> 23) - 8
    return exponent.clamp_(min=1).masked_fill_(~amax.isfinite(), 255).to(torch.uint8).view(torch.float8_e8m0fnu)


def _widen(values: Tensor) -> Tensor:
    if not values.is_cpu:
        return values.float()
    # torch widens FP8 on a CPU a number at a time; looking the 256 values up is six times as fast (docs/log.md)
    return _all_values().index_select(0, values.reshape(-1).view(torch.uint8).int()).view(values.shape)


@cache
def _all_values() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
