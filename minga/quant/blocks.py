"""Weights in 8 or 4 bits: whole numbers in blocks along a row, one float16 scale a block.

  int8   blocks of 64    8.25 bits a weight
  int4   blocks of 32    4.5 bits a weight

A quantised module stores nothing else: weights stay in few bits in memory and are widened as they are used, or read as
they are by the compiled kernels. Norms, biases and the router stay float32: they are few, and the choice of experts is
sensitive to them.

  O output rows, I input columns, G blocks of a row, E experts, F expert hidden, D model dim, N tokens, A active
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minga.kernels import ops, panels


@dataclass(frozen=True)
class Format:
    """`block`: columns that share a scale."""

    name: str
    bits: int
    block: int

    @property
    def method(self) -> str:
        """What `quantization_config.quant_method` of a saved folder says."""
        return f"minga-{self.name}"

    def describe(self) -> dict[str, Any]:
        """`quantization_config` of a saved folder."""
        return {"quant_method": self.method, "weight_block_size": [1, self.block]}


FORMATS = {kind.name: kind for kind in (Format("int8", 8, 64), Format("int4", 4, 32))}


class Quantized(nn.Module):
    """Matrices as buffers NAME and NAME_scale: in rows, as they are saved, or after `to_panels` as the kernels read them."""

    in_panels = False

    def __init__(self, format: Format):
        super().__init__()
        self.format = format
        self._shapes: dict[str, torch.Size] = {}

    def hold(self, name: str, weight: Tensor) -> None:
        """Rounds a matrix (O, I) or a stack of them (E, O, I)."""
        self._shapes[name] = weight.shape
        stored, scale = _pack(weight, self.format)
        self.register_buffer(name, stored)
        self.register_buffer(f"{name}_scale", scale)

    def shape(self, name: str) -> torch.Size:
        """Of the matrix, whatever it is stored as."""
        return self._shapes[name]

    def rows(self, name: str) -> tuple[Tensor, Tensor]:
        """The numbers and scales of a matrix row by row."""
        stored, scale = self.get_buffer(name), self.get_buffer(f"{name}_scale")
        if self.in_panels:
            return panels.to_rows(stored, scale, self.shape(name), bits=self.format.bits)
        return stored, scale

    def dense(self, name: str, dtype: torch.dtype = torch.float32, which: Tensor | None = None) -> Tensor:
        """A matrix as floats, or of a stack those with the numbers `which`."""
        stored, scale = self.rows(name)
        if which is not None:
            stored, scale = stored[which], scale[which]
        return _widen(stored, scale, self.format, self.shape(name)[-1], dtype)

    def to_panels(self, empty: panels.Empty = torch.empty) -> None:
        """Lays the matrices out for the compiled kernels, in memory from `empty`; all else works as before, slower."""
        for name in () if self.in_panels else self._shapes:
            stored, scale = panels.from_rows(*self.rows(name), bits=self.format.bits, empty=empty)
            setattr(self, name, stored)
            setattr(self, f"{name}_scale", scale)
        self.in_panels = True

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.in_panels:
            for name in self._shapes:
                destination[prefix + name], destination[f"{prefix}{name}_scale"] = self.rows(name)


class QuantLinear(Quantized):
    """`nn.Linear` over a weight (O, I) in few bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None, format: Format):
        super().__init__(format)
        self.hold("weight", weight)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense("weight", x.dtype), self.bias)


class QuantEmbedding(Quantized):
    """`nn.Embedding` over rows in few bits: only the rows that are looked up are widened."""

    def __init__(self, weight: Tensor, format: Format):
        super().__init__(format)
        self.hold("weight", weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.dense("weight", which=ids)


class QuantExperts(Quantized):
    """A layer's experts as stacks (E, 2F, D) and (E, D, F) in few bits: only those that were chosen are widened."""

    def __init__(self, gate_up: Tensor, down: Tensor, format: Format):
        super().__init__(format)
        self.hold("gate_up_proj", gate_up)
        self.hold("down_proj", down)

    def forward(self, x_ND: Tensor, index_NA: Tensor, weight_NA: Tensor) -> Tensor:
        used, local_NA = index_NA.unique(return_inverse=True)
        gate_up, down = (self.dense(name, x_ND.dtype, used) for name in ("gate_up_proj", "down_proj"))
        return ops.experts(x_ND, local_NA, weight_NA, gate_up, down)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear or embedding layer as floats, whatever it is stored in."""
    return module.dense("weight") if isinstance(module, Quantized) else module.get_parameter("weight")


def quantize(module: nn.Module, format: Format) -> nn.Module:
    """Replaces every linear, embedding and expert layer inside `module` by its form in few bits, in place."""
    for name, child in list(module.named_children()):
        replacement = _quantized(child, format)
        if replacement is None:
            quantize(child, format)
        else:
            setattr(module, name, replacement)
    return module


def is_experts(module: nn.Module) -> bool:
    """Known by their two stacked parameters, so that this layer needs to know no model."""
    return {name for name, _ in module.named_parameters(recurse=False)} == {"gate_up_proj", "down_proj"}


def format_of(module: nn.Module) -> Format | None:
    """The format of a model's weights, None where they are floats."""
    return next((part.format for part in module.modules() if isinstance(part, Quantized)), None)


def _quantized(module: nn.Module, format: Format) -> nn.Module | None:
    if isinstance(module, nn.Linear):
        return QuantLinear(module.weight, None if module.bias is None else module.bias.detach(), format)
    if isinstance(module, nn.Embedding):
        return QuantEmbedding(module.weight, format)
    if is_experts(module):
        return QuantExperts(module.get_parameter("gate_up_proj"), module.get_parameter("down_proj"), format)
    return None


def _pack(weight: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    if weight.is_meta:  # the shape alone, for a model whose weights in few bits are about to be loaded
        *lead, columns = weight.shape
        scale = weight.new_empty((*lead, -(-columns // format.block)), dtype=torch.float16)
        if format.bits == 4:
            return weight.new_empty((*lead, -(-columns // 8) * 4), dtype=torch.uint8), scale
        return torch.empty_like(weight, dtype=torch.int8), scale
    pack = ops.quantize_int4 if format.bits == 4 else ops.quantize_int8
    return pack(weight.detach(), format.block)


def _widen(stored: Tensor, scale: Tensor, format: Format, columns: int, dtype: torch.dtype) -> Tensor:
    if format.bits == 4:
        return ops.dequantize_int4(stored, scale, format.block, columns, dtype)
    return ops.dequantize_int8(stored, scale, format.block, dtype)
