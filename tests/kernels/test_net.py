"""The products of the compiled forward pass, and how their weights lie: pytest tests/kernels/test_net.py

The whole pass against the model is in tests/engine/test_compiled.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minga.checkpoint import ggml_types
from minga.kernels import cpu, ops, panels, reference
from minga.kernels.cpu import net
from minga.quant.blocks import FLOATS, FORMATS, GGUF, QuantEmbedding, QuantLinear, Stored

SIZES = [(16, 64, 1), (1, 1, 1), (17, 40, 3), (48, 96, 2), (100, 200, 13), (65, 33, 7), (128, 257, 64)]


FLOAT = ["float32", "bfloat16", "float16"]
TYPES = {kind.name: kind for kind in ggml_types.TYPES.values()}


Formats = Callable[[str, Tensor], tuple[Stored, Tensor]]


@pytest.fixture
def stored_as(random_blocks) -> Formats:
    """stored_as(format, matrix): it in that format (of GGUF's types only the shape), and the definition's float64 numbers."""

    def make(name: str, weight_OI: Tensor) -> tuple[Stored, Tensor]:
        if name in FORMATS:
            stored = Stored.round(weight_OI, FORMATS[name])
            return stored, stored.dense(torch.float64)
        if name in GGUF:
            raw = random_blocks(name, weight_OI.numel())
            stored = ggml_types.keep(raw, TYPES[name], tuple(weight_OI.shape))
            return stored, ggml_types.dequantise(raw, TYPES[name]).view_as(weight_OI).double()
        weight_OI = weight_OI.to(getattr(torch, name))
        return Stored.keep(weight_OI), weight_OI.double()

    return make


def matrix_of(stored: Stored) -> net.Matrix:
    rows, cols = stored.shape[-2:]
    data, factors, format = stored.data, stored.factors, stored.format
    if factors is not None:
        data, factors = panels.from_rows(data, factors)
    return net.matrix(data, scale=factors, rows=rows, cols=cols, kind=format.name, block=format.span)


def product(matrix: net.Matrix, x_ND: Tensor) -> Tensor:
    return net.head(net.Net(D=x_ND.shape[1], head=matrix), x_ND)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-9))


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("kind", [*FLOAT, "int8", "int4"])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_product_is_that_of_the_rounded_operands(sizes, kind, block, stored_as):
    assert cpu.load()
    torch.manual_seed(0)
    O, I, N = sizes  # noqa: E741
    weight_OI, x_ND = torch.randn(O, I), torch.randn(N, I)
    x_ND[0, : I // 2] = 0
    if kind in FORMATS:
        format = replace(FORMATS[kind], block=block)
        stored, rounded = Stored.round(weight_OI, format), reference.round_to(x_ND, "int8", -1, run=block)
        wide = stored.dense(torch.float64)
    else:
        (stored, wide), rounded = stored_as(kind, weight_OI), x_ND
    assert error(product(matrix_of(stored), x_ND), rounded.double() @ wide.T) < 1e-6


@pytest.mark.parametrize("sizes", [(1, 1), (16, 2), (17, 3), (100, 1), (33, 5)], ids=str)
@pytest.mark.parametrize("name", GGUF)
def test_a_product_with_a_type_of_gguf(name, sizes, stored_as):
    """One to eight tokens. Activations are rounded as llama.cpp rounds them, sums that meet minima to float16 besides."""
    assert cpu.load()
    torch.manual_seed(0)
    rows, span = sizes[0], 32 if GGUF[name].span == 32 else 256
    cols = sizes[1] * span
    stored, wide = stored_as(name, torch.empty(rows, cols))
    assert torch.equal(stored.dense().double(), wide)  # not a number is rounded anew
    matrix = matrix_of(stored)
    for tokens in range(1, 9):
        x_ND = torch.randn(tokens, cols)
        x_ND[0, : cols // 3] = 0
        x_ND[-1, cols // 2 :] *= 1e-3
        rounded, sums = reference.round_as_llama(x_ND, span)
        exact = rounded.double() @ wide.T
        if GGUF[name].minimum:
            _, minimum_OG = stored.scales(torch.float64)
            exact += (sums.double() - rounded.double().unflatten(-1, (-1, 32)).sum(-1)) @ minimum_OG.T
        assert error(product(matrix, x_ND), exact) < 2e-6


@pytest.mark.parametrize("kind", [*FLOAT, *FORMATS, *GGUF])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_its_neighbours(kind, threads, stored_as):
    """To the bit: what makes greedy text the same whatever else is computed beside it."""
    assert cpu.load()
    torch.manual_seed(0)
    stored, _ = stored_as(kind, torch.randn(83, 512))
    matrix, x_ND = matrix_of(stored), torch.randn(23, 512)
    before = torch.get_num_threads()
    together = product(matrix, x_ND)
    try:
        torch.set_num_threads(threads)
        for size in (1, 2, 5):
            assert torch.equal(torch.cat([product(matrix, part) for part in x_ND.split(size)]), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_width_floats_are_what_they_widen_to(kind):
    """To the bit, odd sizes included."""
    assert cpu.load()
    torch.manual_seed(0)
    narrow, x_ND = torch.randn(37, 203).to(getattr(torch, kind)), torch.randn(7, 203)
    ours, wide = (product(matrix_of(Stored.keep(weight)), x_ND) for weight in (narrow, narrow.float()))
    assert torch.equal(ours, wide)


@pytest.mark.parametrize("name", [kind.name for kind in (*FLOATS.values(), *FORMATS.values(), *GGUF.values())])
def test_a_model_has_it_in_a_module(name, stored_as):
    """torch's own form, in rows and in panels."""
    torch.manual_seed(0)
    stored, wide = stored_as(name, torch.randn(40, 256))
    linear, embedding = QuantLinear(stored, None), QuantEmbedding(weight=stored)
    x_ND, ids = torch.randn(3, 256), torch.tensor([[39, 0], [7, 7]])
    for _ in range(2):
        torch.testing.assert_close(linear(x_ND), x_ND @ wide.float().T)
        assert torch.equal(embedding(ids), wide.float()[ids])
        assert torch.equal(linear.dense("weight"), wide.float())
        linear.to_panels(), embedding.to_panels()


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
