"""Optimizer state in eight bits and weights in sixteen: how an update reads and writes what is kept in few bits.

State (Dettmers et al. 2022, arXiv 2110.02861): each row of a matrix is cut into blocks of 256 numbers, a block is
divided by its largest magnitude, and what is left is rounded to the nearest of 256 codes. Adam's codes are dynamic: seven
decades, each with half as many codes as the one above it, since its moments spread over that many. Two things differ from
the paper, both for the embedding, whose rows are of rare and of frequent tokens: a block never holds two rows, and a
second moment above zero is never rounded to zero, where it would make the update as large as 1 / eps. Muon's momentum
is one matrix whose large entries decide: its codes are linear (docs/log.md has the two beside each other).

Weights: bfloat16 has 8 bits of precision, and most updates are smaller than half a step of it: rounded to the nearest
they vanish. Rounded up or down by chance, with the odds that make the mean exact, they add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Codes = Literal["linear", "signed", "unsigned"]

BLOCK = 256  # numbers that share an absmax; the paper's 2,048 gives an outlier more company to spoil
PART = 2**18  # numbers of a state that are in float32 at a time
SMALLEST = 4096  # numbers; smaller tensors and vectors stay float32: they are few, and they are norms and routers
ABSMAX = "_absmax"  # what the name of an 8-bit state adds for its blocks' largest magnitudes
NUM_WHOLE = "num_whole"  # attribute of a parameter that is a piece of a larger one: how many numbers that has
_DROPPED_BITS = 12  # of a float32 before it is looked up: 2**-12 relative, where codes are 2**-7 apart at best


class StateStore:
    """An optimizer's states by name: float32 to those who read and write them, `bits` (32 or 8) in memory."""

    def __init__(self, bits: int):
        self.bits = bits

    def is_8_bit(self, p: Tensor) -> bool:
        """Whether the states of this parameter are kept in 8 bits. A piece of one is kept as the whole would be."""
        return self.bits == 8 and p.ndim > 1 and getattr(p, NUM_WHOLE, p.numel()) >= SMALLEST

    def begin(self, state: dict[str, Any], p: Tensor, names: dict[str, Codes]) -> None:
        """The states that parameter `p` lacks, as they are kept, of zeros."""
        for name, codes in names.items():
            if name in state:
                continue
            if self.is_8_bit(p):
                blocks = -(-p.shape[-1] // block_size(p))
                state[name] = torch.full_like(p, int(code_values(codes).abs().argmin()), dtype=torch.uint8)
                state[name + ABSMAX] = p.new_zeros((*p.shape[:-1], blocks), dtype=torch.float32)
            else:
                state[name] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))

    def open(
        self, state: dict[str, Any], p: Tensor, names: dict[str, Codes], *, whole: bool = False
    ) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """The states in float32, all at once or, kept in 8 bits, some rows of `p` at a time unless `whole`.

        What the caller has made of them in place is stored when it asks for the next rows.
        """
        self.begin(state, p, names)
        if not self.is_8_bit(p):
            yield slice(None), tuple(state[name] for name in names)
            return
        length = len(p) if whole else max(1, PART * len(p) // max(1, p.numel()))
        for start in range(0, len(p), length):
            rows = slice(start, start + length)
            kept = [(state[name][rows], state[name + ABSMAX][rows], codes) for name, codes in names.items()]
            values = tuple(decode(*what) for what in kept)
            yield rows, values
            for value, (*stored, codes) in zip(values, kept, strict=True):
                for to, new in zip(stored, encode(value, codes), strict=True):
                    to.copy_(new)


def block_size(x: Tensor) -> int:
    """Numbers of a row that share an absmax."""
    return min(BLOCK, x.shape[-1])


def encode(x: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Codes of x (..., C), uint8 of the same shape, and the largest magnitude of each block, float32 (..., blocks)."""
    blocks = _blocks(x.float())
    absmax = blocks.abs().amax(-1)
    share = blocks / absmax.masked_fill(absmax == 0, 1.0)[..., None]
    if codes == "linear":
        nearest = ((share * 127).round() + 128).to(torch.uint8)
    else:
        index = (share.view(torch.int32) >> _DROPPED_BITS) & (2 ** (32 - _DROPPED_BITS) - 1)
        nearest = _nearest(codes).to(x.device).index_select(0, index.flatten()).view(blocks.shape)
    return nearest.flatten(-2)[..., : x.shape[-1]].contiguous(), absmax


def decode(stored: Tensor, absmax: Tensor, codes: Codes) -> Tensor:
    """The float32 numbers that `encode` kept."""
    share = code_values(codes).to(stored.device).index_select(0, stored.flatten().int()).view(stored.shape)
    return (_blocks(share) * absmax[..., None]).flatten(-2)[..., : stored.shape[-1]].contiguous()


@cache
def code_values(codes: Codes) -> Tensor:
    """The 256 values in rising order. Dynamic: zero, one, and in the i-th decade below one 2**(7-i) steps' middles (signed:
    2**(6-i)). Linear: n / 127."""
    if codes == "linear":
        return torch.arange(-128, 128) / 127
    signed = codes == "signed"
    magnitudes = []
    for decade in range(7):
        count = 2 ** ((6 if signed else 7) - decade)
        magnitudes += [10.0**-decade * (0.1 + 0.9 * (step + 0.5) / count) for step in range(count)]
    return torch.tensor(sorted([0.0, 1.0, *magnitudes, *([-m for m in magnitudes] if signed else [])]))


@cache
def _nearest(codes: Codes) -> Tensor:
    """The code of each float32 by its upper bits. Asked for a finite number of at most one; others get some code."""
    values = code_values(codes).double()
    middle_of_dropped = 1 << (_DROPPED_BITS - 1)
    bits = torch.arange(2 ** (32 - _DROPPED_BITS), dtype=torch.int64) * 2**_DROPPED_BITS + middle_of_dropped
    share = bits.to(torch.int32).view(torch.float32).double()
    share[0] = 0.0
    nearest = torch.bucketize(share, (values[1:] + values[:-1]) / 2)
    if codes == "unsigned":
        nearest[share > 0] = nearest[share > 0].clamp(min=1)
    return nearest.to(torch.uint8)


def _blocks(x: Tensor) -> Tensor:
    size = block_size(x)
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def stochastic_round(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 -> bfloat16, up or down with the odds that make the mean exact. Infinities and NaN stay what they are.

    Adds a uniform number below one step of bfloat16 to the magnitude and cuts (V. Gupta et al. 2015, arXiv 1502.02551).
    """
    dither = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return add_dither(x, dither)


def add_dither(x: Tensor, dither: Tensor) -> Tensor:
    """`stochastic_round` with given numbers from 0 to 65,535."""
    cut = ((x.contiguous().view(torch.int32) + dither) & -(2**16)).view(torch.float32)
    return torch.where(x.isfinite(), cut, x).bfloat16()


def wide(x: Tensor) -> Tensor:
    """x itself, or a float32 copy if it is narrower: what an update is computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def write_weight(p: Tensor, value: Tensor) -> None:
    """Stores the updated `wide(p)`, by chance up or down if p is bfloat16 (torch's own random state, which is saved)."""
    if value is not p:
        p.copy_(stochastic_round(value))
