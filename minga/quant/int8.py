"""Eight-bit weights: int8 in blocks of 64 along a row, one float16 scale a block (8.25 bits a weight).

A quantised module stores nothing else: the weights stay 8-bit in memory and are widened as they are used. Norms, biases
and the router stay float32: they are few, and the choice of experts is sensitive to them.

  O output rows, I input columns, G blocks of a row, E experts, F expert hidden, D model dim, N tokens, A active
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minga.kernels import ops

BLOCK = 64
QUANT_METHOD = "minga-int8"  # what `quantization_config.quant_method` of a saved folder says


class QuantLinear(nn.Module):
    """`nn.Linear` over an int8 weight (O, I) and its scales (O, G)."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_int8(x, self.weight, self.weight_scale, BLOCK, self.bias)


class QuantEmbedding(nn.Module):
    """`nn.Embedding` over int8 rows: only the rows that are looked up are widened."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        rows, scales = F.embedding(ids, self.weight), F.embedding(ids, self.weight_scale)
        return ops.dequantize_int8(rows, scales, BLOCK, torch.float32)


class QuantExperts(nn.Module):
    """A layer's experts as int8 stacks (E, 2F, D) and (E, D, F): only those that were chosen are widened."""

    gate_up_proj: Tensor
    gate_up_proj_scale: Tensor
    down_proj: Tensor
    down_proj_scale: Tensor

    def __init__(self, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor):
        super().__init__()
        self.register_buffer("gate_up_proj", gate_up)
        self.register_buffer("gate_up_proj_scale", gate_up_scale)
        self.register_buffer("down_proj", down)
        self.register_buffer("down_proj_scale", down_scale)

    def forward(self, x_ND: Tensor, index_NA: Tensor, weight_NA: Tensor) -> Tensor:
        used, local_NA = index_NA.unique(return_inverse=True)
        gate_up = ops.dequantize_int8(self.gate_up_proj[used], self.gate_up_proj_scale[used], BLOCK, x_ND.dtype)
        down = ops.dequantize_int8(self.down_proj[used], self.down_proj_scale[used], BLOCK, x_ND.dtype)
        return ops.experts(x_ND, local_NA, weight_NA, gate_up, down)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear or embedding layer as floats, whatever it is stored in."""
    if isinstance(module, (QuantLinear, QuantEmbedding)):
        return ops.dequantize_int8(module.weight, module.weight_scale, BLOCK, torch.float32)
    return module.get_parameter("weight")


def quantize(module: nn.Module) -> nn.Module:
    """Replaces every linear, embedding and expert layer inside `module` by its 8-bit form, in place.

    Experts are recognised by their two stacked parameters, so that this layer needs to know no model.
    """
    for name, child in list(module.named_children()):
        replacement = _quantized(child)
        if replacement is None:
            quantize(child)
        else:
            setattr(module, name, replacement)
    return module


def _quantized(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.Linear):
        bias = None if module.bias is None else module.bias.detach()
        return QuantLinear(*_pack(module.weight), bias)
    if isinstance(module, nn.Embedding):
        return QuantEmbedding(*_pack(module.weight))
    if {name for name, _ in module.named_parameters(recurse=False)} == {"gate_up_proj", "down_proj"}:
        return QuantExperts(*_pack(module.get_parameter("gate_up_proj")), *_pack(module.get_parameter("down_proj")))
    return None


def _pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    if weight.is_meta:  # the shape alone, for a model whose 8-bit weights are about to be loaded
        blocks = -(-weight.shape[-1] // BLOCK)
        scale = weight.new_empty((*weight.shape[:-1], blocks), dtype=torch.float16)
        return torch.empty_like(weight, dtype=torch.int8), scale
    return ops.quantize_int8(weight.detach(), BLOCK)
