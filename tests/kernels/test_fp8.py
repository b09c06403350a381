"""pytest tests/kernels/test_fp8.py"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minga.kernels import fp8, ops, reference

BLOCKS = [fp8.ALONG_CHANNELS, fp8.ALONG_TOKENS, fp8.WEIGHT]


def e4m3_by_definition(byte: int) -> float:
    """OCP 8-bit floating point specification, table 1: bias 7, no infinity, all ones are NaN."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


TABLE = torch.tensor([e4m3_by_definition(byte) for byte in range(256)], dtype=torch.float64)


def nearest_even(x: Tensor) -> Tensor:
    """The finite E4M3 value nearest to x, of two equally near the one whose last bit is zero; float64 in and out."""
    magnitudes = TABLE[:127]
    distance = (x.abs()[..., None] - magnitudes).abs()
    best = distance == distance.min(-1, keepdim=True).values
    even = torch.arange(127) % 2 == 0
    choice = torch.where((best & even).any(-1), (best & even).int().argmax(-1), best.int().argmax(-1))
    return magnitudes[choice].copysign(x)


def slow_quantize(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Block by block in float64: values (as numbers) and the scale of each number, both of x's shape."""
    values, scales = torch.empty_like(x, dtype=torch.float64), torch.empty_like(x, dtype=torch.float64)
    for row in range(0, x.shape[0], block[0]):
        for column in range(0, x.shape[1], block[1]):
            at = slice(row, row + block[0]), slice(column, column + block[1])
            amax = float(x[at].abs().max())
            exponent = -126
            while amax > 448 * 2.0**exponent:
                exponent += 1
            values[at], scales[at] = nearest_even(x[at].double() / 2.0**exponent), 2.0**exponent
    return values, scales


def spread(seed: int, *shape: int) -> Tensor:
    """Numbers over a dozen powers of two, a few zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-9, 4, shape, generator=generator)
    return x.masked_fill(torch.rand(shape, generator=generator) < 0.02, 0.0)


def test_every_byte_means_what_the_format_says():
    torch.testing.assert_close(fp8._all_values().double(), TABLE, rtol=0, atol=0, equal_nan=True)


def test_the_cast_rounds_to_nearest_even_and_saturates():
    """Every value, every middle between two, a hair to both sides of it, and what is above the largest."""
    finite = TABLE[:127]
    middles = (finite[1:] + finite[:-1]) / 2
    x = torch.cat([finite, middles, middles * (1 + 2**-20), middles * (1 - 2**-20)]).float()
    x = torch.cat([x, -x])
    assert torch.equal(fp8._widen(x.to(torch.float8_e4m3fn)).double(), nearest_even(x.double()))
    assert fp8._widen(torch.tensor([449.0, 464.0, 1e30]).to(torch.float8_e4m3fn)).tolist() == [448.0] * 3


@given(st.floats(0, 2.0**127, width=32))
@settings(max_examples=400, deadline=None)
def test_the_scale_is_the_smallest_power_of_two_that_fits(amax):
    scale = float(fp8._power_of_two(torch.tensor(amax)).float())
    assert math.frexp(scale)[0] == 0.5
    assert amax <= 448 * scale
    assert scale == 2.0**-126 or amax > 448 * (scale / 2)


@given(st.integers(1, 140), st.integers(1, 300), st.sampled_from(BLOCKS), st.integers(0, 9), st.integers(-100, 100))
@settings(max_examples=25, deadline=None)
def test_quantize_is_the_slow_one_at_any_size(rows, columns, block, seed, exponent):
    x = spread(seed, rows, columns) * 2.0**exponent
    values, scale = fp8.quantize(x, block)
    slow_values, slow_scale = slow_quantize(x, block)
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float8_e8m0fnu
    assert tuple(scale.shape) == (-(-rows // block[0]), -(-columns // block[1]))
    assert torch.equal(values.float().double(), slow_values)
    assert torch.equal(fp8.dequantize(values, scale, block).double(), slow_values * slow_scale)


def test_denormal_and_huge_numbers():
    x = torch.tensor([[2.0**-149, 2.0**-130, 1e-38], [1e38, -3e38, 2.0**120]])
    back = fp8.dequantize(*fp8.quantize(x, (1, 3)), (1, 3))
    assert back[0, 0] == 0 and abs(back[0, 2] / 1e-38 - 1) < 2**-4
    torch.testing.assert_close(back[1], x[1], rtol=2**-4, atol=0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_block_with_no_number_in_it_is_all_nan_and_others_are_not(bad):
    x = torch.ones(3, 256)
    x[1, 200] = bad
    back = fp8.dequantize(*fp8.quantize(x, fp8.ALONG_CHANNELS), fp8.ALONG_CHANNELS)
    assert back[1, 128:].isnan().all()
    back[1, 128:] = 1.0
    assert torch.equal(back, torch.ones_like(x))
    assert fp8.linear(x, torch.ones(2, 256)).isfinite().all(-1).tolist() == [True, False, True]


def test_turning_the_tiles_loses_only_what_is_too_small():
    """Re-quantised along tokens, what was quantised along channels is the same number, or below the tile's normals."""
    x = fp8._rounded(spread(0, 200, 150), fp8.ALONG_CHANNELS)
    values, scale = fp8.quantize(x, fp8.ALONG_TOKENS)
    turned = fp8.dequantize(values, scale, fp8.ALONG_TOKENS)
    small = (x.double() / slow_quantize(x, fp8.ALONG_TOKENS)[1]).abs() < 2.0**-6
    assert torch.equal(turned[~small], x[~small])
    assert 0 < small.float().mean() < 0.2


def exact_product(a: Tensor, a_block: tuple[int, int], b: Tensor, b_block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """a (R, K) times b (C, K).T from FP8 operands, in integers: values are whole multiples of 2**-9. And sum |terms|."""
    a_values, a_scale = slow_quantize(a, a_block)
    b_values, b_scale = slow_quantize(b, b_block)
    total, size = torch.zeros(len(a), len(b), dtype=torch.float64), torch.zeros(len(a), len(b), dtype=torch.float64)
    for start in range(0, a.shape[1], 128):
        part = slice(start, start + 128)
        whole_a, whole_b = (a_values[:, part] * 512).long(), (b_values[:, part] * 512).long()
        scale = a_scale[:, start, None] * b_scale[None, :, start] * 2.0**-18
        total += (whole_a @ whole_b.T).double() * scale
        size += (whole_a.abs() @ whole_b.abs().T).double() * scale
    return total, size


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 1, 1), (130, 300, 70), (256, 128, 256), (60, 129, 200)])
def test_all_three_products_equal_integer_arithmetic(tokens, inputs, outputs):
    """Up to the rounding of the sums: at most one half step of float32 for each of the K terms."""
    x, weight = spread(1, tokens, inputs).requires_grad_(), spread(2, outputs, inputs).requires_grad_()
    grad = spread(3, tokens, outputs)
    y = fp8.linear(x, weight)
    y.backward(grad)
    x_stored = fp8._rounded(x.detach(), fp8.ALONG_CHANNELS)  # what the backward pass finds
    products = [
        (y, x, fp8.ALONG_CHANNELS, weight, fp8.WEIGHT),
        (x.grad, grad, fp8.ALONG_CHANNELS, weight.T, fp8.WEIGHT),
        (weight.grad, grad.T, fp8.ALONG_CHANNELS, x_stored.T, fp8.ALONG_CHANNELS),  # transposed: along tokens
    ]
    for ours, a, a_block, b, b_block in products:
        expected, size = exact_product(a.detach(), a_block, b.detach(), b_block)
        assert ((ours.double() - expected).abs() <= a.shape[1] * 2.0**-24 * size).all()


