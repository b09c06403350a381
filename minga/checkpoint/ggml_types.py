"""The number formats of GGUF files, turned into float32.

Most cut a row into blocks of 32 or 256 numbers and store small integers q with a scale d for each block: x = d * q, or
x = d * q + m. The K formats have sub-blocks whose own scales are small integers again. The layouts are those of
ggml-common.h and ggml-quants.c in llama.cpp; `tests/checkpoint/test_ggml_types.py` compares every one with the `gguf`
package.

Each `unpack` takes the raw blocks, (N, bytes of a block) uint8, and fills `out`, (N, numbers of a block) float32: the
definition. `split` takes blocks apart without widening them, for kernels that read them as they are: it fills `out` with
the codes, uint8 (int8 where they have 8 bits), and returns what stands beside them (`minga.quant.blocks.Stored`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minga.kernels.reference import pack_codes
from minga.quant.blocks import FLOATS, GGUF, Format, Stored

_CHUNK = 1 << 16  # numbers at a time: 256 kB of float32, so that the passes over a chunk stay in the cache


@dataclass(frozen=True)
class GGMLType:
    """`numbers` per block of `num_bytes` bytes. `unpack` is None where nothing is to be done: float32; `split` where
    there are no blocks."""

    name: str
    numbers: int
    num_bytes: int
    unpack: Callable[[Tensor, Tensor], None] | None
    split: Callable[[Tensor, Tensor], Tensor] | None = None


def dequantise(raw: Tensor, kind: GGMLType) -> Tensor:
    """`raw`: 1-d uint8, a whole number of blocks. Returns 1-d float32; for F32 itself a view of `raw`."""
    if kind.unpack is None:
        return raw.view(torch.float32)
    blocks = raw.view(-1, kind.num_bytes)
    out = torch.empty(blocks.shape[0], kind.numbers)
    step = _CHUNK // kind.numbers
    for i in range(0, blocks.shape[0], step):
        kind.unpack(blocks[i : i + step], out[i : i + step])
    return out.view(-1)


def keep(raw: Tensor, kind: GGMLType, shape: tuple[int, ...]) -> Stored:
    """The same numbers as they are stored, exactly, laid out as the kernels read a row. `raw` as for `dequantise`."""
    size = torch.Size(shape)
    if kind.split is None:
        dtype = {4: torch.float32, 2: torch.bfloat16 if kind.name == "BF16" else torch.float16}[kind.num_bytes]
        return Stored(FLOATS[dtype], size, raw.view(dtype).view(size))
    format, blocks = GGUF[kind.name], raw.view(-1, kind.num_bytes)
    num_rows, in_row = size[:-1].numel(), size[-1] // kind.numbers  # blocks
    data = torch.empty(num_rows * in_row, kind.numbers * format.bits // 8, dtype=format.dtype)
    factors = torch.empty(num_rows * in_row, _num_factors(format), dtype=torch.int16)
    step = _CHUNK // kind.numbers
    codes = torch.empty(step, kind.numbers, dtype=format.dtype)
    for i in range(0, blocks.shape[0], step):
        part = blocks[i : i + step]
        out = codes[: part.shape[0]]
        factors[i : i + step] = kind.split(part, out)
        data[i : i + step] = out if format.bits == 8 else pack_codes(out, format.bits, format.block)
    data, factors = (x.view(*size[:-1], in_row * x.shape[1]) for x in (data, factors))
    return Stored(format, size, data, factors if format.nested else factors.view(torch.float16))


def _num_factors(format: Format) -> int:
    """Of a block of the file, which is `format.span` numbers; 16 bits each."""
    outer = 1 + format.minimum
    return outer + (format.span // format.block // (1 if format.minimum else 2) if format.nested else 0)


# ---------------------------------------------------------------------------------------------------- plain numbers


def _f16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.float16))


def _bf16(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks.view(torch.bfloat16))


# ---------------------------------------------------------------------------------------------------- blocks of 32


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of each block, as (N, 1) float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, out: Tensor) -> None:
    """(N, 16) bytes -> (N, 32): the low halves first, then the high ones."""
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4


def _bits(packed: Tensor) -> Tensor:
    """(N, 4) bytes -> (N, 32) bits, the lowest first."""
    return ((packed[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)


def _shorts(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Bytes of each block as (N, ..) int16."""
    return blocks[:, start:stop].contiguous().view(torch.int16)


def _q8_0_split(blocks: Tensor, out: Tensor) -> Tensor:
    out.copy_(blocks[:, 2:].view(torch.int8))
    return _shorts(blocks, 0, 2)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    _q8_0_split(blocks, out)
    out.mul_(_half(blocks, 0))


