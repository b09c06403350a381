"""Weights as they are stored: in few bits in blocks along a row, or in half-width floats.

  int8, int4                        Minga's own: 64 numbers a scale, 8.25 bits a weight; 32, 4.5 bits
  Q8_0 Q4_0 Q4_1 Q5_0 Q5_1          GGUF's blocks of 32, with a scale, or a scale and a minimum
  Q4_K Q5_K Q6_K                    GGUF's blocks of 32 or 16 whose scales are whole numbers times factors of 256 columns
  float32 bfloat16 float16          as they are

A module of these stores nothing else: weights stay as they are in memory and are widened as they are used, or read as
they are by the compiled kernels, those in 8 bits also by the kernels of a GPU. The matrices of one model may be stored in
different formats. Norms, biases and the router stay float32: they are few, and the choice of experts is sensitive to them.

  O output rows, I input columns, G blocks of a row, E experts, F expert hidden, D model dim, N tokens, A active
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minga.kernels import ops, panels

SUPER = 256  # columns of a nested format whose float16 factors are one


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: numbers scale * (code - zero), or scale * code + minimum, with `block` columns a scale.

    bits: of a code; 8 have a sign. 16 and 32: floats, without blocks. nested: scales and minima of blocks are whole
    numbers, times float16 factors that SUPER columns share.
    """

    name: str
    bits: int
    block: int = 0
    zero: int = 0
    minimum: bool = False
    nested: bool = False

    @property
    def method(self) -> str:
        """What `quantization_config.quant_method` of a saved folder says."""
        return f"minga-{self.name}"

    @property
    def suffix(self) -> str:
        """What the name of its scales adds to a matrix's."""
        return "_scale"

    def describe(self) -> dict[str, Any]:
        """`quantization_config` of a saved folder."""
        return {"quant_method": self.method, "weight_block_size": [1, self.block]}

    @property
    def is_float(self) -> bool:
        return self.bits > 8

    @property
    def dtype(self) -> torch.dtype:
        """Of what is stored; codes of less than 8 bits are packed into bytes."""
        dtype: torch.dtype = getattr(torch, self.name) if self.is_float else torch.uint8
        return torch.int8 if self.bits == 8 else dtype

    @property
    def span(self) -> int:
        """Columns that share a float16 factor."""
        return SUPER if self.nested else self.block


FORMATS = {kind.name: kind for kind in (Format("int8", 8, 64), Format("int4", 4, 32, 8))}  # that we round to
FLOATS = {dtype: Format(str(dtype).removeprefix("torch."), 8 * dtype.itemsize)
          for dtype in (torch.float32, torch.bfloat16, torch.float16)}  # fmt: skip
GGUF = {
    kind.name: kind
    for kind in (
        Format("Q8_0", 8, 32),
        Format("Q4_0", 4, 32, 8),
        Format("Q4_1", 4, 32, minimum=True),
        Format("Q5_0", 5, 32, 16),
        Format("Q5_1", 5, 32, minimum=True),
        Format("Q4_K", 4, 32, minimum=True, nested=True),
        Format("Q5_K", 5, 32, minimum=True, nested=True),
        Format("Q6_K", 6, 16, 32, nested=True),
    )
}


