"""How the compiled kernels want weights in few bits to lie: in panels of 16 rows, so that one instruction multiplies some
columns of all of them. docs/formats.md draws it.

A word is 32 bits: four int8 of a row, or eight codes of 4 bits (the low halves are the first four), or what blocks of
codes of 5 and 6 bits have besides. Rows are filled up to 16 and columns to 8 with zeros.

  O rows, W words of a row, P panels, G blocks of a row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 16


Empty = Callable[..., Tensor]  # torch.empty, or what takes its place: (*shape, dtype=) -> memory


def from_rows(stored: Tensor, factors_OG: Tensor, empty: Empty = torch.empty) -> tuple[Tensor, Tensor]:
    """int8 (.., O, I) or packed codes in bytes (.., O, bytes), and what stands beside them in 16 bits each, (.., O, G) ->
    words (.., P, W, 16) int32, factors (.., P, G, 16)."""
    stored = F.pad(stored, (0, -stored.shape[-1] % 8)) if stored.dtype == torch.int8 else stored
    return _to_panels(stored.contiguous().view(torch.int32), empty), _to_panels(factors_OG, empty)


def to_rows(words: Tensor, factors: Tensor, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inverse of `from_rows`; shape: of the matrix, (.., O, I); dtype: int8, or uint8 for packed codes."""
    stored = _to_rows(words, shape[-2]).view(dtype)
    return stored[..., : shape[-1]].contiguous() if dtype == torch.int8 else stored, _to_rows(factors, shape[-2])


def _to_panels(x: Tensor, empty: Empty) -> Tensor:
    *lead, rows, width = x.shape
    x = F.pad(x, (0, 0, 0, -rows % ROWS)) if rows % ROWS else x
    panels = -(-rows // ROWS)
    out = empty(*lead, panels, width, ROWS, dtype=x.dtype)
    return out.copy_(x.view(*lead, panels, ROWS, width).transpose(-1, -2))


def _to_rows(x: Tensor, rows: int) -> Tensor:
    x = x.transpose(-1, -2).flatten(-3, -2)[..., :rows, :]
    return x.clone(memory_format=torch.contiguous_format)  # also where a size of 1 hides its stride from `contiguous`
