from __future__ import annotations

import pytest
import torch

from minga.kernels import ops
from minga.quant import gptq

BLOCK = 32


def correlated(rows: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and second moments of inputs that a few hidden causes share, of sizes far apart."""
    draw = torch.Generator().manual_seed(seed)
    causes = torch.randn(512, max(1, inputs // 4), generator=draw) @ torch.randn(
        max(1, inputs // 4), inputs, generator=draw
    )
    x_NI = (causes + 0.3 * torch.randn(512, inputs, generator=draw)) * torch.rand(inputs, generator=draw).mul(3).exp()
    return torch.randn(rows, inputs, generator=draw) * 0.1, x_NI.T @ x_NI


@pytest.mark.parametrize("shape", [(64, 96), (5, 33), (1, 7), (17, 40), (48, 128)])
def test_the_output_is_never_worse_than_rounded_to_nearest(shape: tuple[int, int]) -> None:
    gained = []
    for seed in range(5):
        weight_OI, moments_II = correlated(*shape, seed)
        stored, scale = gptq.quantize_int4(weight_OI, moments_II, BLOCK)
        nearest = ops.quantize_int4(weight_OI, BLOCK)
        assert (stored.shape, scale.shape) == (nearest[0].shape, nearest[1].shape)
        assert (stored.dtype, scale.dtype) == (torch.uint8, torch.float16)
        ours_O, theirs_O = (_error(weight_OI, *q, moments_II) for q in ((stored, scale), nearest))
        assert (ours_O <= theirs_O * (1 + 1e-3)).all()
        gained.append(ours_O.sum() / theirs_O.sum())
    assert sum(gained) / len(gained) < 0.7


def _error(
    weight_OI: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor, moments_II: torch.Tensor
) -> torch.Tensor:
    wide = ops.dequantize_int4(stored, scale, BLOCK, weight_OI.shape[1], torch.float64)
    error_OI = weight_OI.double() - wide
    return torch.einsum("oi,ij,oj->o", error_OI, moments_II.double(), error_OI)


def test_inputs_that_do_not_correlate_leave_nothing_to_gain() -> None:
    weight_OI, _ = correlated(9, 50, 0)
    stored, scale = gptq.quantize_int4(weight_OI, torch.eye(50), BLOCK)
    nearest, nearest_scale = ops.quantize_int4(weight_OI, BLOCK)
    assert torch.equal(stored, nearest)
    assert torch.equal(scale, nearest_scale)


def test_inputs_that_were_always_zero() -> None:
    weight_OI, moments_II = correlated(6, 40, 1)
    dead = torch.tensor([0, 5, 39])
    moments_II[dead], moments_II[:, dead] = 0, 0
    for moments in (moments_II, torch.zeros(40, 40)):
        stored, scale = gptq.quantize_int4(weight_OI, moments, BLOCK)
        wide = ops.dequantize_int4(stored, scale, BLOCK, 40, torch.float32)
        assert wide.isfinite().all()
        steps = scale.float().repeat_interleave(BLOCK, 1)[:, :40]
        assert ((wide - weight_OI).abs() / steps)[:, dead].median() <= 0.5


def test_a_stack_is_its_layers() -> None:
    weights, moments = zip(*(correlated(8, 37, seed) for seed in range(3)), strict=True)
    stored, scale = gptq.quantize_int4(torch.stack(weights), torch.stack(moments), BLOCK)
    for i in range(3):
        alone, alone_scale = gptq.quantize_int4(weights[i], moments[i], BLOCK)
        wide, wide_alone = (
            ops.dequantize_int4(*q, BLOCK, 37, torch.float32) for q in ((stored[i], scale[i]), (alone, alone_scale))
        )
        assert ((wide - wide_alone).abs() > 1e-3).float().mean() < 0.02  # a tie may fall the other way