def _q4_0_split(blocks: Tensor, out: Tensor) -> Tensor:
    _nibbles(blocks[:, 2:], out)
    return _shorts(blocks, 0, 2)


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _q4_0_split(blocks, out)
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1_split(blocks: Tensor, out: Tensor) -> Tensor:
    _nibbles(blocks[:, 4:], out)
    return _shorts(blocks, 0, 4)


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _q4_1_split(blocks, out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0_split(blocks: Tensor, out: Tensor) -> Tensor:
    _nibbles(blocks[:, 6:], out)
    out.add_(_bits(blocks[:, 2:6]), alpha=16)
    return _shorts(blocks, 0, 2)


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    _q5_0_split(blocks, out)
    out.sub_(16).mul_(_half(blocks, 0))


def _q5_1_split(blocks: Tensor, out: Tensor) -> Tensor:
    _nibbles(blocks[:, 8:], out)
    out.add_(_bits(blocks[:, 4:8]), alpha=16)
    return _shorts(blocks, 0, 4)


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    _q5_1_split(blocks, out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


# ---------------------------------------------------------------------------------------------------- blocks of 256


def _k_scales(packed: Tensor) -> Tensor:
    """12 bytes -> eight 6-bit scales, each with its 6-bit minimum, (N, 8, 2): four of each whole, four in pieces."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), 1)
    minimum = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), 1)
    return torch.stack((scale, minimum), -1)


def _k_split(blocks: Tensor, packed: Tensor, fifth: Tensor | None, out: Tensor) -> Tensor:
    """d, dmin, 12 bytes of scales, then nibbles: 8 sub-blocks of 32, two of them in each 32 bytes."""
    sub, pairs = out.view(-1, 8, 32), packed.reshape(-1, 4, 32)
    sub[:, 0::2] = pairs & 15
    sub[:, 1::2] = pairs >> 4
    if fifth is not None:
        sub.add_((fifth[:, None, :] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1, alpha=16)
    return torch.cat((_shorts(blocks, 0, 4), _k_scales(blocks[:, 4:16]).flatten(1).view(torch.int16)), 1)


def _k(blocks: Tensor, out: Tensor) -> None:
    """Codes, as `_k_split` leaves them, become numbers."""
    scale, minimum = _k_scales(blocks[:, 4:16]).float()[..., None].unbind(2)
    out.view(-1, 8, 32).mul_(scale * _half(blocks, 0)[:, :, None]).sub_(minimum * _half(blocks, 2)[:, :, None])


def _q4_k_split(blocks: Tensor, out: Tensor) -> Tensor:
    return _k_split(blocks, blocks[:, 16:], None, out)


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    _q4_k_split(blocks, out)
    _k(blocks, out)


def _q5_k_split(blocks: Tensor, out: Tensor) -> Tensor:
    """As Q4_K, with a fifth bit each: bit j of 32 bytes belongs to sub-block j."""
    return _k_split(blocks, blocks[:, 48:], blocks[:, 16:48], out)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    _q5_k_split(blocks, out)
    _k(blocks, out)


def _q6_k_split(blocks: Tensor, out: Tensor) -> Tensor:
    """128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales of 16 numbers each, d. Two halves of 128."""
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    quarter = out.view(-1, 2, 4, 32)
    quarter[:, :, 0:2] = (low & 15) | ((high >> torch.tensor([0, 2], dtype=torch.uint8)[:, None] & 3) << 4)
    quarter[:, :, 2:4] = (low >> 4) | ((high >> torch.tensor([4, 6], dtype=torch.uint8)[:, None] & 3) << 4)
    return torch.cat((_shorts(blocks, 208, 210), _shorts(blocks, 192, 208)), 1)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    _q6_k_split(blocks, out)
    scale = blocks[:, 192:208].view(torch.int8).float() * _half(blocks, 208)
    out.view(-1, 16, 16).sub_(32).mul_(scale[:, :, None])


TYPES: dict[int, GGMLType] = {
    0: GGMLType("F32", 1, 4, None),
    1: GGMLType("F16", 1, 2, _f16),
    2: GGMLType("Q4_0", 32, 18, _q4_0, _q4_0_split),
    3: GGMLType("Q4_1", 32, 20, _q4_1, _q4_1_split),
    6: GGMLType("Q5_0", 32, 22, _q5_0, _q5_0_split),
    7: GGMLType("Q5_1", 32, 24, _q5_1, _q5_1_split),
    8: GGMLType("Q8_0", 32, 34, _q8_0, _q8_0_split),
    12: GGMLType("Q4_K", 256, 144, _q4_k, _q4_k_split),
    13: GGMLType("Q5_K", 256, 176, _q5_k, _q5_k_split),
    14: GGMLType("Q6_K", 256, 210, _q6_k, _q6_k_split),
    30: GGMLType("BF16", 1, 2, _bf16),
}
# types that exist and that we do not read: for the message only
OTHER_NAMES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
