"""pytest tests/kernels/test_ops.py"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from minga.kernels import ops, reference

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = list(TOLERANCE)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[ours.dtype], atol=TOLERANCE[ours.dtype])


@pytest.fixture(params=range(6))
def shapes(request) -> random.Random:
    """Odd sizes, different in each run of a test."""
    torch.manual_seed(request.param)
    return random.Random(request.param)


def random_mask(B: int, T: int, S: int) -> Tensor:
    """Every query may look at something."""
    mask = torch.rand(B, T, S) < 0.5
    return mask.scatter_(2, torch.randint(S, (B, T, 1)), True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_attend(shapes, dtype, masked):
    B, T, groups, heads = (shapes.randint(1, n) for n in (3, 9, 3, 3))
    S, K, V = T + shapes.choice((0, 0, 1, 6)), shapes.randint(1, 19), shapes.randint(1, 19)
    q = torch.randn(B, T, groups * heads, K, dtype=dtype)
    k, v = torch.randn(B, S, heads, K, dtype=dtype), torch.randn(B, S, heads, V, dtype=dtype)
    mask = random_mask(B, T, S) if masked else None
    close(ops.attend(q, k, v, mask, scale=0.3), reference.attend(q, k, v, mask, scale=0.3))


def test_attend_is_causal():
    q, k, v = (torch.randn(1, 5, 2, 4) for _ in range(3))
    before = ops.attend(q, k, v, None, scale=0.5)
    k[:, 3:], v[:, 3:] = 100.0, -100.0
    after = ops.attend(q, k, v, None, scale=0.5)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_attend_latent_absorbed(shapes, dtype, masked):
    B, T, H, K, R, C, V = (shapes.randint(1, n) for n in (3, 7, 3, 9, 9, 17, 9))
    S = T + shapes.choice((0, 5))
    q_nope, q_rope = torch.randn(B, T, H, K, dtype=dtype), torch.randn(B, T, H, R, dtype=dtype)
    latent, rope = torch.randn(B, S, C, dtype=dtype), torch.randn(B, S, R, dtype=dtype)
    w_uk, w_uv = torch.randn(H, K, C, dtype=dtype) * C**-0.5, torch.randn(H, V, C, dtype=dtype) * C**-0.5
    mask = random_mask(B, T, S) if masked else None
    args, weights = (q_nope, q_rope, latent, rope, mask), {"w_uk_HKC": w_uk, "w_uv_HVC": w_uv, "scale": 0.2}
    close(ops.attend_latent_absorbed(*args, **weights), reference.attend_latent(*args, **weights))


def expert_case(shapes: random.Random, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens choose among the first `used` of E experts, so that some experts stay without a token."""
    N, D, E, F = (shapes.randint(1, n) for n in (13, 17, 9, 11))
    used = shapes.randint(1, E)
    active = shapes.randint(1, used)
    index = torch.stack([torch.randperm(used)[:active] for _ in range(N)])
    x, weight = torch.randn(N, D, dtype=dtype), torch.rand(N, active, dtype=dtype)
    return (
        x,
        index,
        weight,
        torch.randn(E, 2 * F, D, dtype=dtype) * D**-0.5,
        torch.randn(E, D, F, dtype=dtype) * F**-0.5,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(shapes, dtype):
    case = expert_case(shapes, dtype)
    close(ops.experts(*case), reference.experts(*case))


def test_gradients_of_experts(shapes):
    x, index, *rest = expert_case(shapes, torch.float64)
    gradients = []
    for experts in (ops.experts, reference.experts):
        leaves = [t.clone().requires_grad_() for t in (x, *rest)]
        out = experts(leaves[0], index, *leaves[1:])
        (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_experts_without_a_token_get_zero_gradient():
    gate_up, down = (torch.randn(4, 6, 5).requires_grad_(), torch.randn(4, 5, 3).requires_grad_())
    ops.experts(torch.randn(3, 5), torch.tensor([[1], [3], [1]]), torch.ones(3, 1), gate_up, down).sum().backward()
    assert gate_up.grad is not None
    assert [bool(g.any()) for g in gate_up.grad] == [False, True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    x, weight = torch.randn(3, 7, dtype=dtype), torch.randn(7, dtype=dtype)
    expected = weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), expected, rtol=1e-5, atol=1e-6)


def test_swiglu_takes_the_gate_first():
    torch.testing.assert_close(ops.swiglu(torch.tensor([[2.0, 3.0]])), torch.tensor([[3 * 2 / (1 + 2.718281828**-2)]]))


# ---------------------------------------------------------------------- int8


@pytest.mark.parametrize("block", [1, 8, 32, 100])
@pytest.mark.parametrize("size", [1e-9, 1e-4, 1.0, 1e4])
def test_int8_is_off_by_at_most_half_a_scale(shapes, block, size):
    rows, columns = shapes.randint(1, 7), shapes.randint(1, 99)
    weight = torch.randn(rows, columns) * size
    quantized, scale = ops.quantize_int8(weight, block)
    assert (quantized.dtype, scale.dtype) == (torch.int8, torch.float16)
    assert quantized.shape == weight.shape
    assert scale.shape == (rows, -(-columns // block))
    assert quantized.min() >= -127
    error = (weight - ops.dequantize_int8(quantized, scale, block, torch.float32)).abs()
    bound = scale.float().repeat_interleave(block, -1)[:, :columns] / 2
    assert (error <= bound * (1 + 1e-5) + 1e-12).all()


def test_int8_scales_are_no_larger_than_they_must_be():
    weight = torch.randn(5, 64)
    _, scale = ops.quantize_int8(weight, 32)
    least = weight.unflatten(1, (2, 32)).abs().amax(-1) / 127
    assert (scale.float() >= least).all()
    assert (scale.float() <= least * (1 + 2**-10)).all()  # one step of float16


def test_int8_of_zeros_and_of_whole_multiples_is_exact():
    weight = torch.tensor([[0.0, 0.0, 127.0, -63.0, 5.0]])
    quantized, scale = ops.quantize_int8(weight, 2)
    assert torch.equal(ops.dequantize_int8(quantized, scale, 2, torch.float32)[:, :4], weight[:, :4])


def test_int8_of_stacked_experts_is_that_of_each():
    weight = torch.randn(3, 5, 13)
    quantized, scale = ops.quantize_int8(weight, 8)
    for expert in range(3):
        one, one_scale = ops.quantize_int8(weight[expert], 8)
        assert torch.equal(one, quantized[expert])
        assert torch.equal(one_scale, scale[expert])


def test_int8_of_a_weight_beyond_float16_scales_stays_finite():
    quantized, scale = ops.quantize_int8(torch.tensor([[1e8, 1.0]]), 2)
    assert ops.dequantize_int8(quantized, scale, 2, torch.float32).isfinite().all()


@pytest.mark.parametrize("block", [8, 32])
@pytest.mark.parametrize("shape", [(5, 64), (3, 4, 40), (1, 7)])
def test_int4_is_the_nearest_of_its_numbers(shape, block):
    weight = torch.randn(shape)
    stored, scale = ops.quantize_int4(weight, block)
    assert stored.shape == (*shape[:-1], -(-shape[-1] // 8) * 4) and stored.dtype == torch.uint8
    wide = scale.float().repeat_interleave(block, -1)[..., : shape[-1]]
    nearest = (weight / wide).round().clamp(-8, 7) * wide
    torch.testing.assert_close(ops.dequantize_int4(stored, scale, block, shape[-1], torch.float32), nearest)


def test_int4_scales_are_better_than_the_largest_number_alone():
    weight = torch.randn(64, 256)
    stored, scale = ops.quantize_int4(weight, 32)
    error = (ops.dequantize_int4(stored, scale, 32, 256, torch.float32) - weight).square().mean()
    blocks = weight.view(64, -1, 32)
    end = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8  # GGUF's Q4_0
    plain = ((blocks / end).round().clamp(-8, 7) * end - blocks).square().mean()
    assert error < 0.95 * plain


def test_int4_of_zeros_is_zero():
    stored, scale = ops.quantize_int4(torch.zeros(2, 20), 8)
    assert not ops.dequantize_int4(stored, scale, 8, 20, torch.float32).any()
