"""The products of the compiled forward pass, and how their weights lie: pytest tests/kernels/test_net.py

The whole pass against the model is in tests/engine/test_compiled.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minga.kernels import cpu, ops, panels, reference
from minga.kernels.cpu import net

SIZES = [(16, 64, 1), (1, 1, 1), (17, 40, 3), (48, 96, 2), (100, 200, 13), (65, 33, 7), (128, 257, 64)]


def product(kind: str, weight_OI: Tensor, x_ND: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The kernel's x @ W.T, and in float64 that of the operands as they are rounded."""
    rows, cols = weight_OI.shape
    if kind == "float32":
        matrix = net.matrix(weight_OI, rows=rows, cols=cols, kind="float32")
        exact = x_ND.double() @ weight_OI.double().T
    else:
        bits = int(kind[-1])
        if bits == 8:
            stored, scale = ops.quantize_int8(weight_OI, block)
            wide = ops.dequantize_int8(stored, scale, block, torch.float64)
        else:
            stored, scale = ops.quantize_int4(weight_OI, block)
            wide = ops.dequantize_int4(stored, scale, block, cols, torch.float64)
        words, scales = panels.from_rows(stored, scale)
        matrix = net.matrix(words, scale=scales, rows=rows, cols=cols, kind=kind, block=block)
        exact = reference.round_to(x_ND, "int8", -1, run=block).double() @ wide.T
    ours = net.head(net.Net(D=cols, head=matrix), x_ND)
    return ours, exact


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_product_is_that_of_the_rounded_operands(sizes, kind, block):
    assert cpu.load()
    torch.manual_seed(0)
    O, I, N = sizes  # noqa: E741
    weight_OI, x_ND = torch.randn(O, I), torch.randn(N, I)
    x_ND[0, : I // 2] = 0
    ours, exact = product(kind, weight_OI, x_ND, block)
    assert float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-9)) < 1e-6


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_its_neighbours(kind, threads):
    """To the bit: what makes greedy text the same whatever else is computed beside it."""
    assert cpu.load()
    torch.manual_seed(0)
    weight_OI, x_ND = torch.randn(83, 200), torch.randn(23, 200)
    before = torch.get_num_threads()
    together, _ = product(kind, weight_OI, x_ND, 64)
    try:
        torch.set_num_threads(threads)
        for size in (1, 2, 5):
            parts = [product(kind, weight_OI, part, 64)[0] for part in x_ND.split(size)]
            assert torch.equal(torch.cat(parts), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(16, 8), (5, 40), (3, 33, 70), (1, 1)])
def test_rows_come_back_from_panels(shape, bits):
    weight = torch.randn(shape)
    stored, scale = (ops.quantize_int8 if bits == 8 else ops.quantize_int4)(weight, 32)
    words, scales = panels.from_rows(stored, scale)
    assert words.shape[-1] == scales.shape[-1] == panels.ROWS
    back, scale_back = panels.to_rows(words, scales, shape, stored.dtype)
    assert torch.equal(back, stored) and torch.equal(scale_back, scale)


def test_both_sides_mean_the_same_structures():
    assert cpu.load()
    net.check()
