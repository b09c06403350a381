"""Weights in DeepSeek-V3's block FP8: E4M3 numbers, one scale for each block of 128 x 128 of a matrix (V3 section 3.3.2).

  8.002 bits a weight with float32 scales, as V3 has them; E8M0 scales (powers of two) cost about half a bit of precision

Linear layers and experts are held so, and widened as they are used. What V3 leaves in bfloat16 is rounded to it: embedding,
head, norms, router and the MTP module's `eh_proj`. So a model computes the same from memory as from the folder that is
written of it. Gate and up of an expert lie one upon the other, each with blocks of its own.

  O output rows, I input columns, E experts, F expert hidden, D model dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minga.kernels import fp8
from minga.quant.blocks import Format, QuantExperts, Quantized, QuantLinear, is_experts

KEPT = ("lm_head", "eh_proj")  # linear layers that stay in bfloat16
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
    def sides(self) -> tuple[int, int]:
        return self.rows, self.block

    def describe(self) -> dict[str, Any]:
        described = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": self.method}
        if self.power_of_two:
            described["scale_fmt"] = "ue8m0"
        return {**described, "weight_block_size": [*self.sides]}


class _InBlocks(Quantized):
    """Buffers NAME (.., O, I) in E4M3 and NAME_scale_inv (.., ceil(O/rows), ceil(I/block))."""

    format: BlockFP8

    def hold(self, name: str, weight: Tensor) -> None:
        self._shapes[name] = weight.shape
        values, scale = _pack(self._apart(name, weight.detach()), self.format)
        self.register_buffer(name, values.flatten(-3, -2))
        self.register_buffer(name + SCALE, scale.flatten(-3, -2))

    def dense(self, name: str, dtype: torch.dtype = torch.float32, which: Tensor | None = None) -> Tensor:
        values, scale = self.get_buffer(name), self.get_buffer(name + SCALE)
        if which is not None:
            values, scale = values[which], scale[which]
        wide = fp8.dequantize(self._apart(name, values), self._apart(name, scale), self.format.sides)
        return wide.flatten(-3, -2).to(dtype)

    @staticmethod
    def _apart(name: str, tensor: Tensor) -> Tensor:
        """(.., matrices that lie one upon the other, rows, columns)"""
        return tensor.unflatten(-2, (2 if name == "gate_up_proj" else 1, -1))


class FP8Linear(_InBlocks, QuantLinear):
    """`nn.Linear` over a weight (O, I) in block FP8."""


class FP8Experts(_InBlocks, QuantExperts):
    """A layer's experts as stacks (E, 2F, D) and (E, D, F) in block FP8."""


def quantize(model: nn.Module, format: BlockFP8 | None = None) -> nn.Module:
    """Holds linear layers and experts in block FP8, in place, and rounds every other parameter to bfloat16."""
    format = format or BlockFP8()
    for parent, name, module in _candidates(model):
        if name not in KEPT:
            setattr(parent, name, _held(module, format))
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
    prefixes = {id(module): name for name, module in model.named_modules()}
    held = set()
    for parent, name, module in _candidates(model):
        matrices = {f"{prefixes[id(module)]}.{key}" for key, p in module.named_parameters() if p.ndim > 1}
        if all(f"{matrix}{SCALE}" in tensors for matrix in matrices):
            setattr(parent, name, _held(module, format))
            held |= matrices
    for matrix in [name.removesuffix(SCALE) for name in tensors if name.endswith(SCALE)]:
        if matrix not in held:
            wide = fp8.dequantize(tensors[matrix], tensors.pop(matrix + SCALE), sides)
            tensors[matrix] = wide.to(tensors["model.norm.weight"].dtype)


def _candidates(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of every linear layer and of every layer's experts."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) or is_experts(child)
    ]


def _held(module: nn.Module, format: BlockFP8) -> nn.Module:
    if isinstance(module, nn.Linear):
        return FP8Linear(module.weight, None if module.bias is None else module.bias.detach(), format)
    return FP8Experts(module.get_parameter("gate_up_proj"), module.get_parameter("down_proj"), format)


def _pack(weight: Tensor, format: BlockFP8) -> tuple[Tensor, Tensor]:
    if weight.is_meta:  # the shape alone, for a model whose weights in FP8 are about to be loaded
        grid = [-(-side // step) for side, step in zip(weight.shape[-2:], format.sides, strict=True)]
        dtype = torch.float8_e8m0fnu if format.power_of_two else torch.float32
        values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        return values, weight.new_empty((*weight.shape[:-2], *grid), dtype=dtype)
    return fp8.quantize(weight, format.sides, power_of_two=format.power_of_two)
