"""The number formats of GGUF files, turned into float32.

Most cut a row into blocks of 32 or 256 numbers and store small integers q with a scale d for each block: x = d * q, or
x = d * q + m. The K formats have sub-blocks whose own scales are small integers again. The layouts are those of
ggml-common.h and ggml-quants.c in llama.cpp; `tests/checkpoint/test_ggml_types.py` compares every one with the `gguf`
package.

Each function takes the raw blocks, (N, bytes of a block) uint8, and fills `out`, (N, numbers of a block) float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 16  # numbers at a time: 256 kB of float32, so that the passes over a chunk stay in the cache


@dataclass(frozen=True)
class GGMLType:
    """`numbers` per block of `num_bytes` bytes. `unpack` is None where nothing is to be done: float32."""

    name: str
    numbers: int
    num_bytes: int
    unpack: Callable[[Tensor, Tensor], None] | None


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


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8))
    out.mul_(_half(blocks, 0))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 2:], out)
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 4:], out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 6:], out)
    out.add_(_bits(blocks[:, 2:6]), alpha=16).sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 8:], out)
    out.add_(_bits(blocks[:, 4:8]), alpha=16).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


# ---------------------------------------------------------------------------------------------------- blocks of 256


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> eight 6-bit scales and eight 6-bit minima, each (N, 8, 1): four of each whole, four in pieces."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), 1)
    minimum = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), 1)
    return scale.float()[:, :, None], minimum.float()[:, :, None]


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    """d, dmin, 12 bytes of scales, 128 bytes of nibbles: 8 sub-blocks of 32, two of them in each 32 bytes."""
    _unpack_k(blocks, blocks[:, 16:], None, out)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    """As Q4_K, with a fifth bit each: bit j of 32 bytes belongs to sub-block j."""
    _unpack_k(blocks, blocks[:, 48:], blocks[:, 16:48], out)


def _unpack_k(blocks: Tensor, packed: Tensor, fifth: Tensor | None, out: Tensor) -> None:
    scale, minimum = _k_scales(blocks[:, 4:16])
    sub = out.view(-1, 8, 32)
    pairs = packed.reshape(-1, 4, 32)
    sub[:, 0::2] = pairs & 15
    sub[:, 1::2] = pairs >> 4
    if fifth is not None:
        sub.add_((fifth[:, None, :] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1, alpha=16)
    sub.mul_(scale * _half(blocks, 0)[:, :, None]).sub_(minimum * _half(blocks, 2)[:, :, None])


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    """128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales of 16 numbers each, d. Two halves of 128."""
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    quarter = out.view(-1, 2, 4, 32)
    quarter[:, :, 0:2] = (low & 15) | ((high >> torch.tensor([0, 2], dtype=torch.uint8)[:, None] & 3) << 4)
    quarter[:, :, 2:4] = (low >> 4) | ((high >> torch.tensor([4, 6], dtype=torch.uint8)[:, None] & 3) << 4)
    scale = blocks[:, 192:208].view(torch.int8).float() * _half(blocks, 208)
    out.view(-1, 16, 16).sub_(32).mul_(scale[:, :, None])


TYPES: dict[int, GGMLType] = {
    0: GGMLType("F32", 1, 4, None),
    1: GGMLType("F16", 1, 2, _f16),
    2: GGMLType("Q4_0", 32, 18, _q4_0),
    3: GGMLType("Q4_1", 32, 20, _q4_1),
    6: GGMLType("Q5_0", 32, 22, _q5_0),
    7: GGMLType("Q5_1", 32, 24, _q5_1),
    8: GGMLType("Q8_0", 32, 34, _q8_0),
    12: GGMLType("Q4_K", 256, 144, _q4_k),
    13: GGMLType("Q5_K", 256, 176, _q5_k),
    14: GGMLType("Q6_K", 256, 210, _q6_k),
    30: GGMLType("BF16", 1, 2, _bf16),
}
# types that exist and that we do not read: for the message only
OTHER_NAMES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