def test_groups_are_products_of_their_own_and_an_empty_one_learns_nothing():
    x, weight = spread(4, 200, 140).requires_grad_(), spread(5, 3, 50, 140).requires_grad_()
    y = fp8.grouped_linear(x, weight, [137, 0, 63])
    y.sin().sum().backward()
    x2, weight2 = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    y2 = torch.cat([fp8.linear(x2[:137], weight2[0]), fp8.linear(x2[137:], weight2[2])])
    y2.sin().sum().backward()
    assert torch.equal(y, y2) and torch.equal(x.grad, x2.grad) and torch.equal(weight.grad, weight2.grad)
    assert not weight.grad[1].any()


def test_activations_wait_for_the_backward_in_eight_bits():
    y = fp8.linear(torch.randn(64, 256, requires_grad=True), torch.randn(128, 256, requires_grad=True))
    saved = [t for t in y.grad_fn.next_functions[0][0].saved_tensors if t is not None]
    assert sum(t.nbytes for t in saved) == (64 + 128) * 256 + 64 * 2 + 1 * 2


def test_bias_shape_and_dtype_are_those_of_a_linear_layer():
    x, weight, bias = torch.randn(2, 5, 64).bfloat16(), torch.randn(32, 64).bfloat16(), torch.randn(32).bfloat16()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = ops.linear(*leaves, precision="fp8")
    expected = ops.linear(*(t.detach() for t in leaves))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and all(t.grad.dtype == torch.bfloat16 for t in leaves)
    assert 0 < (y - expected).norm() / expected.norm() < 0.06
    assert ops.linear(torch.randn(0, 64), torch.randn(32, 64), precision="fp8").shape == (0, 32)


def test_experts_are_the_same_layer_in_fewer_bits():
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (
        torch.randn(s, generator=generator) / s[-1] ** 0.5 for s in ((50, 64), (4, 96, 64), (4, 64, 48))
    )
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(50)])  # the fourth is never chosen
    weight = torch.rand(50, 2, generator=generator)
    results = {}
    for name, experts in (("exact", reference.experts), ("fp8", lambda *t: ops.experts(*t, precision="fp8"))):
        leaves = [t.clone().requires_grad_() for t in (x, gate_up, down)]
        out = experts(leaves[0], index, weight, *leaves[1:])
        out.square().sum().backward()
        results[name] = [out, *(t.grad for t in leaves)]
    for ours, exact in zip(results["fp8"], results["exact"], strict=True):
        assert 0 < (ours - exact).norm() / exact.norm() < 0.2
