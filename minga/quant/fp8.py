"""Weights in DeepSeek-V3's block FP8: E4M3 numbers, one scale for each block of 128 x 128 of a matrix (V3 section 3.3.2).

  8.002 bits a weight with float32 scales, as V3 has them; E8M0 scales (powers of two) cost about half a bit of precision

Linear layers and experts are held so, and widened as they are used. What V3 leaves in bfloat16 is rounded to it: embedding,
head, norms, router and the MTP module's `eh_proj`. So a model computes the same from memory as from the folder that is
written of it. Gate and up of an expert lie one upon the other, each with blocks of its own.

  O output rows, I input columns, E experts
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minga.kernels import fp8
from minga.quant.blocks import Format, Stored, replace_matrices

KEPT = ("embed_tokens.weight", "lm_head.weight", "eh_proj.weight")  # what stays in bfloat16
SCALE = "_scale_inv"  # the public name, though it is multiplied


@dataclass(frozen=True)
class BlockFP8(Format):
    """`rows` and `block`: rows and columns that share a scale. `power_of_two`: scales are E8M0 bytes, not float32."""

    name: str = "fp8"
    bits: int = 8
    block: int = 128
    rows: int = 128
    power_of_two: bool = False

    @property
    def method(self) -> str:
        return self.name

    @property
    def suffix(self) -> str:
        return SCALE

    @property
    def dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    @property
    def sides(self) -> tuple[int, int]:
        return self.rows, self.block

    def describe(self) -> dict[str, Any]:
        described = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": self.method}
        if self.power_of_two:
            described["scale_fmt"] = "ue8m0"
        return {**described, "weight_block_size": [*self.sides]}


@dataclass(frozen=True)
class InBlocks(Stored):
    """data (.., O, I) in E4M3; factors (.., parts * ceil(O/parts/rows), ceil(I/block)). parts: matrices one upon the other."""

    parts: int = 1

    @classmethod
    def pack(cls, name: str, weight: Tensor, format: BlockFP8) -> InBlocks:
        """A matrix or stack of a model, which `name` tells what it is."""
        parts = 2 if name.endswith("gate_up_proj") else 1
        apart = weight.detach().unflatten(-2, (parts, -1))
        if weight.is_meta:  # the shape alone, for a model whose weights in FP8 are about to be loaded
            grid = [-(-side // step) for side, step in zip(apart.shape[-2:], format.sides, strict=True)]
            scale_type = torch.float8_e8m0fnu if format.power_of_two else torch.float32
            values = torch.empty_like(apart, dtype=format.dtype)
            scale = weight.new_empty((*apart.shape[:-2], *grid), dtype=scale_type)
        else:
            values, scale = fp8.quantize(apart, format.sides, power_of_two=format.power_of_two)
        return cls(format, weight.shape, values.flatten(-3, -2), scale.flatten(-3, -2), parts)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        assert self.factors is not None
        assert isinstance(self.format, BlockFP8)
        values, scale = (tensor.unflatten(-2, (self.parts, -1)) for tensor in (self.data, self.factors))
        return fp8.dequantize(values, scale, self.format.sides).flatten(-3, -2).to(dtype)


def quantize(model: nn.Module, format: BlockFP8 | None = None) -> nn.Module:
    """Holds linear layers and experts in block FP8, in place, and rounds every other parameter to bfloat16."""
    kind = format or BlockFP8()
    replace_matrices(model, lambda name, weight: None if name.endswith(KEPT) else InBlocks.pack(name, weight, kind))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    return model


def expect(model: nn.Module, tensors: dict[str, Tensor], sides: tuple[int, int]) -> None:
    """Readies a model on the meta device for `tensors` of a folder in block FP8, whatever layers it holds so.

    Matrices of other modules (an embedding, a router) are widened in `tensors`.
    """
    scales = [tensor for name, tensor in tensors.items() if name.endswith(SCALE)]
    power_of_two = bool(scales) and all(tensor.dtype == torch.float8_e8m0fnu for tensor in scales)
    format = BlockFP8(rows=sides[0], block=sides[1], power_of_two=power_of_two)
    held = set()

    def stored(name: str, weight: Tensor) -> InBlocks | None:
        if name + SCALE not in tensors or name.endswith("embed_tokens.weight"):
            return None
        held.add(name)
        return InBlocks.pack(name, weight, format)

    replace_matrices(model, stored)
    for matrix in [name.removesuffix(SCALE) for name in tensors if name.endswith(SCALE)]:
        if matrix not in held:
            wide = fp8.dequantize(tensors[matrix], tensors.pop(matrix + SCALE), sides)
            tensors[matrix] = wide.to(tensors["model.norm.weight"].dtype)
