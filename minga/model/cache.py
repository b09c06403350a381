"""The attention cache: for latent attention 576-like numbers a token and layer (V2 section 2.1.2), else keys and values.

Rows lie in pages of 64, and a sequence has a list of pages: so sequences come and go and share what they have in common
without anything being moved (PagedAttention, arXiv 2309.06180). Tokens are written at their own positions, so sequences of
one batch may stand at different lengths and a rejected draft is undone by writing over it: a query at position p only
ever looks at rows 0..p.

  B sequences, T tokens of this call, S rows, W numbers of a row, P pages of a sequence
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from minga.config import ModelConfig
from minga.kernels import ops

PAGE = 64  # rows
BLOCK = 64  # numbers of a row that share a scale in int8


class Pages:
    """The memory of a cache: `slots` is (layers, pages, PAGE, row); a row is [latent C | rope R], or [keys H·K | values H·K].

    dtype: of the numbers; torch.int8 rounds them in blocks of 64, whose float16 scales stand at the end of the row.
    """

    def __init__(self, config: ModelConfig, num_pages: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"):
        # one more layer for each MTP module, which attends over its own latents
        self.num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.width = config.cache_elements_per_token // config.num_hidden_layers
        row = self.width + 2 * -(-self.width // BLOCK) if dtype == torch.int8 else self.width
        self.slots = _zeros((self.num_layers, num_pages, PAGE, row), dtype, torch.device(device))

    @property
    def bytes_per_token(self) -> int:
        """All layers, MTP modules included, of one sequence."""
        return self.slots[:, 0, 0].numel() * self.slots.element_size()

    def write(self, layer: int, pages: Tensor, rows: Tensor, numbers: Tensor) -> None:
        """numbers (.., W) into the rows of the pages with these numbers, both (..)."""
        slots = self.slots[layer]
        if slots.dtype == torch.int8:
            codes, scale = ops.quantize_int8(numbers, BLOCK)
            slots[pages, rows] = torch.cat([codes, scale.view(torch.int8)], -1)
        else:
            slots[pages, rows] = numbers.to(slots.dtype)

    def read(self, layer: int, pages: Tensor) -> Tensor:
        """All rows of the pages, (.., PAGE, W)."""
        rows = self.slots[layer][pages]
        if rows.dtype != torch.int8:
            return rows
        scale = rows[..., self.width :].contiguous().view(torch.float16)
        return ops.dequantize_int8(rows[..., : self.width], scale, BLOCK, torch.float32)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.zeros, which touches every byte; here the system gives a page of memory when it is first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class Cache:
    """Where B sequences have their rows: `table_BP` names the pages of each, in order."""

    def __init__(self, pages: Pages, table_BP: Tensor):
        self.pages, self.table_BP = pages, table_BP

    @classmethod
    def of(
        cls, config: ModelConfig, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Cache:
        """An empty cache with room for `capacity` tokens of each sequence."""
        each = -(-capacity // PAGE)
        pages = Pages(config, batch * each, dtype=dtype, device=device)
        return cls(pages, torch.arange(batch * each, device=device).view(batch, each))

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may have."""
        return self.table_BP.shape[1] * PAGE

    def write(self, layer: int, positions_BT: Tensor, row_BTW: Tensor) -> None:
        positions_BT = positions_BT.expand(row_BTW.shape[:2])
        self.pages.write(layer, self.table_BP.gather(1, positions_BT // PAGE), positions_BT % PAGE, row_BTW)

    def read(self, layer: int, length: int) -> Tensor:
        """Rows 0..length-1 of every sequence, (B, length, W)."""
        return self.pages.read(layer, self.table_BP[:, : -(-length // PAGE)]).flatten(1, 2)[:, :length]