@dataclass(frozen=True)
class Stored:
    """A matrix (O, I) or a stack of them (E, O, I), row by row. docs/formats.md has the bytes.

    data: floats, int8, or packed codes (`reference.pack_codes`). factors: what stands beside them, 16 bits each: a float16
    scale a block, or scale and minimum, or of nested formats the float16 factors of SUPER columns and then the blocks' own,
    two in 16 bits: scale and minimum of a block, or the scales of two blocks.
    """

    format: Format
    shape: torch.Size
    data: Tensor
    factors: Tensor | None = None

    @classmethod
    def round(cls, weight: Tensor, format: Format) -> Stored:
        """In one of `FORMATS`."""
        if weight.is_meta:  # the shape alone, for a model whose weights in few bits are about to be loaded
            *lead, columns = weight.shape
            width = columns if format.bits == 8 else -(-columns // 8) * 4
            scale = weight.new_empty((*lead, -(-columns // format.block)), dtype=torch.float16)
            return cls(format, weight.shape, weight.new_empty((*lead, width), dtype=format.dtype), scale)
        pack = ops.quantize_int8 if format.bits == 8 else ops.quantize_int4
        return cls(format, weight.shape, *pack(weight.detach(), format.block))

    @classmethod
    def keep(cls, weight: Tensor) -> Stored:
        """Floats as they are."""
        return cls(FLOATS[weight.dtype], weight.shape, weight.detach())

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """As floats."""
        if self.factors is None:
            return self.data.to(dtype)
        format, columns = self.format, self.shape[-1]
        if format.bits == 8:
            return ops.dequantize_int8(self.data, self.factors, format.block, dtype)
        codes = ops.unpack_codes(self.data, format.bits, format.block)[..., :columns]
        scale, minimum = self.scales(dtype)
        return ops.dequantize_codes(codes, scale, minimum, format.zero, format.block, dtype)

    def scales(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The scale of each block and its minimum, (.., O, G)."""
        assert self.factors is not None
        format, factors = self.format, self.factors
        if not format.nested:
            wide = factors.to(dtype)
            return (wide[..., ::2], wide[..., 1::2]) if format.minimum else (wide, None)
        outer = 1 + format.minimum
        supers = factors.unflatten(-1, (self.shape[-1] // SUPER, -1))
        shared, inner = supers[..., :outer].view(torch.float16).to(dtype), supers[..., outer:].contiguous()
        if not format.minimum:
            return (inner.view(torch.int8).to(dtype) * shared).flatten(-2), None
        scale, minimum = inner.view(torch.uint8).unflatten(-1, (-1, 2)).to(dtype).unbind(-1)
        return (scale * shared[..., :1]).flatten(-2), (minimum * -shared[..., 1:]).flatten(-2)


class Quantized(nn.Module):
    """Matrices as buffers NAME and NAME_scale: in rows (`Stored`), or after `to_panels` as the kernels read them.

    A state dict has Minga's own formats in rows, as they are saved, and what comes from a GGUF file as float32.
    """

    in_panels = False

    def __init__(self, **matrices: Stored):
        super().__init__()
        self._stored_as: dict[str, Stored] = {}  # without the numbers, which are buffers
        for name, stored in matrices.items():
            self._stored_as[name] = replace(stored, data=stored.data.new_empty(0), factors=None)
            self.register_buffer(name, stored.data)
            if stored.factors is not None:
                self.register_buffer(name + stored.format.suffix, stored.factors)

    def formats(self) -> list[Format]:
        return [stored.format for stored in self._stored_as.values()]

    def format(self, name: str) -> Format:
        return self._stored_as[name].format

    def shape(self, name: str) -> torch.Size:
        """Of the matrix, whatever it is stored as."""
        return self._stored_as[name].shape

    def rows(self, name: str) -> Stored:
        """A matrix row by row."""
        stored, data = self._stored_as[name], self.get_buffer(name)
        if stored.format.is_float:
            return replace(stored, data=data)
        factors = self.get_buffer(name + stored.format.suffix)
        if self.in_panels:
            data, factors = panels.to_rows(data, factors, stored.shape, stored.format.dtype)
        return replace(stored, data=data, factors=factors)

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """A matrix in 8 bits row by row, and the scales of its blocks."""
        stored = self.rows(name)
        assert stored.factors is not None
        return stored.data, stored.factors

    def dense(self, name: str, dtype: torch.dtype = torch.float32, which: Tensor | None = None) -> Tensor:
        """A matrix as floats, or of a stack (of an embedding's rows) those with the numbers `which`."""
        stored = self.rows(name)
        if which is not None:
            factors = None if stored.factors is None else stored.factors[which]
            shape = torch.Size((*which.shape, *stored.shape[1:]))
            stored = replace(stored, shape=shape, data=stored.data[which], factors=factors)
        return stored.dense(dtype)

    def to_panels(self, empty: panels.Empty = torch.empty) -> None:
        """Lays the matrices out for the compiled kernels, in memory from `empty`; all else works as before, slower."""
        for name in () if self.in_panels else self._stored_as:
            stored = self.rows(name)
            if stored.factors is None:
                setattr(self, name, empty(*stored.data.shape, dtype=stored.data.dtype).copy_(stored.data))
            else:
                words, factors = panels.from_rows(stored.data, stored.factors, empty)
                setattr(self, name, words)
                setattr(self, f"{name}_scale", factors)
        self.in_panels = True

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._stored_as:
            stored = self.rows(name)
            if stored.format.name in FORMATS:
                destination[prefix + name], destination[f"{prefix}{name}_scale"] = stored.data, stored.factors
            elif stored.format.name in GGUF:
                destination[prefix + name] = stored.dense()
                del destination[f"{prefix}{name}_scale"]


class QuantLinear(Quantized):
    """`nn.Linear` over a stored weight (O, I)."""

    def __init__(self, weight: Stored, bias: Tensor | None):
        super().__init__(weight=weight)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.format("weight").bits == 8 and ops.on_gpu(x):
            y = ops.linear_int8(x, *self.codes("weight"), self.format("weight").block)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.dense("weight", x.dtype), self.bias)


class QuantEmbedding(Quantized):
    """`nn.Embedding` over stored rows: only those that are looked up are widened."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.dense("weight", which=ids)


class QuantExperts(Quantized):
    """A layer's experts as stored stacks (E, 2F, D) and (E, D, F): only those that were chosen are widened."""

    def forward(self, x_ND: Tensor, index_NA: Tensor, weight_NA: Tensor) -> Tensor:
        first, second = (self.format(name) for name in _EXPERTS)
        if first == second and first.bits == 8 and ops.on_gpu(x_ND, weight_NA):
            stacks = (self.codes(name) for name in _EXPERTS)
            return ops.experts_int8(x_ND, index_NA, weight_NA, *stacks, block=first.block)
        used, local_NA = index_NA.unique(return_inverse=True)
        gate_up, down = (self.dense(name, x_ND.dtype, used) for name in ("gate_up_proj", "down_proj"))
        return ops.experts(x_ND, local_NA, weight_NA, gate_up, down)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear or embedding layer as floats, whatever it is stored in."""
    return module.dense("weight") if isinstance(module, Quantized) else module.get_parameter("weight")


def quantize(module: nn.Module, format: Format) -> nn.Module:
    """Rounds every linear, embedding and expert layer inside `module` to one of `FORMATS`, in place."""
    return replace_matrices(module, lambda name, weight: Stored.round(weight, format))


def put(module: nn.Module, stored: Mapping[str, Stored]) -> nn.Module:
    """Gives `module` the stored matrices, by their names in it, in place of its own."""
    return replace_matrices(module, lambda name, weight: stored.get(name))


def formats_of(module: nn.Module) -> list[Format]:
    """The formats that a model's matrices are stored in, each once; none where they are its own parameters."""
    found = (format for part in module.modules() if isinstance(part, Quantized) for format in part.formats())
    return list(dict.fromkeys(found))


def format_of(module: nn.Module) -> Format | None:
    """The first of `formats_of`: all that there is to know about a model that Minga has rounded."""
    return next(iter(formats_of(module)), None)


_EXPERTS = ("gate_up_proj", "down_proj")


def replace_matrices(module: nn.Module, stored: Callable[[str, Tensor], Stored | None], prefix: str = "") -> nn.Module:
    """Layers with a matrix for which `stored` has a form become their twins above. Experts are recognised by their two
    stacked parameters, so that this layer needs to know no model.
    """
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}."
        weights = {key: weight for key, weight in child.named_parameters(recurse=False) if key != "bias"}
        linear = isinstance(child, (nn.Linear, nn.Embedding))
        found = (
            {key: stored(path + key, weight) for key, weight in weights.items()}
            if linear or {*weights} == {*_EXPERTS}
            else {}
        )
        if not any(found.values()):
            replace_matrices(child, stored, path)
            continue
        matrices = {key: Stored.keep(weights[key]) if matrix is None else matrix for key, matrix in found.items()}
        if isinstance(child, nn.Linear):
            setattr(module, name, QuantLinear(matrices["weight"], child.bias))
        else:
            setattr(module, name, (QuantEmbedding if linear else QuantExperts)(**matrices))
    return module
